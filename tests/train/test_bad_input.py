"""What cannot be trained is refused at once, in one line that names it; what goes wrong keeps what was good."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from emu_embodied import presets
from emu_embodied.cli import main
from emu_embodied.data.episodes import DatasetSpec, EpisodeStore
from emu_embodied.records import Field
from emu_embodied.tokens.frames import IBQFrameTokenizer
from emu_embodied.train import adapt, loop, pretrain
from emu_embodied.train import tokenizer as tokenizer_stage
from emu_embodied.train.loop import LossOutput
from emu_embodied.train.tokenizer import TokenizerTraining
from tests import tiny

STAGES = ("tokenizer", "world", "dida")
SPEC = {
    "env_ids": ("Dot-v0",), "block": tiny.BLOCK, "action_dim": tiny.ACTIONS,
    "cameras": dict.fromkeys(tiny.CAMERAS, (tiny.SIZE, tiny.SIZE)), "proprio": tiny.FIELDS, "objects": tiny.OBJECTS,
}  # fmt: skip


@pytest.fixture(autouse=True)
def preset(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", tiny.PRESET)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A trained model to adapt, with its tokenizer."""
    folder = tmp_path / "model"
    tiny.make_world(paths=(), decoding="autoregressive").save_pretrained(folder)
    return folder


def dataset(folder: Path, episodes: int = 6, **changes) -> Path:
    """Dots, recorded with some other specification."""
    spec = DatasetSpec(**(SPEC | changes))
    store = EpisodeStore.create(folder, spec)
    for seed in range(episodes):
        episode = tiny.make_episode(seed, env_id=spec.env_ids[0])
        actions = np.zeros((len(episode), spec.block, spec.action_dim), np.float32)
        frames = {
            name: np.zeros((len(episode) + 1, *size, 3), np.uint8) + np.uint8(9 * seed)
            for name, size in spec.cameras.items()
        }
        store.append(
            replace(
                episode, actions_TKA=actions, rewards_TK=np.zeros(actions.shape[:2], np.float32), frames=frames,
                proprio_TP=np.zeros((len(episode) + 1, len(spec.proprio)), np.float32),
                objects_TO=np.zeros((len(episode) + 1, len(spec.objects)), np.float32),
            )
        )  # fmt: skip
    return folder


def train(stage: str, data: Path, out: Path, checkpoint: Path, *more: str) -> int:
    """Run a stage as people do."""
    flags = ["--preset", "tiny", "--data", str(data), "--out", str(out), "--steps", "4", "--device", "cpu", *more]
    if stage == "world":
        flags += ["--tokenizer", str(checkpoint / "tokenizer")]
    if stage == "dida":
        flags += ["--init", str(checkpoint)]
    return main(["train", stage, *flags])


def refused(capsys, *arguments) -> str:
    """The one line that a refused command ends in."""
    assert train(*arguments) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("emu-embodied: error:")]
    return line


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("episodes", "says"), [(0, "has no readable episode"), (1, "at least 2 are needed")])
def test_too_few_episodes(stage, episodes, says, tmp_path, checkpoint, capsys) -> None:
    line = refused(capsys, stage, dataset(tmp_path / "data", episodes), tmp_path / "out", checkpoint)
    assert says in line


@pytest.mark.parametrize("stage", STAGES)
def test_no_dataset(stage, tmp_path, checkpoint, capsys) -> None:
    line = refused(capsys, stage, tmp_path / "nothing", tmp_path / "out", checkpoint)
    assert "no dataset in" in line and "nothing" in line


@pytest.mark.parametrize("stage", STAGES)
def test_every_episode_damaged(stage, tmp_path, checkpoint, capsys) -> None:
    data = dataset(tmp_path / "data")
    for file in (data / "episodes").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert str(data) in refused(capsys, stage, data, tmp_path / "out", checkpoint)


FOREIGN = {
    "block": ({"block": 7}, ("world", "dida"), "7", "2"),
    "camera": ({"cameras": {"top": (8, 8)}}, STAGES, "top", "front"),
    "pixels": ({"cameras": dict.fromkeys(tiny.CAMERAS, (16, 16))}, STAGES, "16", "8"),
    "action": ({"action_dim": 5}, ("dida",), "5", "2"),
    "proprio": ({"proprio": (Field("joint", "rad", -3.0, 3.0),)}, ("dida",), "joint", "grip"),
}


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name, row in FOREIGN.items() for stage in row[1]])
def test_a_foreign_dataset_is_named_with_both_values(name, stage, tmp_path, checkpoint, capsys) -> None:
    changes, _, theirs, ours = FOREIGN[name]
    out = tmp_path / "out"
    line = refused(capsys, stage, dataset(tmp_path / "data", **changes), out, checkpoint)
    assert theirs in line.replace(str(tmp_path), "") and ours in line.replace(str(tmp_path), "")
    assert not (out / "training").exists()


@pytest.mark.parametrize("stage", ["world", "dida"])
def test_divergence_keeps_the_last_good_checkpoint(stage, tmp_path, checkpoint, monkeypatch, capsys) -> None:
    """The loss explodes after step 12 of which every fourth is saved: what is in the folder is that of step 12."""
    data = tiny.make_store(tmp_path / "data").folder
    short = replace(tiny.TRAINING.loop, save_every=4, divergence_patience=6, warmup_steps=1)
    monkeypatch.setattr(pretrain, "LoopConfig", lambda **_: short)
    module, name = (pretrain, "next_token_loss") if stage == "world" else (adapt, "dida_loss")
    real, steps, good = getattr(module, name), [], {}

    def explodes(world, *arguments):
        found = real(world, *arguments)
        steps.append(found)
        if len(steps) == 13:
            good.update({key: value.clone() for key, value in load_file(tmp_path / "out/model.safetensors").items()})
        return found if len(steps) <= 12 else LossOutput(found.loss * 1e4, found.logs, found.items)

    monkeypatch.setattr(module, name, explodes)
    line = refused(
        capsys, stage, data, tmp_path / "out", checkpoint, "--steps", "40", "--batch", "4", "--subgoal-share", "0"
    )
    assert "the loss diverged" in line and "last good state is kept" in line
    kept = load_file(tmp_path / "out/model.safetensors")
    assert good and all(torch.equal(kept[key], value) for key, value in good.items())
    assert json.loads((tmp_path / "out/training" / stage / "state.json").read_text())["step"] == 12


def test_an_interrupted_tokenizer_says_so_and_is_on_record(tmp_path, checkpoint, monkeypatch, capsys) -> None:
    data = tiny.make_store(tmp_path / "data").folder
    real = tokenizer_stage.TokenizerTrainer.loss

    def interrupted(self, step, generator):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, step, generator)

    monkeypatch.setattr(tokenizer_stage.TokenizerTrainer, "loss", interrupted)
    small = TokenizerTraining(
        loop=replace(tiny.TRAINING.loop, steps=30), batch=4, warmup_plain=2, held_out=0.25, revive_every=3
    )
    monkeypatch.setattr(tokenizer_stage, "TokenizerTraining", lambda: small)
    out = tmp_path / "out"
    assert train("tokenizer", data, out, checkpoint, "--steps", "30") == 130
    assert "--resume" in capsys.readouterr().out
    entry = json.loads((out / "meta.json").read_text())["tokenizer"]
    assert entry["extra"]["stopped"] == "signal" and entry["extra"]["steps"] == 6
    assert entry["data_hash"] == EpisodeStore.open(data).data_hash and entry["extra"]["env_ids"] == ["Dot-v0"]
    monkeypatch.setattr(tokenizer_stage.TokenizerTrainer, "loss", real)
    assert train("tokenizer", data, out, checkpoint, "--steps", "30", "--resume") == 0
    entry = json.loads((out / "meta.json").read_text())["tokenizer"]
    assert entry["extra"]["stopped"] == "steps" and entry["extra"]["steps"] == 30
    IBQFrameTokenizer.from_pretrained(out / "tokenizer")
    assert loop.has_state(out / "training" / "tokenizer")
