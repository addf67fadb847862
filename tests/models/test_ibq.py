from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emu_embodied.models.ibq import IBQ, IBQConfig, code_usage, to_frames, to_pixels

REFERENCE = Path(__file__).parents[2] / ".." / "shared" / "emu35_reference" / "vq"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"{REFERENCE} holds the official outputs; absent")
TINY = IBQConfig(
    ch=8,
    ch_mult=(1, 2, 2),
    num_res_blocks=1,
    attn_resolutions=(8,),
    resolution=32,
    z_channels=8,
    embed_dim=6,
    n_embed=40,
    norm_groups=4,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(config: IBQConfig = TINY, seed: int = 0) -> IBQ:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ibq = IBQ(config).eval()
        torch.nn.init.normal_(ibq.codebook)
    return ibq


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=seeded(seed)) * 2 - 1


@needs_reference
def test_codes_and_reconstruction_equal_the_official_code():
    reference = load_file(REFERENCE / "reference.safetensors")
    ibq = IBQ.from_pretrained(REFERENCE)
    sure = reference["margin"] > 1e-4
    assert sure.float().mean() > 0.9
    assert torch.equal(ibq.encode(reference["pixels"])[sure], reference["codes"][sure])
    found = ibq.decode(reference["codes"])
    torch.testing.assert_close(found, reference["reconstruction"], atol=1e-4, rtol=0)


@needs_reference
def test_official_folder_becomes_ours(tmp_path):
    reference = load_file(REFERENCE / "reference.safetensors")
    IBQ.from_pretrained(REFERENCE).save_pretrained(tmp_path)
    found = IBQ.from_pretrained(tmp_path).decode(reference["codes"])
    torch.testing.assert_close(found, reference["reconstruction"], atol=1e-4, rtol=0)


def test_the_released_size_has_its_keys_and_455_million_parameters():
    with torch.device("meta"):
        ibq = IBQ(IBQConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in ibq.state_dict().items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == 455_336_963
    assert shapes["quantize.embedding.weight"] == (131_072, 256)
    assert shapes["encoder.conv_in.weight"] == (256, 3, 3, 3)
    assert [name for name in shapes if "nin_shortcut.weight" in name] == [
        "encoder.down.2.block.0.nin_shortcut.weight",
        "encoder.down.4.block.0.nin_shortcut.weight",
        "decoder.up.1.block.0.nin_shortcut.weight",
        "decoder.up.3.block.0.nin_shortcut.weight",
    ]
    attention = {name.rsplit(".", 2)[0] for name in shapes if ".attn." in name}
    expected = {f"encoder.down.4.attn.{index}" for index in range(4)} | {
        f"decoder.up.4.attn.{index}" for index in range(5)
    }
    assert attention == expected
    sampling = {name.removesuffix(".conv.weight") for name in shapes if name.endswith("sample.conv.weight")}
    assert sampling == {f"encoder.down.{level}.downsample" for level in range(4)} | {
        f"decoder.up.{level}.upsample" for level in range(1, 5)
    }
    for name in ("norm", "q", "k", "v", "proj_out"):
        assert f"decoder.mid.attn_1.{name}.weight" in shapes


def test_chunks_change_nothing():
    ibq = build()
    frames = pixels(7, 3, 16, 32)
    codes, vectors = ibq.encode(frames), ibq.vectors(frames)
    assert codes.shape == (7, 4, 8) and codes.dtype == torch.int64
    assert torch.equal(codes, (vectors @ ibq.codebook.T).argmax(-1))
    together = ibq.decode(codes)
    ibq.chunk_pixels = 16 * 32 * 2
    assert torch.equal(ibq.encode(frames), codes)
    torch.testing.assert_close(ibq.decode(codes), together, atol=1e-5, rtol=1e-5)
    assert torch.equal(ibq.quantize.nearest(vectors.reshape(-1, 6), chunk=100), codes.flatten())


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_folded_pixels_keep_the_cell(patch):
    levels = {1: (1, 1, 1), 2: (1, 1), 4: (1,)}[patch]
    config = replace(TINY, ch_mult=levels, attn_resolutions=(), patch=patch)
    ibq = build(config)
    assert config.cell == 4
    assert ibq.encode(pixels(2, 3, 8, 12)).shape == (2, 2, 3)
    assert ibq(pixels(2, 3, 8, 12)).reconstruction.shape == (2, 3, 8, 12)


def test_training_forward_is_the_formula_written_out():
    """IBQ: (onehot - sg(soft) + soft) @ codebook, its three losses and entropies, and their gradients."""
    ibq = build()
    frames = pixels(2, 3, 16, 16)
    found = ibq(frames)
    ours = found.reconstruction.square().mean() + found.quantise_loss + found.entropy_loss
    gradients = torch.autograd.grad(ours, list(ibq.parameters()))

    vectors = ibq.vectors(frames)
    z, book = vectors.reshape(-1, 6), ibq.codebook
    soft = (z @ book.T).softmax(1)
    hard = torch.nn.functional.one_hot((z @ book.T).argmax(1), 40).float()
    quantised, chosen = (hard - soft.detach() + soft) @ book, hard @ book
    quantise_loss = (
        (quantised - z).square().mean()
        + (chosen.detach() - z).square().mean()
        + 0.25 * (chosen - z.detach()).square().mean()
    )
    sharp = torch.distributions.Categorical(logits=z @ book.T / 0.01)
    mean = sharp.probs.mean(0)
    entropy_loss = sharp.entropy().mean() + torch.special.xlogy(mean, mean + 1e-10).sum()
    reconstruction = ibq.paint(quantised.view(vectors.shape))
    expected = reconstruction.square().mean() + quantise_loss + entropy_loss
    torch.testing.assert_close(found.reconstruction, reconstruction, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.quantise_loss, quantise_loss)
    torch.testing.assert_close(found.entropy_loss, entropy_loss, atol=1e-4, rtol=1e-4)
    for one, two in zip(gradients, torch.autograd.grad(expected, list(ibq.parameters())), strict=True):
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)
    assert torch.equal(found.codes, ibq.encode(frames)) and not found.vectors.requires_grad


def test_every_code_gets_a_gradient():
    ibq = build()
    ibq(pixels(2, 3, 16, 16)).reconstruction.square().mean().backward()
    assert ibq.codebook.grad.any(1).all()


def test_a_started_codebook_is_used_and_keeps_the_autoencoder():
    ibq = build()
    frames = pixels(16, 3, 16, 16)
    before = ibq.plain(frames)
    ibq.initialise_codebook(ibq.vectors(frames), seeded(1))
    vectors = ibq.vectors(frames).reshape(-1, 6)
    torch.testing.assert_close(vectors.norm(dim=1).mean(), torch.tensor(6**0.5), atol=1e-4, rtol=0)
    norms = ibq.codebook.norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 6**0.5))
    nearest = torch.nn.functional.cosine_similarity(vectors[:, None], ibq.codebook[None], dim=2).argmax(1)
    assert torch.equal(ibq.quantize.nearest(vectors), nearest)
    torch.testing.assert_close(ibq.plain(frames), before, atol=1e-4, rtol=1e-4)
    assert code_usage(ibq.encode(frames), 40).used > 0.9


def test_plain_reconstruction_sees_directions_only():
    ibq = build()
    frames = pixels(2, 3, 16, 16)
    before = ibq.plain(frames)
    with torch.no_grad():
        ibq.quant_conv.weight.mul_(3)
        ibq.quant_conv.bias.mul_(3)
    torch.testing.assert_close(ibq.plain(frames), before, atol=1e-5, rtol=1e-5)


def test_starting_a_codebook_is_repeatable_also_from_few_vectors():
    books = []
    for _ in range(2):
        ibq = build()
        ibq.initialise_codebook(ibq.vectors(pixels(1, 3, 16, 16)), seeded(1))  # 16 vectors for 40 codes
        books.append(ibq.codebook.clone())
    assert torch.equal(*books)
    assert len(torch.unique(books[0], dim=0)) == 40


def test_revived_codes_are_chosen_again():
    ibq = build()
    with torch.no_grad():
        ibq.codebook[10:] = 0.0
        ibq.codebook[10:, 0] = -1e-3
    frames = pixels(16, 3, 16, 16)
    vectors = ibq.vectors(frames)
    before = code_usage(ibq.encode(frames), 40)
    kept = ibq.codebook[:10].clone()
    unused = before.counts == 0
    assert ibq.revive(unused, vectors, seeded(0)) == int(unused.sum()) >= 30 - 1
    after = code_usage(ibq.encode(frames), 40)
    assert after.used > before.used and after.perplexity > before.perplexity
    assert torch.equal(ibq.codebook[:10][before.counts[:10] > 0], kept[before.counts[:10] > 0])
    assert ibq.revive(torch.tensor([3, 5]), vectors, seeded(0)) == 2
    assert ibq.revive(torch.zeros(40, dtype=torch.bool), vectors, seeded(0)) == 0


def test_usage():
    usage = code_usage(torch.tensor([[0, 0], [3, 3]]), 8)
    assert usage.counts.tolist() == [2, 0, 0, 2, 0, 0, 0, 0]
    assert usage.used == 0.25 and usage.perplexity == pytest.approx(2.0)


def test_pixels_and_frames():
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    values = to_pixels(frames)
    assert values.shape == (1, 3, 16, 16) and values.min() == -1.0 and values.max() == 1.0
    assert (to_frames(values).int() - frames.int()).abs().max() <= 1  # cut, not rounded
    assert to_frames(torch.tensor([-3.0, 3.0, 0.999]).view(1, 3, 1, 1)).flatten().tolist() == [0, 255, 254]


@pytest.mark.parametrize("shape", [(1, 3, 18, 16), (1, 3, 0, 16), (3, 16, 16)])
def test_frames_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 4"):
        build().encode(torch.zeros(shape))


def test_codes_outside_the_codebook_are_refused():
    with pytest.raises(ValueError, match=r"lie in \[0, 40\], but the codebook holds 40"):
        build().decode(torch.tensor([[[0, 40]]]))


def test_groups_must_divide_widths():
    with pytest.raises(ValueError, match=r"norm_groups 32 does not divide the widths \[24\]"):
        IBQConfig(ch=24, ch_mult=(1,))


# -- folders ---------------------------------------------------------------------------------------------------------


def ours(folder: Path) -> None:
    build().save_pretrained(folder)


def official_ckpt(folder: Path) -> None:
    torch.save(build().state_dict(), folder / "model.ckpt")
    (folder / "config.yaml").write_text(
        "ddconfig:\n  attn_resolutions: [8]\n  ch: 8\n  ch_mult: [1, 2, 2]\n  double_z: false\n  dropout: 0.0\n"
        "  in_channels: 3\n  num_res_blocks: 1\n  out_ch: 3\n  resolution: 32\n  z_channels: 8\n  norm_groups: 4\n"
        "embed_dim: 6\nn_embed: 40\n"
    )


def official_safetensors(folder: Path) -> None:
    build().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "Emu3p5VisionVQ",
        "codebook_size": config.pop("n_embed"),
        "out_channels": config.pop("out_ch"),
    }
    (folder / "config.json").write_text(json.dumps({**config, "dropout": 0.0, "torch_dtype": "float32"}))


@pytest.mark.parametrize("write", [ours, official_ckpt, official_safetensors])
def test_every_kind_of_folder_loads(write, tmp_path):
    if write is official_ckpt:
        pytest.importorskip("yaml")
    write(tmp_path)
    frames = pixels(2, 3, 16, 16)
    expected, ibq = build(), IBQ.from_pretrained(tmp_path)
    assert ibq.config == TINY and not ibq.training
    codes = expected.encode(frames)
    assert torch.equal(ibq.encode(frames), codes)
    torch.testing.assert_close(ibq.decode(codes), expected.decode(codes), atol=1e-5, rtol=1e-5)


def test_training_parts_of_a_checkpoint_are_left_out(tmp_path):
    pytest.importorskip("yaml")
    official_ckpt(tmp_path)
    state = {**build().state_dict(), "loss.discriminator.weight": torch.ones(2)}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    assert IBQ.from_pretrained(tmp_path).config == TINY


def cut(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-200])


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def write_text(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def change(**changes):
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


class Boom:
    def __reduce__(self):
        return (print, ("a pickle was run",))


@pytest.mark.parametrize(
    "write, damage, fault",
    [
        (ours, remove("model.safetensors"), "holds no weights"),
        (ours, remove("config.json"), "config.json is missing"),
        (ours, cut("model.safetensors"), "model.safetensors is cut off"),
        (ours, write_text("model.safetensors", "no"), "model.safetensors is not a safetensors file"),
        (ours, change(n_embed=41), r"quantize.embedding.weight has shape \[40, 6\], the configuration says \[41, 6\]"),
        (ours, change(model_type="Emu3"), "config.json describes a 'Emu3', not a vision tokenizer"),
        (ours, change(double_z=True), "double_z is set"),
        (ours, change(ch="wide"), "config.json"),
        (ours, write_text("config.json", "{}"), "config.json lacks ch, ch_mult"),
        (ours, write_text("config.json", "{"), "config.json is not JSON"),
        (official_ckpt, remove("model.ckpt"), "holds no weights"),
        (official_ckpt, cut("model.ckpt"), "model.ckpt cannot be read"),
        (official_ckpt, write_text("config.yaml", "a: [1"), "config.yaml is not a vision tokenizer's"),
        (official_ckpt, write_text("config.yaml", "a: 1"), "config.yaml is not a vision tokenizer's"),
        (official_ckpt, lambda folder: torch.save(Boom(), folder / "model.ckpt"), "model.ckpt cannot be read"),
        (official_ckpt, lambda folder: torch.save([1], folder / "model.ckpt"), "model.ckpt is not a state dict"),
        (official_ckpt, lambda folder: torch.save({"a": torch.ones(1)}, folder / "model.ckpt"), "lacks the tensor"),
    ],
)
def test_a_damaged_folder_is_named(write, damage, fault, tmp_path, capsys):
    if write is official_ckpt:
        pytest.importorskip("yaml")
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=fault) as caught:
        IBQ.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "a pickle was run" not in capsys.readouterr().out


def test_foreign_weights_are_named(tmp_path):
    ours(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "extra.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"model.safetensors holds 1 tensors this model does not have, first extra.weight"
    ):
        IBQ.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        IBQ.from_pretrained(tmp_path / "nowhere")
