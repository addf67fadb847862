"""What a model says of the things that a task is about: read out of a frame, written down, foretold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from emu_embodied.data.batches import encode_dataset
from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.train.adapt import train_dida
from emu_embodied.train.pretrain import train_world
from emu_embodied.train.windows import misjudged, window_tokens
from emu_embodied.world_model import WorldModel
from tests import tiny

EPISODE = tiny.make_episode(3)
KNOWN, OBJECTS = len(tiny.FIELDS), len(tiny.OBJECTS)


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return tiny.make_world(objects=tiny.OBJECTS)


@torch.inference_mode()
def test_what_the_eye_reads_is_written_into_the_stream(world):
    observation = tiny.observation(EPISODE, 0)
    belief = world.observe([observation])
    numbers = world.eye.see([observation])[0]
    assert belief.objects_O.shape == (OBJECTS,)
    torch.testing.assert_close(belief.objects_O, numbers)
    shown = world.proprio.encode(torch.cat([torch.tensor(observation.proprio), numbers]))
    state = world.layout.state_ids(world.encode_frames(observation.frames), shown)
    text = world.layout.text_ids(world.text.encode(observation.instruction))
    plain = world._prefix(world.backbone.embed(torch.cat([text, state])[None]))
    for found, expected in zip(belief.cache.keys, plain.keys, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_extending_reads_as_observing_does(world):
    seen = [tiny.observation(EPISODE, t) for t in range(2)]
    grown = world.extend(world.observe(seen[:1]), EPISODE.actions_TKA[0], seen[1])
    whole = world.observe(seen, [EPISODE.actions_TKA[0]])
    torch.testing.assert_close(grown.objects_O, whole.objects_O)
    plans = tiny.plans(3, 2)
    found, expected = (world.imagine(b, plans, torch.Generator().manual_seed(0)) for b in (grown, whole))
    torch.testing.assert_close(found.objects_SHO, expected.objects_SHO)
    torch.testing.assert_close(found.proprio_SHP, expected.proprio_SHP)


def test_imagination_tells_them_apart_from_proprio(world):
    futures = world.imagine(world.observe([tiny.observation(EPISODE, 0)]), tiny.plans(3, 2))
    assert futures.proprio_SHP.shape == (3, 2, KNOWN)
    assert futures.objects_SHO.shape == (3, 2, OBJECTS)
    assert tiny.make_world().imagine(
        tiny.make_world().observe([tiny.observation(EPISODE, 0)]), tiny.plans(1, 1)
    ).objects_SHO is None  # fmt: skip


def test_what_is_written_down_changes_what_is_foretold(world):
    belief = world.observe([tiny.observation(EPISODE, 0)])
    moved = replace(belief, objects_O=belief.objects_O + 0.5)
    assert not torch.equal(world._latest(moved).proprio, world._latest(belief).proprio)
    assert torch.equal(world._latest(moved).proprio[:KNOWN], world._latest(belief).proprio[:KNOWN])


@pytest.fixture(scope="module")
def tokens(world, tmp_path_factory):
    store = tiny.make_store(tmp_path_factory.mktemp("data") / "dots")
    cache = tmp_path_factory.mktemp("codes") / "codes.safetensors"
    return encode_dataset(store, world.frames, tiny.CAMERAS, cache, objects=True)


@pytest.fixture(scope="module")
def windows(world, tokens):
    texts = torch.stack([world.layout.text_ids(world.text.encode(i)) for i in tokens.instructions])
    return tokens.sample(6, 3, texts, torch.Generator().manual_seed(0))


def test_windows_show_the_objects_misjudged_and_ask_for_the_truth(world, windows):
    true_BTP = world.proprio.encode(windows.proprio_BTP)
    shown = misjudged(true_BTP, world, 4.0, torch.Generator().manual_seed(1))
    assert torch.equal(shown[..., :KNOWN], true_BTP[..., :KNOWN])
    assert not torch.equal(shown[..., KNOWN:], true_BTP[..., KNOWN:])
    assert shown.min() >= 0 and shown.max() < world.config.state_bins
    window = window_tokens(world, windows, 0.0, torch.Generator().manual_seed(1), object_noise=4.0)
    assert torch.equal(window.targets.proprio_MP, true_BTP[:, 1:].flatten(0, 1))
    assert not torch.equal(window.before.proprio, true_BTP[:, :-1])


def test_errors_have_the_spread_that_was_asked_for(world):
    bins = torch.full((4000, 3, KNOWN + OBJECTS), world.config.state_bins // 2)
    error = (misjudged(bins, world, 1.5, torch.Generator().manual_seed(0)) - bins)[..., KNOWN:].float()
    # The deviation is U(0, 1.5): its mean square is 1.5^2 / 3; rounding to bins adds up to 1/12.
    assert 0.75 <= float(error.var()) <= 0.75 + 1 / 12 + 0.05
    lasting = (error[:, 0] * error[:, 1]).mean()
    assert 0.25 <= float(lasting) <= 0.5


def test_a_model_without_an_eye_sees_no_objects():
    world = tiny.make_world()
    assert world.see([tiny.observation(EPISODE, t) for t in range(2)]).shape == (2, 0)


def test_training_learns_those_of_the_eye(tmp_path):
    store, eye = tiny.make_store(tmp_path / "dots"), tiny.make_eye()
    train_world(store, tiny.PRESET, tiny.make_tokenizer(), tiny.TRAINING, tmp_path / "out", resume=False, eye=eye)
    trained = WorldModel.from_pretrained(tmp_path / "out")
    assert [field.name for field in trained.config.objects] == ["dot_x", "dot_y"]
    observation = tiny.observation(EPISODE, 0)
    torch.testing.assert_close(trained.see([observation]), eye.see([observation]))
    assert "object_mae" in (tmp_path / "out" / "train_world.jsonl").read_text()


def test_without_an_eye_training_learns_no_objects(tmp_path):
    store = tiny.make_store(tmp_path / "dots")
    train_world(store, tiny.PRESET, tiny.make_tokenizer(), tiny.TRAINING, tmp_path / "out", resume=False)
    trained = WorldModel.from_pretrained(tmp_path / "out")
    assert trained.config.objects == () and trained.eye is None


def test_adapting_takes_an_eye_to_a_model_without_one(tmp_path):
    store = tiny.make_store(tmp_path / "dots")
    train_dida(store, tiny.make_world(), tiny.TRAINING, tmp_path / "out", resume=False, eye=tiny.make_eye())
    assert [field.name for field in WorldModel.from_pretrained(tmp_path / "out").config.objects] == ["dot_x", "dot_y"]


def test_an_eye_for_other_objects_is_refused(tmp_path):
    store = tiny.make_store(tmp_path / "dots")
    eye = tiny.make_eye((tiny.OBJECTS[0],))
    with pytest.raises(ValueError, match=r"the eye reads dot_x; .* tells of dot_x, dot_y"):
        train_world(store, tiny.PRESET, tiny.make_tokenizer(), tiny.TRAINING, tmp_path / "out", resume=False, eye=eye)


def test_pieces_that_do_not_belong_together_are_refused(world):
    with pytest.raises(ValueError, match="there is no eye"):
        WorldModel(world.config, world.backbone, world.frames)
    with pytest.raises(ValueError, match="the eye reads other cameras, or says other numbers"):
        WorldModel(replace(world.config, objects=()), tiny.make_world().backbone, world.frames, eye=world.eye)


def test_datasets_recorded_before_there_were_objects_are_read(tmp_path):
    store = tiny.make_store(tmp_path / "dots", episodes=1)
    episode = replace(store[0], objects_TO=np.zeros((len(store[0]) + 1, 0), np.float32))
    spec = replace(store.spec, objects=())
    old = EpisodeStore.create(tmp_path / "old", spec)
    old.append(episode)
    description = (tmp_path / "old" / "dataset.json").read_text()
    (tmp_path / "old" / "dataset.json").write_text(description.replace('"objects": []', '"unknown": []'))
    again = EpisodeStore.open(tmp_path / "old")
    assert again.spec.objects == () and again[0].objects_TO.shape == (len(episode) + 1, 0)
