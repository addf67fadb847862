"""The planner's role in both training stages: what is read, what is asked, and that it is learned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from emu_embodied.data.batches import encode_dataset
from emu_embodied.data.episodes import DatasetSpec, EpisodeStore
from emu_embodied.data.subgoals import DONE, UNKNOWN
from emu_embodied.train.adapt import train_dida
from emu_embodied.train.pretrain import WorldData, prepare_data, train_world
from emu_embodied.train.subgoals import SubgoalTraining, sentence_logits, subgoal_loss, subgoal_tokens
from emu_embodied.world_config import WorldModelConfig
from emu_embodied.world_model import WorldModel
from tests import tiny

SENTENCES = {"approach": "get near", "push": "push it"}
TRAINING = replace(tiny.TRAINING, subgoal_share=0.5)


def subtasks(instruction: str) -> dict[str, str]:
    return SENTENCES


def make_store(folder: Path) -> EpisodeStore:
    """Episodes of two approaching and three pushing blocks, solved at the end."""
    sizes = dict.fromkeys(tiny.CAMERAS, (tiny.SIZE, tiny.SIZE))
    spec = DatasetSpec(
        env_ids=("Dot-v0",),
        block=tiny.BLOCK,
        action_dim=tiny.ACTIONS,
        cameras=sizes,
        proprio=tiny.FIELDS,
        objects=tiny.OBJECTS,
    )
    store = EpisodeStore.create(folder, spec)
    for seed in range(8):
        episode = tiny.make_episode(seed)
        solved = torch.arange(6).numpy() == 5
        store.append(replace(episode, phases=("approach",) * 2 + ("push",) * 3, success_T=solved))
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> EpisodeStore:
    return make_store(tmp_path_factory.mktemp("store") / "data")


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return tiny.make_world()


@pytest.fixture(scope="module")
def data(store, world, tmp_path_factory) -> WorldData:
    tokens = encode_dataset(store, world.frames, tiny.CAMERAS, tmp_path_factory.mktemp("codes") / "codes.safetensors")
    return prepare_data(world, tokens, 0.25)


@pytest.fixture(scope="module")
def batch(world, data):
    return SubgoalTraining(world, data, TRAINING, subtasks)._train.sample(12, 2, torch.Generator().manual_seed(1))


def figures(out: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"train_{stage}.jsonl").read_text().splitlines()]


def test_both_stages_learn_it(store, tmp_path):
    out = tmp_path / "out"
    long = replace(TRAINING, loop=replace(TRAINING.loop, steps=60, eval_every=60))
    train_world(store, tiny.PRESET, tiny.make_tokenizer(), long, out, resume=False, subtasks=subtasks)
    assert WorldModelConfig.load(out / "world.json").subgoals == 2
    train_dida(store, WorldModel.from_pretrained(out), long, out, resume=False, subtasks=subtasks)
    assert WorldModelConfig.load(out / "world.json").subgoals == 2
    for stage, most in (("world", 0.9), ("dida", 1.0)):
        lines = [line for line in figures(out, stage) if "loss" in line]
        assert lines[-1]["subgoal/loss"] < most * lines[0]["subgoal/loss"]
        judged = [line for line in figures(out, stage) if "eval/subgoal/text_accuracy" in line][-1]
        assert judged["eval/subgoal/text_accuracy"] > 0.5
        names = ("follow_accuracy", "sentence_accuracy", "token_accuracy", "proprio_error_m")
        assert all(judged[f"eval/subgoal/{name}"] is not None for name in names)


def test_without_subtasks_nothing_changes(store, tmp_path):
    """Neither where nobody says what the phases are called, nor with a share of 0, nor for a dataset without any."""
    runs = {
        "none": (TRAINING, None),
        "share": (replace(TRAINING, subgoal_share=0.0), subtasks),
        "unknown": (TRAINING, lambda instruction: {}),
    }
    weights = []
    for name, (config, sentences) in runs.items():
        short = replace(config, loop=replace(config.loop, steps=3))
        args = (store, tiny.PRESET, tiny.make_tokenizer(), short, tmp_path / name)
        if name == "unknown":
            with pytest.warns(UserWarning, match="shows no subtasks"):
                train_world(*args, resume=False, subtasks=sentences)
        else:
            train_world(*args, resume=False, subtasks=sentences)
        world = WorldModel.from_pretrained(tmp_path / name)
        assert world.config.subgoals == 0
        weights.append(world.backbone.lm_head.weight)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_a_resumed_run_needs_the_same_windows(store, tmp_path):
    short = replace(TRAINING, loop=replace(TRAINING.loop, steps=2))
    args = (store, tiny.PRESET, tiny.make_tokenizer())
    train_world(*args, short, tmp_path / "out", resume=False, subtasks=subtasks)
    with pytest.raises(ValueError, match="was trained with subgoals ="):
        train_world(*args, replace(short, subgoal_share=0.0), tmp_path / "out", resume=True, subtasks=subtasks)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_shares_out_of_range_are_refused(world, data, share):
    with pytest.raises(ValueError, match="subgoal_share is"):
        SubgoalTraining(world, data, replace(TRAINING, subgoal_share=share), subtasks)


def test_a_sentence_that_is_too_long_is_refused(world, data):
    with pytest.raises(ValueError, match="'push it over there' does not fit"):
        SubgoalTraining(world, data, TRAINING, lambda instruction: {"push": "push it over there"})


def test_the_stream_is_what_the_layout_says(world, batch):
    window = subgoal_tokens(world, batch, 0.0, torch.Generator())
    layout = world.layout
    text, states, between = layout.parse_subgoals(window.embeds_BLD)
    torch.testing.assert_close(text, world.backbone.embed(batch.text_BL))
    torch.testing.assert_close(between, world.backbone.embed(batch.subtasks_BTL))
    ids = layout.state_ids(batch.codes_BTN, world.proprio.encode(batch.proprio_BTP))
    torch.testing.assert_close(states, world.backbone.embed(ids))  # and no action is added to them
    assert window.embeds_BLD.shape[1] == layout.subgoal_length(2)
    for k, start in enumerate(window.starts):
        torch.testing.assert_close(window.embeds_BLD[:, start : start + layout.state_tokens], states[:, k + 1])
    said = [bytes(row[row < 256].tolist()).decode() for row in batch.subtasks_BTL[batch.shown_BT]]
    assert set(said) == set(SENTENCES.values())
    ends = batch.subtasks_BTL[~batch.shown_BT][:, 0]
    assert len(ends) and bool((ends == layout.vocabulary.special["eos"]).all())


@torch.no_grad()
def test_the_loss_is_that_of_every_position_that_is_asked_for(world, batch):
    """Against the whole vocabulary's logits, position by position."""
    layout, special = world.layout, world.layout.vocabulary.special
    quiet = replace(TRAINING, context_noise=0.0)
    logs = subgoal_loss(world, batch, quiet, torch.Generator()).logs
    ids = layout.interleave(
        batch.text_BL,
        layout.state_ids(batch.codes_BTN, world.proprio.encode(batch.proprio_BTP)),
        batch.subtasks_BTL,
    )
    logits = world.backbone.lm_head(world.backbone.core(world.backbone.embed(ids), torch.arange(ids.shape[1])))
    text, follow = [], []
    for row in range(len(ids)):
        for k in range(3):
            place = layout.text_tokens + k * layout.subgoal_tokens + layout.state_tokens - 1
            said = int(batch.follows_BT[row, k])
            if said != UNKNOWN:
                allowed = logits[row, place, [special["bos"], special["eos"]]]
                follow.append(F.cross_entropy(allowed, torch.tensor(int(said == DONE))))
            if k == 2 or said <= DONE:
                continue
            sentence = (*SENTENCES.values(),)[said - 1] if len(SENTENCES) >= said else ""
            asked = [int(i) for i in ids[row, place + 2 : place + 2 + layout.text_length]]
            asked = asked[: asked.index(special["pad"]) + 1]
            assert bytes(asked[:-1]).decode() in SENTENCES.values() and sentence
            for i, byte in enumerate(asked):
                allowed = logits[row, place + 1 + i, [*range(256), special["pad"]]]
                text.append(F.cross_entropy(allowed, torch.tensor(min(byte, 256))))
    torch.testing.assert_close(logs["text"], torch.stack(text).mean())
    torch.testing.assert_close(logs["follow"], torch.stack(follow).mean())


@torch.no_grad()
def test_keyframes_that_nobody_showed_are_not_asked_for(world, batch):
    hidden = ~batch.shown_BT
    assert bool(hidden.any())
    other = batch.codes_BTN.clone()
    other[:, 1:][hidden] = (other[:, 1:][hidden] + 1) % 12
    paths = [world.path("uniform")]
    losses = [
        subgoal_loss(world, b, replace(TRAINING, context_noise=0.0), torch.Generator().manual_seed(0), paths).loss
        for b in (batch, replace(batch, codes_BTN=other))
    ]
    torch.testing.assert_close(losses[0], losses[1])


@torch.no_grad()
def test_figures_are_the_same_every_time_and_perfect_for_a_model_that_knows(world, data, monkeypatch):
    subgoals = SubgoalTraining(world, data, TRAINING, subtasks)
    for path in (None, world.path("uniform")):
        assert subgoals.figures(path) == subgoals.figures(path)
    from emu_embodied.train import subgoals as module

    def knowing(backbone, layout, hidden):
        found = sentence_logits(backbone, layout, hidden)
        batch = drawn[-1]
        follow = F.one_hot((batch.follows_BT == DONE).long(), 2).float()
        text = F.one_hot(batch.subtasks_BTL[:, :, 1:].flatten(0, 1), 257).float()
        return type(found)(follow, text)

    drawn = []
    original = module.subgoal_tokens
    monkeypatch.setattr(module, "subgoal_tokens", lambda w, b, *rest: drawn.append(b) or original(w, b, *rest))
    monkeypatch.setattr(module, "sentence_logits", knowing)
    figures = subgoals.figures()
    assert figures["subgoal/text_accuracy"] == figures["subgoal/sentence_accuracy"] == 1.0
    assert figures["subgoal/follow_accuracy"] == 1.0 and figures["subgoal/token_accuracy"] < 1.0
