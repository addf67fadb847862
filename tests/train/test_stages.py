"""Stages ``world`` and ``dida`` from a dataset to a checkpoint that decodes both ways, at toy size."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emu_embodied.data.batches import encode_dataset
from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.decode.paths import PATHS
from emu_embodied.train import adapt, pretrain
from emu_embodied.train.adapt import train_dida
from emu_embodied.train.evaluation import Judge
from emu_embodied.train.pretrain import prepare_data, train_world
from emu_embodied.world_config import WorldModelConfig
from emu_embodied.world_model import WorldModel
from tests import tiny

EPISODE = tiny.make_episode(50)


class Kill(Exception):
    pass


def short(steps: int, save_every: int):
    loop = replace(tiny.TRAINING.loop, steps=steps, save_every=save_every, log_every=1)
    return replace(tiny.TRAINING, loop=loop)


def losses(out: Path, stage: str) -> list[float]:
    lines = [json.loads(line) for line in (out / f"train_{stage}.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> EpisodeStore:
    return tiny.make_store(tmp_path_factory.mktemp("store") / "data")


@pytest.fixture(scope="module")
def world_out(store, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world") / "out"
    train_world(store, tiny.PRESET, tiny.make_tokenizer(), tiny.TRAINING, out, resume=False)
    return out


@pytest.fixture(scope="module")
def dida_out(store, world_out, tmp_path_factory) -> Path:
    out = Path(shutil.copytree(world_out, tmp_path_factory.mktemp("dida") / "out"))
    train_dida(store, WorldModel.from_pretrained(out), tiny.TRAINING, out, resume=False)
    return out


def imagine(world: WorldModel) -> torch.Tensor:
    belief = world.observe([tiny.observation(EPISODE, 0)])
    found = world.imagine(belief, tiny.plans(2, 4), torch.Generator().manual_seed(0))
    assert bool(found.reward_SH.isfinite().all())
    return found.tokens_SHN


def test_both_losses_fall(world_out, dida_out):
    for out, stage in ((world_out, "world"), (dida_out, "dida")):
        found = losses(out, stage)
        assert found[-1] < 0.95 * found[0], (stage, found)


def test_the_checkpoint_says_what_it_is_for_and_where_it_comes_from(store, world_out, dida_out):
    config = WorldModelConfig.load(world_out / "world.json")
    assert (config.data_hash, config.env_ids, config.paths) == (store.data_hash, ("Dot-v0",), ())
    assert (config.block, config.action_dim, config.cameras) == (tiny.BLOCK, tiny.ACTIONS, tiny.CAMERAS)
    assert [field.name for field in config.proprio] == ["x", "y", "grip"]
    meta = json.loads((dida_out / "meta.json").read_text())
    assert set(meta) == {"world", "dida"}
    for stage in meta.values():
        assert stage["data_hash"] == store.data_hash and stage["extra"]["steps"] == tiny.TRAINING.loop.steps
        assert {"torch", "python"} <= stage["versions"].keys() and "eval/token_accuracy" in stage["extra"]["figures"]


def test_one_checkpoint_decodes_both_ways(world_out, dida_out):
    raw, adapted = WorldModel.from_pretrained(world_out), WorldModel.from_pretrained(dida_out)
    assert raw.config.decoding == "autoregressive" and imagine(raw).shape == (2, 4, 8)
    assert adapted.config == replace(raw.config, decoding="dida", paths=("uniform",))
    one_by_one = imagine(adapted.with_decoding("autoregressive"))
    for passes in (1, 2):
        assert imagine(adapted.with_decoding("dida", passes=passes)).shape == one_by_one.shape
    assert not torch.equal(raw.backbone.lm_head.weight, adapted.backbone.lm_head.weight)


def test_an_adapted_model_is_adapted_further_with_several_paths_into_another_folder(store, dida_out, tmp_path):
    out = tmp_path / "all"
    before = (dida_out / "model.safetensors").read_bytes()
    start = WorldModel.from_pretrained(dida_out)
    train_dida(store, start, short(4, 2), out, resume=False, paths=tuple(PATHS))
    world = WorldModel.from_pretrained(out)
    assert world.config.paths == tuple(PATHS) and (dida_out / "model.safetensors").read_bytes() == before
    for name in PATHS:
        assert imagine(world.with_decoding("dida", path=name)).shape == (2, 4, 8)
    figures = json.loads((out / "meta.json").read_text())["dida"]["extra"]["figures"]
    assert {f"eval/changed_token_accuracy/{name}" for name in ("metric", "state_coupled", "mask")} <= figures.keys()
    with pytest.raises(ValueError, match="was trained with path = "):
        train_dida(store, world, short(6, 2), out, resume=True, paths=("mask",))
    train_dida(store, world, short(6, 2), out, resume=True, paths=tuple(PATHS))
    for paths, message in ((("mask", "mask"), "each once"), ((), "at least one"), (("masc",), "did you mean 'mask'")):
        with pytest.raises(ValueError, match=message):
            train_dida(store, start, short(4, 2), tmp_path / "other", resume=False, paths=paths)
    assert not (tmp_path / "other").exists()


def test_saved_weights_are_the_averaged_ones(world_out):
    (state,) = (world_out / "training/world").glob("*.safetensors")
    tensors, saved = load_file(state), load_file(world_out / "model.safetensors")
    assert saved.keys() == {name.removeprefix("average.") for name in tensors if name.startswith("average.")}
    assert all(torch.equal(saved[name], tensors[f"average.{name}"]) for name in saved)


def state_of(out: Path, stage: str) -> tuple[dict, dict[str, torch.Tensor]]:
    content = json.loads((out / "training" / stage / "state.json").read_text())
    content.pop("seconds")
    return content, load_file(out / "training" / stage / content["file"])


def assert_equal_states(first: Path, second: Path, stage: str) -> None:
    content, tensors = state_of(first, stage)
    again, same = state_of(second, stage)
    assert content == again and tensors.keys() == same.keys()
    assert all(torch.equal(tensors[name], same[name]) for name in tensors)


def killing(module, name: str, call: int):
    original, calls = getattr(module, name), [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise Kill
        return original(*args, **kwargs)

    return wrapped


def test_a_killed_world_stage_resumes_bit_by_bit(store, tmp_path, monkeypatch):
    def run(out: Path, resume: bool):
        train_world(store, tiny.PRESET, tiny.make_tokenizer(), short(6, 2), out, resume=resume)

    run(tmp_path / "whole", False)
    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(pretrain, "window_tokens", killing(pretrain, "window_tokens", 6))
        run(tmp_path / "cut", False)
    assert state_of(tmp_path / "cut", "world")[0]["step"] == 4
    run(tmp_path / "cut", True)
    assert_equal_states(tmp_path / "whole", tmp_path / "cut", "world")
    assert losses(tmp_path / "whole", "world") == losses(tmp_path / "cut", "world")


def test_a_killed_dida_stage_resumes_bit_by_bit_in_the_folder_it_adapts(store, world_out, tmp_path, monkeypatch):
    def run(out: Path, resume: bool):
        train_dida(store, WorldModel.from_pretrained(out), short(6, 2), out, resume=resume)

    for name in ("whole", "cut"):
        shutil.copytree(world_out, tmp_path / name)
    run(tmp_path / "whole", False)
    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(adapt, "dida_loss", killing(adapt, "dida_loss", 6))
        run(tmp_path / "cut", False)
    assert WorldModelConfig.load(tmp_path / "cut" / "world.json").paths == ("uniform",)
    run(tmp_path / "cut", True)
    assert_equal_states(tmp_path / "whole", tmp_path / "cut", "dida")


def test_a_model_that_is_there_is_resumed_or_refused(store, world_out, dida_out, tmp_path):
    def world_stage(out: Path, resume: bool):
        train_world(store, tiny.PRESET, tiny.make_tokenizer(), tiny.TRAINING, out, resume=resume)

    with pytest.raises(ValueError, match="pass --resume to continue it, or another --out"):
        world_stage(world_out, False)
    with pytest.raises(ValueError, match="adapted world model, which this stage would undo"):
        world_stage(dida_out, True)
    with pytest.raises(ValueError, match="adapted world model: pass --resume"):
        train_dida(store, WorldModel.from_pretrained(dida_out), tiny.TRAINING, dida_out, resume=False)
    bare = Path(shutil.copytree(world_out, tmp_path / "bare"))
    shutil.rmtree(bare / "training")
    before = (bare / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="without the state of its training"):
        world_stage(bare, True)
    assert (bare / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("changes", [True, False])
def test_a_new_model_reads_its_numbers_as_it_is_asked_to(store, tmp_path, changes):
    training = replace(tiny.TRAINING, changes=changes, loop=replace(tiny.TRAINING.loop, steps=1, warmup_steps=0))
    train_world(store, tiny.PRESET, tiny.make_tokenizer(), training, tmp_path, resume=False)
    assert WorldModel.from_pretrained(tmp_path).layout.changes is changes


def test_another_tokenizer_cannot_resume(store, world_out, tmp_path):
    out = Path(shutil.copytree(world_out, tmp_path / "out"))
    with pytest.raises(ValueError, match="was trained with tokenizer = "):
        train_world(store, tiny.PRESET, tiny.make_tokenizer(seed=1), tiny.TRAINING, out, resume=True)


def test_data_of_another_block_size_is_refused_with_both_values(world_out, tmp_path):
    other = tiny.make_store(tmp_path / "data", episodes=2, block=3)
    with pytest.raises(ValueError, match="in blocks of 3 env steps; the preset has 2"):
        train_world(other, tiny.PRESET, tiny.make_tokenizer(), tiny.TRAINING, tmp_path / "out", resume=False)
    with pytest.raises(ValueError, match="env steps in a block: dataset 3; model 2"):
        train_dida(other, WorldModel.from_pretrained(world_out), tiny.TRAINING, tmp_path / "out", resume=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objects": tiny.FIELDS[:1]}, "object fields: dataset dot_x, dot_y; model x"),
        ({"action_dim": 3}, "action dimensions: dataset 2; model 3"),
        ({"proprio": tiny.FIELDS[:2]}, "proprio fields: dataset x, y, grip; model x, y"),
    ],
)
def test_data_of_another_embodiment_is_refused(store, world_out, changes, message):
    world = WorldModel.from_pretrained(world_out)
    world.config = replace(world.config, **changes)
    with pytest.raises(ValueError, match=message):
        adapt.check_same_recording(store, world)


def test_a_tokenizer_of_another_size_is_refused_before_anything_is_encoded(store, tmp_path):
    larger = replace(tiny.PRESET, ibq=replace(tiny.IBQ_CONFIG, n_embed=64))
    with pytest.raises(ValueError, match="tokenizer has 12 codes for 8-px frames; the preset has 64 for 8-px"):
        train_world(store, larger, tiny.make_tokenizer(), tiny.TRAINING, tmp_path / "out", resume=False)
    assert not (tmp_path / "out").exists()


def test_episodes_shorter_than_a_window_are_refused_at_once(store, tmp_path):
    with pytest.raises(ValueError, match="windows of 9 states do not fit: of 6 episodes the longest has 6"):
        preset = replace(tiny.PRESET, max_states=9)
        train_world(store, preset, tiny.make_tokenizer(), tiny.TRAINING, tmp_path / "out", resume=False)


def test_judging_works_with_batches_larger_than_its_windows_and_names_nothing_undefined(store, tmp_path):
    world = tiny.make_world()
    tokens = encode_dataset(store, world.frames, tiny.CAMERAS, tmp_path / "codes.safetensors")
    still = replace(tokens, codes_MN=torch.zeros_like(tokens.codes_MN), reward_M=torch.ones_like(tokens.reward_M))
    config = replace(tiny.TRAINING, batch=100)
    judge = Judge(world, prepare_data(world, tokens, 0.25), config)
    for figures in (judge.next_token(), judge.parallel()):
        assert 0 <= figures["token_accuracy"] <= 1 and 0 < figures["changed_share"] < 1
        assert -1 <= figures["reward_corr"] <= 1 and figures["proprio_mae"] > 0
    assert judge.parallel() == judge.parallel()
    figures = Judge(world, prepare_data(world, still, 0.25), config).next_token()
    assert figures["changed_share"] == 0 and figures["changed_token_accuracy"] != figures["changed_token_accuracy"]


def test_undefined_figures_do_not_break_the_record(store, tmp_path, monkeypatch):
    monkeypatch.setattr(Judge, "next_token", lambda self: {"reward_corr": float("nan")})
    train_world(store, tiny.PRESET, tiny.make_tokenizer(), short(1, 1), tmp_path / "out", resume=False)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["world"]["extra"]["figures"]["eval/reward_corr"] is None


def test_training_on_learns_further_tasks_and_objects(store, world_out, tmp_path):
    world = WorldModel.from_pretrained(world_out)
    world.config = replace(world.config, env_ids=("Dash-v0",), objects=())
    adapt.train_dida(store, world, tiny.TRAINING, tmp_path / "grown", resume=False, eye=tiny.make_eye())
    grown = WorldModel.from_pretrained(tmp_path / "grown").config
    assert grown.env_ids == ("Dash-v0", "Dot-v0")
    assert [field.name for field in grown.objects] == ["dot_x", "dot_y"]
