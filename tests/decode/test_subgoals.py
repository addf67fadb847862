"""Proposals: decoded as they are trained, by both decoders, seeded, and ended by the model itself."""

from __future__ import annotations

import pytest
import torch

from emu_embodied.data.subgoals import SubgoalBatch
from emu_embodied.decode.grammar import from_changes
from emu_embodied.decode.subgoals import SubgoalDecoder
from emu_embodied.tokens.sequence import StateTokens
from emu_embodied.train.noise import noisy_logits
from emu_embodied.train.subgoals import sentence_logits, subgoal_tokens
from emu_embodied.world_model import WorldModel
from tests import tiny

EPISODE = tiny.make_episode(50)
SEEN = tiny.observation(EPISODE, 0)


@pytest.fixture(params=[False, True], ids=["bins", "moves"])
def world(request) -> WorldModel:
    return tiny.make_world(subgoals=2, changes=request.param)


def with_end(world: WorldModel, weight: float) -> None:
    """Make it end sentences sooner: the larger ``weight``, the larger are the logits of the end, of either sign."""
    with torch.no_grad():
        world.backbone.lm_head.weight[world.layout.vocabulary.special["pad"]] *= weight


@pytest.fixture
def going_on(monkeypatch) -> list[bool]:
    """What the model said of going on; it is made to, whatever it says."""
    said: list[bool] = []
    original = SubgoalDecoder._goes_on
    monkeypatch.setattr(SubgoalDecoder, "_goes_on", lambda self, hidden: said.append(original(self, hidden)) or True)
    return said


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_window(world: WorldModel, steps: int, seed: int):
    """What was decoded, and the same as a training window."""
    layout = world.layout
    instruction = layout.text_ids(world.text.encode(SEEN.instruction))[None]
    current = tiny.seen(world, SEEN).expand(1)
    decoder = SubgoalDecoder(world.backbone, layout, world.decoder)
    found = decoder.decode(instruction, current, steps, seeded(seed))
    states = [f.state for f in found]
    bins = torch.cat([current.proprio, *(state.proprio_SP for state in states)])
    batch = SubgoalBatch(
        instruction,
        torch.stack([layout.text_ids(list(f.text)) for f in found])[None],
        torch.cat([current.codes, *(state.codes_SN for state in states)])[None],
        world.proprio.decode(bins)[None],
        torch.zeros(1, steps + 1),
        torch.zeros(1, steps + 1, dtype=torch.bool),
        torch.ones(1, steps + 1, dtype=torch.long),
    )
    return found, batch, subgoal_tokens(world, batch, 0.0, seeded())


def check_sentences(world: WorldModel, found, batch, hidden, said: list[bool]) -> None:
    logits = sentence_logits(world.backbone, world.layout, hidden)
    follow = logits.follow[0, : len(found)].argmax(-1) == 0
    assert follow.tolist() == said
    chosen = logits.text.argmax(-1)
    for row, subgoal in zip(chosen.tolist(), found, strict=True):
        expected = [*subgoal.text, *([256] if len(subgoal.text) < world.layout.text_length else [])]
        assert row[: len(expected)] == expected


@torch.no_grad()
@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_sequential_decoding_takes_what_training_finds_likeliest(world, going_on, weight):
    with_end(world, weight)
    world = world.with_decoding("autoregressive")
    found, batch, window = as_window(world, 3, 0)
    hidden = world.backbone.core(window.embeds_BLD, torch.arange(world.layout.subgoal_length(3)))
    check_sentences(world, found, batch, hidden, going_on)
    lengths = {len(subgoal.text) for subgoal in found}
    assert max(lengths) == world.layout.text_length and (weight == 1.0 or min(lengths) < 2)
    _, states, _ = world.layout.parse_subgoals(hidden)
    for k, subgoal in enumerate(found):
        for kind, places, ids in world.layout.readouts():
            read = world.backbone.head(states[0, k + 1, places], slice(ids.start, ids.stop))
            if kind == "proprio" and world.layout.changes:
                read = from_changes(read, window.before.proprio[0, k])
            decoded = getattr(subgoal.state.logits, kind)[0]
            torch.testing.assert_close(decoded, read if kind in ("frame", "proprio") else read[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(subgoal.state.codes_SN[0], subgoal.state.logits.frame[0].argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize(("name", "weight", "seed"), [("uniform", 1.0, 0), ("state_coupled", 4.0, 1)])
def test_parallel_decoding_reads_keyframes_as_noisy_copies_are_trained(going_on, name, weight, seed):
    world = tiny.make_world(subgoals=2, paths=(name,))
    with_end(world, weight)
    found, batch, window = as_window(world, 2, seed)
    noise = seeded(seed)
    path, sources = world.path(name), []
    for k in range(2):
        before = StateTokens(window.before.codes[:, k], window.before.proprio[:, k])
        sources.append(path.source(before, noise))
    copies = StateTokens(
        torch.stack([source.codes for source in sources], 1), torch.stack([source.proprio for source in sources], 1)
    )
    views = noisy_logits(world, window, copies)
    check_sentences(world, found, batch, views.hidden_BLD, going_on)
    for k, subgoal in enumerate(found):
        for kind in ("frame", "proprio", "reward", "success"):
            trained, decoded = getattr(views.noisy, kind)[k], getattr(subgoal.state.logits, kind)[0]
            torch.testing.assert_close(decoded, trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("decoding", "passes"), [("dida", 1), ("dida", 3), ("autoregressive", 1)])
def test_proposals_in_units_of_the_world(world, going_on, decoding, passes):
    world = world.with_decoding(decoding, passes=passes)
    found = world.propose(SEEN, 2, seeded())
    assert len(found) == 2
    for subgoal in found:
        assert isinstance(subgoal.text, str) and subgoal.tokens_N.shape == (8,)
        assert 0 <= int(subgoal.tokens_N.min()) <= int(subgoal.tokens_N.max()) < 12
        for value, field in zip(subgoal.proprio_P.tolist(), tiny.FIELDS, strict=True):
            assert field.low <= value <= field.high
        assert 0 <= subgoal.reward <= 1 and 0 <= subgoal.success <= 1
    again, other = world.propose(SEEN, 2, seeded()), world.propose(SEEN, 2, seeded(1))
    assert all(torch.equal(a.tokens_N, b.tokens_N) and a.text == b.text for a, b in zip(found, again, strict=True))
    same = all(torch.equal(a.proprio_P, b.proprio_P) for a, b in zip(found, other, strict=True))
    assert same == (decoding == "autoregressive")  # parallel decoding starts from noise
    # A shorter proposal is the beginning of a longer one.
    assert torch.equal(world.propose(SEEN, 1, seeded())[0].tokens_N, found[0].tokens_N)


@pytest.mark.parametrize("ends_after", [0, 1, 2])
def test_it_ends_where_the_model_says_so(world, monkeypatch, ends_after):
    said = iter([True] * ends_after + [False])
    monkeypatch.setattr(SubgoalDecoder, "_goes_on", lambda self, hidden: next(said))
    assert len(world.propose(SEEN, 3, seeded())) == ends_after


@torch.no_grad()
def test_going_on_is_what_the_likelier_of_bos_and_eos_says(world):
    decoder = SubgoalDecoder(world.backbone, world.layout, world.decoder)
    special, head = world.layout.vocabulary.special, world.backbone.lm_head.weight
    towards = (head[special["bos"]] - head[special["eos"]])[None, None]
    assert decoder._goes_on(towards) and not decoder._goes_on(-towards)


def test_damaged_weights_are_named(world, going_on):
    with torch.no_grad():
        world.backbone.lm_head.weight[world.layout.vocabulary.vision.start] = float("nan")
    with pytest.raises(ValueError, match="produced NaN"):
        world.propose(SEEN, 1, seeded())


def test_a_model_that_knows_no_subtasks_says_so(world):
    with pytest.raises(ValueError, match="train dida --subgoal-share"):
        tiny.make_world().propose(SEEN, 1)
    with pytest.raises(ValueError, match="ask for at least 1"):
        world.propose(SEEN, 0)
