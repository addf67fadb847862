"""World-model checkpoints as files: what is written is what is read, and what is damaged or foreign is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from emu_embodied import world_config
from emu_embodied.records import Imagination
from emu_embodied.world_config import WorldModelConfig, checkpoint_folder
from emu_embodied.world_model import WorldModel
from tests import tiny

EPISODE = tiny.make_episode(3, blocks=6)
SEEN = [tiny.observation(EPISODE, t) for t in range(7)]
DONE = list(EPISODE.actions_TKA)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bytes_of(imagination: Imagination) -> list[bytes]:
    names = ("tokens_SHN", "proprio_SHP", "reward_SH", "success_SH")
    return [getattr(imagination, name).numpy().tobytes() for name in names]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny.make_world(seed=4).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_a_saved_model_imagines_the_same_bytes(saved):
    world, again = tiny.make_world(seed=4), WorldModel.from_pretrained(saved)
    assert again.config == world.config
    actions = tiny.plans(3, 5)
    found = again.imagine(again.observe(SEEN[:2], DONE[:1]), actions, generator(1))
    assert bytes_of(found) == bytes_of(world.imagine(world.observe(SEEN[:2], DONE[:1]), actions, generator(1)))
    rendered, expected = (model.render(found, [0], [0])["wrist"] for model in (again, world))
    assert np.array_equal(rendered, expected)
    assert not [path for path in saved.rglob("*") if path.name.startswith(".")]


FILES = ["world.json", "config.json", "model.safetensors", "tokenizer/config.json", "tokenizer/model.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "empty"])
def test_damaged_files_are_named(copied, name, damage):
    path = copied / name
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    elif damage == "empty":
        path.write_bytes(b"")
    elif name.endswith(".json"):
        path.write_text('{"model_type": "llama", "hidden_size": 8}')
    else:
        save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(ValueError) as caught:
        WorldModel.from_pretrained(copied)
    message = str(caught.value)
    assert str(path.parent if damage == "missing" else copied) in message and "\n" not in message
    # A missing or foreign file of weights may be named by its folder and the tensor that it lacks.
    assert path.name in message or "lacks the tensor" in message


def test_a_missing_tokenizer_folder_is_named(copied):
    shutil.rmtree(copied / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer"):
        WorldModel.from_pretrained(copied)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("state_bins", 17, "backbone has 310 ids, world.json lays out 311"),
        ("block", 3, r"action blocks of \(2, 2\), world.json names \(3, 2\)"),
        ("image_size", 16, "8-px frames, world.json names 4 of 12 from 16 px"),
        ("camera_tokens", 9, "makes 4 tokens"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(copied, field, value, message):
    content = json.loads((copied / "world.json").read_text())
    (copied / "world.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(ValueError, match=f"do not belong together: .*{message}"):
        WorldModel.from_pretrained(copied)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block", 0), ("block", "5"), ("max_states", 2), ("context_states", 0), ("passes", 0), ("decoding", "greedy"),
        ("paths", ["uniforn"]), ("temperature", -1), ("cameras", []), ("proprio", [{"name": "x"}]), ("colour", 1),
    ],
)  # fmt: skip
def test_impossible_settings_are_named(copied, field, value):
    content = json.loads((copied / "world.json").read_text())
    (copied / "world.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(ValueError, match=r"world\.json does not describe a world model") as caught:
        WorldModelConfig.load(copied / "world.json")
    assert {"cameras": "camera", "proprio": "Field", "paths": "noise process"}.get(field, field) in str(caught.value)


def test_half_precision_weights_are_read_as_float32(copied):
    weights = load_file(copied / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in weights.items()}, copied / "model.safetensors", {"format": "pt"})
    world = WorldModel.from_pretrained(copied)
    assert world.backbone.lm_head.weight.dtype == torch.float32
    world.imagine(world.observe(SEEN[:1]), tiny.plans(1, 1), generator())


def test_shipped_names_folders_and_unknown_names(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "weights" / "nano")
    monkeypatch.setattr(world_config, "WEIGHTS", tmp_path / "weights")
    assert world_config.shipped() == ("nano",)
    assert checkpoint_folder("nano") == tmp_path / "weights" / "nano"
    assert checkpoint_folder(saved) == saved
    with pytest.raises(ValueError, match=r"no checkpoint 'naon': .* did you mean 'nano'\?"):
        WorldModel.from_pretrained("naon")
