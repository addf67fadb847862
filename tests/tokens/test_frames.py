"""The frame tokenizer: the seam's shapes, sizes that do not fit, and files."""

import numpy as np
import pytest
import torch

from emu_embodied.models.ibq import IBQ, IBQConfig
from emu_embodied.protocols import FrameTokenizer
from emu_embodied.tokens.frames import IBQFrameTokenizer

CONFIG = IBQConfig(
    ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), resolution=16, z_channels=8, embed_dim=4, n_embed=32,
    norm_groups=4, patch=2,
)  # fmt: skip


@pytest.fixture
def tokenizer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ibq = IBQ(CONFIG)
        pixels = torch.rand(8, 3, 16, 16) * 2 - 1
        ibq.initialise_codebook(ibq.vectors(pixels).detach(), torch.Generator().manual_seed(0))
        return IBQFrameTokenizer(ibq)


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)


def test_satisfies_the_seam(tokenizer, frames):
    assert isinstance(tokenizer, FrameTokenizer)
    assert (tokenizer.grid, tokenizer.codebook_size, tokenizer.image_size) == ((4, 4), 32, 16)
    codes = tokenizer.encode(frames)
    assert codes.shape == (5, 16) and codes.dtype == torch.int64
    assert torch.equal(codes, tokenizer.encode(torch.from_numpy(frames)))
    decoded = tokenizer.decode(codes)
    assert decoded.shape == frames.shape and decoded.dtype == np.uint8
    vectors = tokenizer.embed(codes.view(5, 4, 4))
    assert vectors.shape == (5, 4, 4, 4) and vectors.dtype == torch.float32
    assert torch.equal(vectors[2, 1, 3], tokenizer.ibq.codebook[codes[2, 7]])


def test_codes_are_row_major(tokenizer, frames):
    codes = tokenizer.encode(frames)
    pixels = torch.from_numpy(frames).movedim(-1, 1).float() / 127.5 - 1
    grid = tokenizer.ibq.encode(pixels)
    assert all(codes[1, 4 * row + column] == grid[1, row, column] for row in range(4) for column in range(4))
    painted = ((tokenizer.ibq.decode(grid) + 1) * 127.5).clamp(0, 255).movedim(1, -1)
    assert np.abs(tokenizer.decode(codes) - painted.numpy()).max() <= 1


def test_batch_equals_loop(tokenizer, frames):
    codes = tokenizer.encode(frames)
    assert torch.equal(codes, torch.cat([tokenizer.encode(frames[i : i + 1]) for i in range(5)]))
    looped = np.concatenate([tokenizer.decode(codes[i : i + 1]) for i in range(5)])
    assert np.abs(tokenizer.decode(codes).astype(int) - looped).max() <= 1


def test_idempotence_is_the_share_of_surviving_codes(tokenizer, frames):
    codes = tokenizer.encode(frames)
    again = tokenizer.encode(tokenizer.decode(codes))
    assert tokenizer.idempotence(codes) == pytest.approx((codes == again).float().mean().item())
    assert 0 <= tokenizer.idempotence(codes) <= 1


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (np.zeros((2, 32, 32, 3), np.uint8), r"32, 32, 3\).*16 x 16"),
        (np.zeros((16, 16, 3), np.uint8), "16, 16, 3"),
        (np.zeros((2, 16, 16, 3), np.float32), "uint8"),
    ],
)
def test_frames_that_do_not_fit_are_refused(tokenizer, bad, match):
    with pytest.raises(ValueError, match=match):
        tokenizer.encode(bad)


@pytest.mark.parametrize("codes", [torch.zeros(2, 9, dtype=torch.int64), torch.full((1, 16), 32)])
def test_codes_that_do_not_fit_are_refused(tokenizer, codes):
    with pytest.raises(ValueError, match=r"16|32"):
        tokenizer.decode(codes)


def test_files_round_trip(tokenizer, frames, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded = IBQFrameTokenizer.from_pretrained(tmp_path)
    codes = tokenizer.encode(frames)
    assert torch.equal(codes, loaded.encode(frames))
    assert np.array_equal(tokenizer.decode(codes), loaded.decode(codes))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        IBQFrameTokenizer.from_pretrained(tmp_path)
