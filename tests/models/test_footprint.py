"""Memory estimates: what the files promise, what a machine has, and which way is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emu_embodied.doctor import examine_checkpoint
from emu_embodied.hardware import Accelerator, Hardware
from emu_embodied.models.cache import KVCache
from emu_embodied.models.footprint import describe, footprint, ways
from emu_embodied.models.ibq import IBQ
from emu_embodied.models.transformer import EmuForCausalLM
from tests import official


def machine(*gpu_gb: float, memory_gb: float = 64.0) -> Hardware:
    devices = tuple(
        Accelerator(device=f"cuda:{i}", name="GPU", memory_gb=gb, capability="9.0") for i, gb in enumerate(gpu_gb)
    )
    return Hardware(
        system="Linux", cpu="CPU", cores=8, memory_gb=memory_gb, bf16_units=None, torch_threads=8, accelerators=devices
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    official.write_backbone(folder)
    official.write_vision(folder / "vision")
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The released shape, from its configuration alone."""
    folder = tmp_path_factory.mktemp("released") / "emu"
    folder.mkdir()
    content = {"model_type": "Emu3", "vocab_size": 282_926, "hidden_size": 5120, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(content))
    return footprint(folder)


def test_sizes_are_those_of_the_loaded_parts(tiny):
    need = footprint(tiny)
    model = EmuForCausalLM.from_pretrained(tiny)
    numbers = sum(weight.numel() for weight in model.parameters())
    assert need.parameters == numbers and need.stored_as == "F32" and need.problem is None
    held = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert need.weights_gb["stored"] == need.weights_gb["float32"] == held / 1e9
    cache = KVCache(model.config, 1, 1024, dtype=torch.bfloat16)
    assert need.kv_gb_per_1k * 1.024 == pytest.approx(
        sum(t.numel() * t.element_size() for t in (*cache.keys, *cache.values)) / 1e9
    )
    vision = IBQ.from_pretrained(tiny / "vision")
    assert need.vision_gb == sum(weight.numel() * 4 for weight in vision.parameters()) / 1e9


def test_formats_are_read_from_the_headers(tiny, tmp_path):
    EmuForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(tmp_path / "half" / "model")
    need = footprint(tmp_path / "half")  # the backbone in a subfolder
    assert need.stored_as == "BF16" and need.weights_gb["stored"] == need.weights_gb["bfloat16"]


def test_a_missing_shard_is_named_and_sizes_still_known(tiny, tmp_path):
    official.write_backbone(tmp_path / "model")
    (tmp_path / "model" / "model-00002-of-00003.safetensors").unlink()
    need = footprint(tmp_path / "model")
    assert need.problem and "lacks 1 of its shards, first model-00002-of-00003.safetensors" in need.problem
    assert need.weights_gb == pytest.approx(footprint(tiny).weights_gb)
    assert need.problem in describe(need, ways(need, machine()))


def test_the_released_model_is_as_its_makers_say(released):
    assert round(released.parameters / 1e9, 2) == 34.10
    assert released.weights_gb["bfloat16"] == pytest.approx(68.2, abs=0.05)
    assert 36 < released.weights_gb["8bit"] < 38 and 21 < released.weights_gb["4bit"] < 23
    assert released.kv_gb_per_1k == pytest.approx(64 * 2 * 8 * 128 * 2 * 1000 / 1e9)


@pytest.mark.parametrize(
    ("hardware", "best"),
    [
        (machine(85.0), "--device cuda:0"),  # one 80-GB GPU for an image, as the makers say
        (machine(42.0, 42.0), "--device spread"),
        (machine(48.0), "--device cuda:0 --quantize 8bit"),
        (machine(34.0), "--device cuda:0 --quantize 4bit"),
        (machine(memory_gb=128.0), "--device cpu"),
        (machine(16.0, memory_gb=80.0), "--device spread"),
        (machine(memory_gb=32.0), "--device cpu --quantize 4bit"),
        (machine(memory_gb=16.0), "--offload FOLDER"),
        (machine(memory_gb=4.0), None),
    ],
)
def test_the_best_way_is_named(released, hardware, best):
    found = ways(released, hardware)
    works = [way.flags for way in found if way.works]
    assert (works[0] if works else None) == best
    assert f"-> {best or 'nothing fits here'}" in describe(released, found).splitlines()


def test_room_is_what_is_left(released):
    (way,) = [way for way in ways(released, machine(85.0)) if way.flags == "--device cuda:0"]
    held = way.weights_gb + way.context * 2 * released.kv_gb_per_1k / 1000
    assert 0.9 * 85 < held < 85
    need = replace(released, vision_gb=5.0)
    assert next(w for w in ways(need, machine(85.0)) if w.flags == way.flags).context < way.context


def test_doctor_knows_shipped_names_and_refuses_others(tiny):
    estimate = examine_checkpoint("nano", machine())
    assert estimate.fits and estimate.need.name == "nano" and json.dumps(estimate.to_dict())
    assert "1.10 M parameters" in estimate.text()
    with pytest.raises(ValueError, match="did you mean 'nano'"):
        examine_checkpoint("naon")
    with pytest.raises(ValueError, match=r"the backbone .* was not found"):
        examine_checkpoint(str(tiny / "vision"))
