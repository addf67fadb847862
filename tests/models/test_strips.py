"""Images in strips of rows against the same images whole."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from emu_embodied.models import autoencoder, strips
from emu_embodied.models.ibq import IBQ, IBQConfig
from emu_embodied.models.strips import Strips

REFERENCE = Path(__file__).parents[2] / ".." / "shared" / "emu35_reference" / "vq"
DEEP = IBQConfig(
    ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,), resolution=32, z_channels=8, embed_dim=6,
    n_embed=40, norm_groups=4,
)  # fmt: skip
FOLDED = replace(DEEP, ch_mult=(1, 1), attn_resolutions=(), patch=2)


def build(config: IBQConfig) -> IBQ:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ibq = IBQ(config).eval()
        torch.nn.init.normal_(ibq.codebook)
        for name, weight in ibq.named_parameters():
            if "norm" in name:  # ones and zeros would hide a norm that forgets them
                torch.nn.init.uniform_(weight, 0.5, 1.5)
    return ibq.double()  # in float32 both ways are about equally far from this


MODELS = {"deep": build(DEEP), "folded": build(FOLDED)}


def pixels(batch: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height + 97 * width)
    drawn = torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)
    # Brightness runs down the image, so that a strip's own statistics are nothing like the whole's.
    return (0.3 * drawn + torch.linspace(-1, 1, height)[:, None]).clamp(-1, 1)


def run(ibq: IBQ, frames: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors, codes and reconstruction at one chunk size."""
    ibq.chunk_pixels = chunk
    with torch.no_grad():
        codes = ibq.encode(frames)
        return ibq.vectors(frames), codes, ibq.decode(codes)


@pytest.fixture(autouse=True)
def _small_strips(monkeypatch):
    monkeypatch.setattr(strips, "_LEAST_ROWS", 2)
    monkeypatch.setattr(autoencoder, "_SCORES", 50)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    batch=st.integers(1, 2),
    height=st.integers(1, 16),
    width=st.integers(1, 9),
    chunk=st.integers(1, 400),
)
def test_strips_equal_the_whole_image(name, batch, height, width, chunk):
    frames = pixels(batch, 4 * height, 4 * width)
    whole, found = run(MODELS[name], frames, 1 << 30), run(MODELS[name], frames, chunk)
    for part, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(part, expected, atol=1e-9, rtol=1e-9)


class Largest(TorchDispatchMode):
    """Rows of what convolutions and sigmoids made at full resolution, and how many whole activations were made."""

    def __init__(self, width: int, height: int):
        super().__init__()
        self.width, self.height, self.rows, self.wholes = width, height, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 4 and out.shape[1] == 8 and out.shape[3] == self.width:
            if func in (
                torch.ops.aten.convolution.default,
                torch.ops.aten.silu.default,
                torch.ops.aten.addcmul.default,
            ):
                self.rows = max(self.rows, out.shape[2])
            self.wholes += out.shape[2] == self.height and func == torch.ops.aten.new_empty.default
        return out


def test_only_one_activation_of_the_full_resolution_is_ever_whole():
    ibq, frames = MODELS["deep"], pixels(1, 128, 16)
    ibq.chunk_pixels = 16 * 16
    for call, argument in ((ibq.encode, frames), (ibq.decode, torch.zeros(1, 32, 4, dtype=torch.long))):
        with Largest(16, 128) as seen:
            call(argument)
        assert 16 <= seen.rows <= 16 + 4  # a strip and its neighbours
        assert seen.wholes == 1


@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"{REFERENCE} holds the official outputs; absent")
@pytest.mark.parametrize("chunk", [1, 1000])
def test_strips_equal_the_official_code(chunk):
    reference = load_file(REFERENCE / "reference.safetensors")
    ibq = IBQ.from_pretrained(REFERENCE)
    ibq.chunk_pixels = chunk
    sure = reference["margin"] > 1e-4
    assert torch.equal(ibq.encode(reference["pixels"])[sure], reference["codes"][sure])
    torch.testing.assert_close(ibq.decode(reference["codes"]), reference["reconstruction"], atol=1e-4, rtol=0)


def test_training_ignores_the_chunk():
    ibq, frames = build(DEEP), pixels(1, 16, 16)
    expected = ibq(frames).reconstruction.detach()
    ibq.chunk_pixels = 16
    torch.testing.assert_close(ibq(frames).reconstruction, expected)
    ibq(frames).reconstruction.square().mean().backward()
    assert ibq.encoder.conv_in.weight.grad.any()


def test_what_is_computed_from_an_activation_may_be_written_over_it():
    x = pixels(1, 24, 4)
    weight = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    strip = Strips.of(x.clone(), 3 * 4 * 4)
    around = torch.nn.functional.conv2d(strip, weight, None, (1, 1), (1, 1))
    found = strips.hold(around + strip, over=strip)
    assert found.held is strip.held
    torch.testing.assert_close(found.whole(), torch.nn.functional.conv2d(x, weight, padding=1) + x)


@pytest.mark.parametrize(
    "shape, fault",
    [
        ((1, 3, 3, 8), "multiples of 4, the side of one code's cell, and at least one cell"),
        ((1, 3, 10, 8), "multiples of 4"),
        ((1, 4, 8, 8), r"expected \[B, 3, H, W\]"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape, fault):
    with pytest.raises(ValueError, match=fault):
        MODELS["deep"].encode(torch.zeros(shape))
