"""What a model says of the things that a task is about: read out of a frame, written down, foretold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emu_embodied.data.batches import encode_dataset
from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.decode.glance import glance
from emu_embodied.decode.grammar import expected_bin
from emu_embodied.tokens.sequence import MASKED
from emu_embodied.train.glances import perceived_error, with_glances
from emu_embodied.train.loop import LossOutput
from emu_embodied.train.pretrain import WorldData, prepare_data, train_world
from emu_embodied.train.windows import misjudged, window_tokens
from emu_embodied.world_model import WorldModel
from tests import tiny

EPISODE = tiny.make_episode(3)
KNOWN, OBJECTS = len(tiny.FIELDS), len(tiny.OBJECTS)


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return tiny.make_world(objects=tiny.OBJECTS)


def read_plainly(world: WorldModel, observation) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of a state, each from everything before its slot, none of them shown; and the ids with them."""
    layout, backbone = world.layout, world.backbone
    span, text = layout.vocabulary.state, layout.text_ids(world.text.encode(observation.instruction))
    known = world.proprio.encode(torch.cat([torch.tensor(observation.proprio), torch.zeros(OBJECTS)]))
    codes = world.encode_frames(observation.frames)
    hidden_ids = torch.cat(
        [text, layout.state_ids(codes, torch.cat([known[:KNOWN], known.new_full((OBJECTS,), MASKED)]))]
    )
    numbers = torch.zeros(KNOWN + OBJECTS)
    for i, slot in enumerate(layout.proprio_slots.tolist()):
        if i >= KNOWN:
            place = layout.text_tokens + slot
            hidden = backbone.core(backbone.embed(hidden_ids[None, :place]), torch.arange(place), mask=None)
            numbers[i] = expected_bin(backbone.head(hidden[0, -1], slice(span.start, span.stop)))
    objects = world.proprio.decode(numbers)[KNOWN:]
    shown = world.proprio.encode(torch.cat([torch.tensor(observation.proprio), objects]))
    return objects, torch.cat([text, layout.state_ids(codes, shown)])


@torch.inference_mode()
def test_a_frame_is_read_without_showing_what_is_asked(world):
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


def data_of(world: WorldModel, tokens) -> WorldData:
    return prepare_data(world, tokens, tiny.TRAINING.held_out)


def test_glances_cost_what_the_pictures_show(world, tokens):
    data, config = data_of(world, tokens), replace(tiny.TRAINING, glances=3, context_noise=0.0)
    nothing = LossOutput(torch.zeros(()), {}, 7)
    found = with_glances(nothing, world, data, config, torch.Generator().manual_seed(2))
    batch = data.train.sample(3, 1, data.text_train_EL, torch.Generator().manual_seed(2))
    bins = world.proprio.encode(batch.proprio_BTP[:, 0])
    logits = glance(world.backbone, world.layout, batch.text_BL, batch.codes_BTN[:, 0], bins[:, :KNOWN])
    away = (torch.arange(logits.shape[-1]) - bins[:, KNOWN:, None]) / config.weights.smoothing
    soft = torch.softmax(-0.5 * away**2, -1)
    expected = F.cross_entropy(logits.flatten(0, 1), soft.flatten(0, 1))
    assert float(found.loss) == pytest.approx(config.weights.perception * float(expected), rel=1e-4)
    assert found.items > 7 and "perception" in found.logs
    assert with_glances(nothing, world, data, replace(config, glances=0), torch.Generator()) is nothing


def test_the_error_of_reading_is_told_field_by_field(world, tokens):
    found = perceived_error(world, data_of(world, tokens))
    assert list(found) == ["perceived/dot_x", "perceived/dot_y"]
    assert all(0 < value < 1 for value in found.values())
    assert found == perceived_error(world, data_of(world, tokens))


def test_a_model_without_objects_glances_at_nothing(tokens, windows):
    world = tiny.make_world()
    plain = replace(windows, proprio_BTP=windows.proprio_BTP[..., :KNOWN])
    window = window_tokens(world, plain, 0.0, torch.Generator().manual_seed(1), object_noise=4.0)
    assert torch.equal(window.before.proprio, world.proprio.encode(plain.proprio_BTP[:, :-1]))
    data, nothing = data_of(world, tokens), LossOutput(torch.zeros(()), {}, 7)
    assert with_glances(nothing, world, data, tiny.TRAINING, torch.Generator()) is nothing
    assert perceived_error(world, data) == {}


def test_training_learns_those_of_the_dataset(tmp_path):
    store = tiny.make_store(tmp_path / "dots")
    train_world(store, tiny.PRESET, tiny.make_tokenizer(), tiny.TRAINING, tmp_path / "out", resume=False)
    trained = WorldModel.from_pretrained(tmp_path / "out")
    assert [field.name for field in trained.config.objects] == ["dot_x", "dot_y"]
    lines = (tmp_path / "out" / "train_world.jsonl").read_text()
    assert all(name in lines for name in ("perception", "object_mae", "perceived/dot_x"))


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
