"""What a model says of the things that a task is about: read out of a frame, written down, foretold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emu_embodied.data.batches import encode_dataset
from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.decode.grammar import expected_bin
from emu_embodied.tokens.sequence import MASKED
from emu_embodied.train.pretrain import train_world
from emu_embodied.train.windows import misjudged, perception_loss, window_tokens
from emu_embodied.world_model import WorldModel
from tests import tiny

EPISODE = tiny.make_episode(3)
KNOWN, OBJECTS = len(tiny.FIELDS), len(tiny.OBJECTS)


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return tiny.make_world(objects=tiny.OBJECTS)


def read_plainly(world: WorldModel, observation) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and ids of a first state, one slot after another, everything computed anew for each."""
    layout, backbone = world.layout, world.backbone
    span = layout.vocabulary.state
    known = world.proprio.encode(torch.cat([torch.tensor(observation.proprio), torch.zeros(OBJECTS)]))
    text = layout.text_ids(world.text.encode(observation.instruction))
    ids = torch.cat([text, layout.state_ids(world.encode_frames(observation.frames), known)])
    numbers = torch.zeros(KNOWN + OBJECTS)
    for i, slot in enumerate(layout.proprio_slots.tolist()):
        if i < KNOWN:
            continue
        place = layout.text_tokens + slot
        hidden = backbone.core(backbone.embed(ids[None, :place]), torch.arange(place), mask=None)
        numbers[i] = expected_bin(backbone.head(hidden[0, -1], slice(span.start, span.stop)))
        ids[place] = span.ids(numbers[i].round().long())
    return world.proprio.decode(numbers)[KNOWN:], ids


@torch.inference_mode()
def test_a_frame_is_read_one_number_after_another(world):
    observation = tiny.observation(EPISODE, 0)
    belief = world.observe([observation])
    numbers, ids = read_plainly(world, observation)
    assert belief.objects_O.shape == (OBJECTS,)
    torch.testing.assert_close(belief.objects_O, numbers, atol=1e-5, rtol=1e-4)
    plain = world._prefix(world.backbone.embed(ids[None]))
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
def windows(world, tmp_path_factory):
    store = tiny.make_store(tmp_path_factory.mktemp("data") / "dots")
    cache = tmp_path_factory.mktemp("codes") / "codes.safetensors"
    tokens = encode_dataset(store, world.frames, tiny.CAMERAS, cache, objects=True)
    texts = torch.stack([world.layout.text_ids(world.text.encode(i)) for i in tokens.instructions])
    return tokens.sample(6, 3, texts, torch.Generator().manual_seed(0))


def test_windows_show_the_objects_misjudged_and_ask_for_the_truth(world, windows):
    true_BTP = world.proprio.encode(windows.proprio_BTP)
    shown = misjudged(true_BTP, world, 4.0, torch.Generator().manual_seed(1))
    assert torch.equal(shown[..., :KNOWN], true_BTP[..., :KNOWN])
    assert not torch.equal(shown[..., KNOWN:], true_BTP[..., KNOWN:])
    objects = shown[..., KNOWN:]
    hidden_B = (objects == MASKED).flatten(1).all(1)
    assert 0 < int(hidden_B.sum()) < len(objects) and bool((objects[~hidden_B] >= 0).all())
    assert shown.max() < world.config.state_bins
    window = window_tokens(world, windows, 0.0, torch.Generator().manual_seed(1), object_noise=4.0)
    assert torch.equal(window.seen_BO, true_BTP[:, 0, KNOWN:])
    assert torch.equal(window.targets.proprio_MP, true_BTP[:, 1:].flatten(0, 1))
    assert not torch.equal(window.before.proprio, true_BTP[:, :-1])


def test_errors_have_the_spread_that_was_asked_for(world):
    bins = torch.full((4000, 3, KNOWN + OBJECTS), world.config.state_bins // 2)
    shown = misjudged(bins, world, 1.5, torch.Generator().manual_seed(0))[..., KNOWN:]
    shown = shown[(shown != MASKED).flatten(1).all(1)]
    assert 0.45 < len(shown) / len(bins) < 0.55
    error = (shown - world.config.state_bins // 2).float()
    # The deviation is U(0, 1.5): its mean square is 1.5^2 / 3; rounding to bins adds up to 1/12.
    assert 0.75 <= float(error.var()) <= 0.75 + 1 / 12 + 0.05
    lasting = (error[:, 0] * error[:, 1]).mean()
    assert 0.25 <= float(lasting) <= 0.5


def test_perception_is_scored_in_the_first_state(world, windows):
    window = window_tokens(world, windows, 0.0, torch.Generator().manual_seed(1))
    config = tiny.TRAINING.weights
    hidden = world.backbone.core(window.embeds_BLD, torch.arange(window.embeds_BLD.shape[1]), mask=None)
    span, start = world.layout.vocabulary.state, world.layout.state_offset(0)
    total = 0.0
    for i in range(OBJECTS):
        at = start + int(world.layout.proprio_slots[KNOWN + i]) - 1
        logits = world.backbone.head(hidden[:, at], slice(span.start, span.stop))
        soft = torch.softmax(
            -0.5 * ((torch.arange(span.size) - window.seen_BO[:, i, None]) / config.smoothing) ** 2, -1
        )
        total += float(F.cross_entropy(logits, soft)) / OBJECTS
    assert float(perception_loss(world, hidden, window, config)) == pytest.approx(total, rel=1e-4)


def test_a_model_without_objects_scores_nothing(windows):
    world = tiny.make_world()
    plain = replace(windows, proprio_BTP=windows.proprio_BTP[..., :KNOWN])
    window = window_tokens(world, plain, 0.0, torch.Generator().manual_seed(1), object_noise=4.0)
    assert torch.equal(window.before.proprio, world.proprio.encode(plain.proprio_BTP[:, :-1]))
    assert perception_loss(world, window.embeds_BLD, window, tiny.TRAINING.weights) == 0


def test_training_learns_those_of_the_dataset(tmp_path):
    store = tiny.make_store(tmp_path / "dots")
    train_world(store, tiny.PRESET, tiny.make_tokenizer(), tiny.TRAINING, tmp_path / "out", resume=False)
    trained = WorldModel.from_pretrained(tmp_path / "out")
    assert [field.name for field in trained.config.objects] == ["dot_x", "dot_y"]
    lines = (tmp_path / "out" / "train_world.jsonl").read_text()
    assert "perception" in lines and "object_mae" in lines


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
