"""Official folders too large for the device: other formats, several devices, disk, adapters."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emu_embodied import require as requiring
from emu_embodied.models.cache import KVCache
from emu_embodied.models.loading import loading
from emu_embodied.models.transformer import EmuForCausalLM
from tests import official

IDS = torch.arange(151_600, 151_640).view(2, 20)


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"{', '.join(missing)} not installed: pip install 'emu-embodied[large,lora]'"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("official")
    official.write_backbone(path)
    return path


@pytest.fixture(scope="module")
def plain(folder) -> EmuForCausalLM:
    return EmuForCausalLM.from_pretrained(folder)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


@torch.no_grad()
def decoded(model: EmuForCausalLM) -> torch.Tensor:
    """Logits of some ids behind a cache, as our decoders compute them."""
    cache = KVCache(model.config, 2, 20, device=model.devices, dtype=model.dtype)
    embeds = model.embed(IDS.to(model.entry))
    model.core(embeds[:, :15], torch.arange(15, device=model.entry), None, cache)
    hidden = model.core(embeds[:, 15:], torch.arange(15, 20, device=model.entry), None, cache)
    return model.head(hidden, slice(151_854, 151_870))


def likeness(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Correlation of logits."""
    return torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1].item()


def test_bfloat16(folder, plain):
    model = EmuForCausalLM.from_pretrained(folder, **loading("cpu", "bf16"))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model), logits(plain), atol=0.1, rtol=0.1)
    assert decoded(model).shape == (2, 5, 16)


def test_as_stored_is_the_default(folder, plain):
    assert loading("cpu") == {"dtype": "auto"}
    model = EmuForCausalLM.from_pretrained(folder, **loading("cpu"))
    assert model.dtype == torch.float32 and torch.equal(logits(model), logits(plain))
    assert model.entry == torch.device("cpu") and model.devices == [torch.device("cpu")] * 2


@needs("accelerate")
@pytest.mark.parametrize(
    "places",
    [
        "auto",
        "cpu",
        {
            "model.embed_tokens": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
            "model.norm": "cpu",
            "lm_head": "cpu",
        },
        {"model": "disk", "lm_head": "disk"},
    ],
    ids=["auto", "cpu", "a layer on disk", "all on disk"],
)
def test_wherever_the_weights_are_logits_are_the_same(places, folder, plain, tmp_path):
    model = EmuForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    if isinstance(places, dict):
        assert next(model.model.layers[1].parameters()).is_meta
    assert torch.equal(logits(model), logits(plain))
    torch.testing.assert_close(decoded(model), decoded(plain), atol=1e-5, rtol=1e-5)


@needs("accelerate")
def test_offload_flags_spread_the_weights(folder, tmp_path):
    options = loading("cpu", offload=tmp_path)
    assert options == {"dtype": "auto", "device_map": "auto", "offload_folder": str(tmp_path)}


@needs("accelerate", "bitsandbytes")
@pytest.mark.parametrize(("bits", "kind", "least"), [("4bit", torch.uint8, 0.8), ("8bit", torch.int8, 0.98)])
def test_quantised_on_loading(bits, kind, least, folder, plain, tmp_path):
    model = EmuForCausalLM.from_pretrained(folder, **loading("cpu", "fp32", bits))
    layer = model.model.layers[0]
    assert layer.mlp.up_proj.weight.dtype == layer.self_attn.o_proj.weight.dtype == kind
    assert layer.mlp.up_proj.weight.numel() == 32 * 16 // (2 if bits == "4bit" else 1)
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.float32
    found, expected = logits(model), logits(plain)
    assert likeness(found[..., 151_854:], expected[..., 151_854:]) > least
    assert not torch.equal(found, expected)
    # LLM.int8 chooses its outlier columns from all tokens of a call, so a cache changes digits.
    assert likeness(decoded(model), found[:, 15:, 151_854:]) > 0.999
    model.save_pretrained(tmp_path / "small")
    again = EmuForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits(again), found, atol=1e-4, rtol=1e-4)
    assert again.model.layers[1].mlp.gate_proj.weight.dtype == kind


@needs("peft", "accelerate")
def test_lora_learns_and_comes_back(folder, plain, tmp_path):
    import peft

    model = EmuForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tuned = peft.get_peft_model(model, config)
    trained = [name for name, weight in tuned.named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    torch.testing.assert_close(logits(tuned), logits(plain))
    optimizer = torch.optim.Adam([weight for weight in tuned.parameters() if weight.requires_grad], lr=3e-3)
    losses = []
    for _ in range(4):
        loss = tuned.train()(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    tuned.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(EmuForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(tuned)) and not torch.allclose(logits(tuned), logits(plain))
    merged = again.merge_and_unload()
    assert isinstance(merged, EmuForCausalLM)
    torch.testing.assert_close(logits(merged), logits(tuned), atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(EmuForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        ({"quantize": "4bit"}, "bitsandbytes"),
        ({"device": "spread"}, "accelerate"),
        ({"offload": Path("o")}, "accelerate"),
    ],
)
def test_what_is_not_installed_is_named_with_its_pip_line(arguments, package, monkeypatch):
    def absent(name: str):
        if name == package:
            raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(requiring, "import_module", absent)
    with pytest.raises(ImportError, match=rf"{package} is not installed: pip install 'emu-embodied\[large\]'"):
        loading(**arguments)


def test_a_device_map_without_accelerate_is_one_line(folder, monkeypatch):
    def absent(name: str):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(requiring, "import_module", absent)
    with pytest.raises(ImportError, match=r"pip install 'emu-embodied\[large\]'"):
        EmuForCausalLM.from_pretrained(folder, device_map="auto")


def test_combinations_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="--quantize or --offload, not both"):
        loading(quantize="4bit", offload=Path("o"))
    with pytest.raises(ValueError, match="unknown dtype 'bf15'"):
        loading(dtype="bf15")


# -- damaged folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    target = tmp_path / "copy"
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_missing_shard_is_named(copy):
    (copy / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its shards, first model-00001-of-00003\.safetensors"):
        EmuForCausalLM.from_pretrained(copy)


def test_a_cut_shard_is_named(copy):
    path = copy / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model-00003-of-00003\.safetensors is cut off or damaged"):
        EmuForCausalLM.from_pretrained(copy)


def test_a_wrong_shape_is_named(copy):
    path = copy / "model-00003-of-00003.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(31, 16)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight has shape \[31, 16\], .* says \[32, 16\]"):
        EmuForCausalLM.from_pretrained(copy)


def test_an_index_that_promises_too_much_is_named(copy):
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.bias"] = "model-00003-of-00003.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"does not hold model\.norm\.bias"):
        EmuForCausalLM.from_pretrained(copy)


# -- caches of models on several devices -------------------------------------------------------------------------------


def test_a_cache_lies_where_the_layers_compute(plain):
    places = [torch.device("cpu"), torch.device("meta")]
    cache = KVCache(plain.config, 1, 8, device=places)
    assert cache.devices == places and [value.device for value in cache.values] == places
    assert cache.fork(4).devices == places and cache.rows(0, 1).devices == places
    assert KVCache(plain.config, 3, 4, prefix=cache).devices == places
