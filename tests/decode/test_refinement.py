"""Several passes: what is computed, what settles when, and when a candidate stops.

The reference below has no cache, no gathered tokens and no candidates left out: it runs all positions of everything
through every layer and then puts back, layer by layer, what the rules say is not computed.
"""

from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emu_embodied.decode import dida
from emu_embodied.decode.dida import ParallelDecoder
from emu_embodied.decode.grammar import StateLogits, state_logits
from emu_embodied.decode.order import (
    ORDERS,
    check_order,
    entropies,
    log_probabilities,
    most_confident,
    settled_by,
    times,
    within_entropy,
)
from emu_embodied.decode.paths import PATHS, MaskPath, MixturePath
from emu_embodied.models.masks import causal_then_parallel
from emu_embodied.tokens.sequence import MASKED, StateTokens
from tests import tiny

EPISODE = tiny.make_episode(3)
PLANS = 4


@pytest.fixture(scope="module")
def world():
    """Three layers: keys and values of the upper ones depend on what was seen below."""
    with patch.object(tiny, "PRESET", replace(tiny.PRESET, layers=3)):
        return tiny.make_world(paths=tuple(PATHS))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clean_stream(world) -> tuple[torch.Tensor, torch.Tensor, StateTokens]:
    """What is known before the first imagined state, [S, T, D]; its condition; and the state seen last."""
    tokens = tiny.seen(world, tiny.observation(EPISODE, 0))
    state = world.backbone.embed(world.layout.state_ids(tokens.codes, tokens.proprio)[None])
    actions = tiny.plans(PLANS, 1)[:, 0]
    embeds, condition = world._act(actions)
    known = torch.cat([world._text(EPISODE.instruction), state], 1).expand(PLANS, -1, -1)
    return torch.cat([known, embeds], 1), condition, tokens.expand(PLANS)


def at(tokens: StateTokens, rows: slice) -> StateTokens:
    return StateTokens(tokens.codes[rows], tokens.proprio[rows])


def decode(world, decoder: ParallelDecoder, rows=slice(None)):
    """One state behind one observed state."""
    _, _, current = clean_stream(world)
    pending, condition = world._act(tiny.plans(PLANS, 1)[rows, 0])
    belief = world.observe([tiny.observation(EPISODE, 0)])
    cache = world._branches(len(pending), belief.cache)
    return decoder.decode(cache, pending, condition, at(current, rows), generator())


def reference(world, decoder: ParallelDecoder) -> tuple[torch.Tensor, StateLogits, list[int]]:
    """Final tokens [S, M], logits, and how many positions each pass computes for its most demanding candidate."""
    layout, backbone, path = world.layout, world.backbone, decoder.path
    clean, condition, current = clean_stream(world)
    draws = dida._own(generator()) if decoder.passes > 1 else generator()
    source = path.source(current, draws)
    tokens = torch.cat([source.codes, source.proprio], -1)
    codes = len(layout.frame_slots)
    slots = torch.cat([layout.frame_slots, layout.proprio_slots])
    known, length = clean.shape[1], layout.state_tokens
    mask = causal_then_parallel(known, length)
    is_open = torch.ones_like(tokens, dtype=torch.bool)
    changed, inputs, computed = torch.zeros_like(is_open), None, []
    clock = times(decoder.passes, decoder.time_shift)
    for i in range(decoder.passes):
        going = is_open.any(-1)
        needed = torch.zeros(PLANS, known + length, dtype=torch.bool)
        for s in range(PLANS):
            for m, slot in enumerate(slots.tolist()):
                if is_open[s, m]:
                    needed[s, known + slot - 1] = True
                if changed[s, m]:
                    needed[s, known + slot] = True
        needed[:, -3:] = needed[:, known + layout.camera_tokens] = True  # the first camera's last code
        computed.append(int(needed[going, known:].sum(-1).max()) if bool(going.any()) else 0)
        needed &= going[:, None]
        if i == 0:
            needed[:] = True
        ids = layout.state_ids(tokens[:, :codes], tokens[:, codes:])
        hidden = torch.cat([clean, backbone.embed(ids) + condition[:, None]], 1)
        call = backbone._call(hidden, torch.arange(known + length), mask, None, 0)
        fresh = [hidden]
        for depth, layer in enumerate(backbone.model.layers):
            kept = hidden if inputs is None else inputs[depth]
            hidden = torch.where(needed[..., None], hidden, kept)
            fresh[depth] = hidden
            hidden = layer(hidden, call)
            fresh.append(hidden)
        if inputs is not None:
            fresh[-1] = torch.where(needed[..., None], fresh[-1], inputs[-1])
        inputs = fresh
        final = backbone.model.norm(inputs[-1][:, known:], call.eps)
        logits = state_logits(backbone, layout, final, current.proprio)
        predicted = StateTokens(logits.frame.argmax(-1), logits.proprio.argmax(-1))
        joined = torch.cat([predicted.codes, predicted.proprio], -1)
        before, was_open = tokens, is_open
        stepped = tokens
        if i + 1 < decoder.passes and (decoder.order == "random" or not isinstance(path.frame, MixturePath)):
            moved = path.step(StateTokens(tokens[:, :codes], tokens[:, codes:]), predicted, *clock[i : i + 2], draws)
            stepped = torch.cat([moved.codes, moved.proprio], -1)
        if i + 1 == decoder.passes:
            settling = was_open
        elif decoder.order == "random":
            settling = (stepped != MASKED) & isinstance(path.frame, MaskPath)
        elif decoder.order == "confidence":
            scores = log_probabilities(logits, predicted)
            settling = most_confident(scores, was_open, settled_by(clock[i + 1], tokens.shape[1]))
        else:
            settling = within_entropy(entropies(logits), was_open, decoder.entropy_bound)
        if decoder.order != "random" or i + 1 == decoder.passes:
            stepped = torch.where(settling, joined, stepped)
        tokens = torch.where(was_open, stepped, tokens)
        changed = tokens != before
        unsettled = (was_open & (joined != before)).any(-1, keepdim=True)
        is_open = was_open & ~settling & unsettled
    return tokens, logits, computed


def count_computed(world):
    """Patches ``core`` to note (sequences, new tokens) of every call."""
    calls, core = [], world.backbone.core

    def counted(embeds, *args, **kwargs):
        calls.append(tuple(embeds.shape[:2]))
        return core(embeds, *args, **kwargs)

    return calls, patch.object(world.backbone, "core", counted)


def decoder_of(world, path="uniform", **settings) -> ParallelDecoder:
    return ParallelDecoder(world.backbone, world.layout, world.path(path), **settings)


def assert_same(found: StateLogits, expected: StateLogits) -> None:
    for name in ("frame", "proprio", "reward", "success"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("passes", [2, 5])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("path", PATHS)
def test_skipping_what_is_settled_equals_the_rules_written_out(world, path, order, passes):
    decoder = decoder_of(world, path, passes=passes, order=order, time_shift=1.5, entropy_bound=6.0)
    calls, counting = count_computed(world)
    with counting:
        found = decode(world, decoder)
    tokens, logits, computed = reference(world, decoder)
    assert torch.equal(torch.cat([found.codes_SN, found.proprio_SP], -1), tokens)
    assert_same(found.logits, logits)
    counts = [tokens for _, tokens in calls[1:]]  # the first call is the belief's
    assert counts[0] == world.layout.action_tokens + world.layout.state_tokens
    assert counts[1:] == [count for count in computed[1:] if count]
    if passes == 5 and order != "random":
        assert min(counts) < 0.75 * world.layout.state_tokens


@torch.inference_mode()
@pytest.mark.parametrize("order", ["confidence", "entropy"])
def test_shapes_from_the_schedule_alone_give_the_same(world, order):
    """Where reading the number of open tokens would wait for the device, an upper bound serves."""
    decoder = decoder_of(world, passes=5, order=order, entropy_bound=6.0)
    expected = decode(world, decoder)
    with patch.object(dida, "_on_host", lambda tensor: False):
        found = decode(world, decoder)
    assert torch.equal(found.codes_SN, expected.codes_SN)
    assert_same(found.logits, expected.logits)


@torch.inference_mode()
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("path", PATHS)
def test_candidates_apart_as_together(world, path, order):
    decoder = decoder_of(world, path, passes=3, order=order)
    together = decode(world, decoder)
    for s in range(PLANS):
        alone = decode(world, decoder, slice(s, s + 1))
        assert torch.equal(alone.codes_SN[0], together.codes_SN[s])
        assert_same(alone.logits, together.logits.at(slice(s, s + 1)))


@pytest.fixture(scope="module")
def still():
    """A world that predicts zeros whatever it sees."""
    world = tiny.make_world(paths=("state_coupled",))
    world.backbone.lm_head.weight.zero_()
    return world


def decode_from(world, current: StateTokens, draws: torch.Generator, passes: int = 8):
    pending, condition = world._act(tiny.plans(PLANS, 1)[:, 0])
    cache = world._branches(PLANS, world.observe([tiny.observation(EPISODE, 0)]).cache)
    decoder = decoder_of(world, "state_coupled", passes=passes)
    return decoder.decode(cache, pending, condition, current, draws)


def still_tokens() -> StateTokens:
    return StateTokens(torch.zeros(PLANS, 8, dtype=torch.long), torch.zeros(PLANS, 3, dtype=torch.long))


@torch.inference_mode()
def test_candidates_that_are_what_is_predicted_stop(still):
    """The state before is what every pass predicts, so one pass is enough."""
    current = still_tokens()
    current.codes[1, 2] = 5
    current.proprio[3, 0] = 1
    calls, counting = count_computed(still)
    with counting:
        found = decode_from(still, current, generator())
    assert not found.codes_SN.any() and not found.proprio_SP.any()
    assert [sequences for sequences, _ in calls][1:3] == [4, 2]  # the first call is the belief's
    assert all(sequences <= 2 for sequences, _ in calls[2:])


@torch.inference_mode()
def test_stopping_early_takes_no_numbers_from_later_states(still):
    moving = still_tokens()
    moving.codes[:] = 7
    draws = [generator(), generator()]
    for current, own in zip((still_tokens(), moving), draws, strict=True):
        decode_from(still, current, own)
    assert torch.equal(*(torch.rand(3, generator=own) for own in draws))


# -- rules ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 20), st.floats(0.2, 5))
def test_times_rise_from_noise_to_data(passes, shift):
    clock = times(passes, shift)
    assert clock[0] == pytest.approx(0, abs=1e-9) and clock[-1] == 1.0 and len(clock) == passes + 1
    assert all(earlier < later for earlier, later in pairwise(clock))
    counts = [settled_by(t, 71) for t in clock]
    assert counts[0] == 0 and counts[-1] == 71 and counts == sorted(counts)
    if shift == 1:
        assert clock == pytest.approx([i / passes for i in range(passes + 1)])


def test_a_larger_shift_stays_longer_near_noise():
    assert all(later < even for later, even in zip(times(4, 3.0)[1:-1], times(4)[1:-1], strict=True))


@given(st.integers(0, 12), st.integers(0, 10_000))
def test_the_most_confident_open_tokens_settle(count, seed):
    scores = torch.randn(3, 12, generator=generator(seed))
    is_open = torch.rand(3, 12, generator=generator(seed + 1)) < 0.6
    chosen = most_confident(scores, is_open, count)
    for s in range(3):
        free = is_open[s].nonzero()[:, 0].tolist()
        expected = sorted(free, key=lambda m: -float(scores[s, m]))[: max(0, count - (12 - len(free)))]
        assert sorted(expected) == chosen[s].nonzero()[:, 0].tolist()


@given(st.floats(0, 8), st.integers(0, 10_000))
def test_tokens_settle_while_their_entropies_fit(bound, seed):
    entropy = torch.rand(3, 12, generator=generator(seed)) * 2
    is_open = torch.rand(3, 12, generator=generator(seed + 1)) < 0.6
    is_open[0] = False
    chosen = within_entropy(entropy, is_open, bound)
    for s in range(3):
        ordered = sorted(is_open[s].nonzero()[:, 0].tolist(), key=lambda m: float(entropy[s, m]))
        count = int(chosen[s].sum())
        assert sorted(ordered[:count]) == chosen[s].nonzero()[:, 0].tolist()
        assert count >= bool(ordered)
        assert count <= 1 or float(entropy[s, ordered[:count]].sum()) <= bound + 1e-5
        assert count == len(ordered) or float(entropy[s, ordered[: count + 1]].sum()) > bound - 1e-5


def test_scores_are_those_of_the_distributions(world):
    logits = StateLogits(*(torch.randn(2, n, v, generator=generator(v)) for n, v in ((4, 12), (3, 16))), None, None)
    predicted = StateTokens(logits.frame.argmax(-1), logits.proprio.argmax(-1))
    expected = torch.cat([part.log_softmax(-1).amax(-1) for part in (logits.frame, logits.proprio)], -1)
    torch.testing.assert_close(log_probabilities(logits, predicted), expected)
    parts = [torch.distributions.Categorical(logits=part).entropy() for part in (logits.frame, logits.proprio)]
    torch.testing.assert_close(entropies(logits), torch.cat(parts, -1))


def test_settings_out_of_range_are_refused(world):
    with pytest.raises(ValueError, match=r"unknown order 'confident'; .*did you mean 'confidence'"):
        decoder_of(world, order="confident")
    for setting, message in (
        ({"time_shift": 0.0}, "time_shift is 0.0"),
        ({"entropy_bound": -1.0}, "entropy_bound is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            check_order("random", **({"time_shift": 1.0, "entropy_bound": 1.0} | setting))
        with pytest.raises(ValueError, match=message):
            world.with_decoding("dida", **setting)
    other = replace(world.path("uniform"), frame=PATHS["uniform"](torch.eye(5)))
    with pytest.raises(ValueError, match="noise process is over 5 frame codes, the model's vocabulary has 12"):
        ParallelDecoder(world.backbone, world.layout, other)
