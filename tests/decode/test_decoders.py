"""Both decoders against one explicit forward without a cache, and the grammar of what they write."""

from dataclasses import fields

import pytest
import torch

from emu_embodied.decode.autoregressive import SequentialDecoder
from emu_embodied.decode.dida import DecodedState, ParallelDecoder
from emu_embodied.decode.grammar import StateLogits, expected_bin, state_logits
from emu_embodied.decode.paths import PATHS, StatePath
from emu_embodied.models.cache import KVCache
from emu_embodied.models.masks import causal_then_parallel
from emu_embodied.tokens.sequence import StateTokens
from tests import tiny

EPISODE = tiny.make_episode(3)
PLANS = 3


class Recorded:
    """Keeps the noisy tokens that every pass read."""

    def __init__(self, path: StatePath):
        self.path, self.read = path, []
        self.frame, self.proprio = path.frame, path.proprio

    def source(self, current, generator):
        self.read.append(self.path.source(current, generator))
        return self.read[-1]

    def step(self, tokens, predicted, t, t_next, generator):
        self.read.append(self.path.step(tokens, predicted, t, t_next, generator))
        return self.read[-1]


@pytest.fixture(scope="module")
def world():
    return tiny.make_world()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_same(found: StateLogits, expected: StateLogits) -> None:
    for field in fields(StateLogits):
        torch.testing.assert_close(getattr(found, field.name), getattr(expected, field.name), atol=2e-5, rtol=1e-4)


def prefix_embeds(world) -> torch.Tensor:
    """The stream up to the observed state, [PLANS, L, D]."""
    tokens = tiny.seen(world, tiny.observation(EPISODE, 0))
    state = world.backbone.embed(world.layout.state_ids(tokens.codes, tokens.proprio)[None])
    return torch.cat([world._text(EPISODE.instruction), state], 1).expand(PLANS, -1, -1)


def state_embeds(world, codes, proprio, condition) -> torch.Tensor:
    ids = world.layout.state_ids(codes.expand(PLANS, -1), proprio.expand(PLANS, -1))
    return world.backbone.embed(ids) + condition[:, None]


def full_forward(world, clean: torch.Tensor, noisy: torch.Tensor | None, before_SP: torch.Tensor) -> StateLogits:
    """Logits of the last state by one forward over everything, the mask written out."""
    stream = clean if noisy is None else torch.cat([clean, noisy], 1)
    mask = causal_then_parallel(clean.shape[1], stream.shape[1] - clean.shape[1])
    hidden = world.backbone.core(stream, torch.arange(stream.shape[1]), mask)
    return state_logits(world.backbone, world.layout, hidden[:, -world.layout.state_tokens :], before_SP)


def observed(world) -> StateTokens:
    codes = world.encode_frames(tiny.observation(EPISODE, 0).frames)
    return StateTokens(codes, world.proprio.encode(torch.from_numpy(EPISODE.proprio_TP[0]))).expand(PLANS)


def decode_twice(world, decoder) -> tuple[list[DecodedState], torch.Tensor]:
    """Two blocks behind one observed state, as ``imagine`` does it, and the cache's final length."""
    actions = tiny.plans(PLANS, 2)
    cache = world._branches(PLANS, world.observe([tiny.observation(EPISODE, 0)]).cache)
    draws, decoded, pending, current = generator(), [], None, observed(world)
    for h in range(2):
        action_embeds, condition = world._act(actions[:, h])
        pending = action_embeds if pending is None else torch.cat([pending, action_embeds], 1)
        decoded.append(decoder.decode(cache, pending, condition, current, draws))
        current = StateTokens(decoded[-1].codes_SN, decoded[-1].proprio_SP)
        pending = decoded[-1].pending_SLD
    return decoded, cache.total_length


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "passes"), [(name, passes) for name in PATHS for passes in (1, 3) if (name, passes) != ("mask", 3)]
)  # slots that mask filled earlier are computed no more: tests/decode/test_refinement.py
def test_parallel_decoding_equals_uncached_forwards_with_the_dense_mask(world, name, passes):
    path = Recorded(world.path(name))
    decoded, cached = decode_twice(world, ParallelDecoder(world.backbone, world.layout, path, passes))
    assert cached == world.layout.length(2) + world.layout.action_tokens  # the second state was never kept
    actions, before = tiny.plans(PLANS, 2), observed(world).proprio
    clean = prefix_embeds(world)
    reads_of_a_state = len(path.read) // 2
    for h, state in enumerate(decoded):
        action_embeds, condition = world._act(actions[:, h])
        clean = torch.cat([clean, action_embeds], 1)
        read = path.read[h * reads_of_a_state :][passes - 1]  # after the source come the tokens after every pass
        logits = full_forward(world, clean, state_embeds(world, read.codes, read.proprio, condition), before)
        assert_same(state.logits, logits)
        assert torch.equal(state.codes_SN, logits.frame.argmax(-1))
        assert torch.equal(state.proprio_SP, logits.proprio.argmax(-1))
        clean = torch.cat([clean, state_embeds(world, state.codes_SN, state.proprio_SP, condition)], 1)
        before = state.proprio_SP


@torch.inference_mode()
def test_sequential_decoding_equals_one_uncached_forward(world):
    decoded, cached = decode_twice(world, SequentialDecoder(world.backbone, world.layout))
    assert cached == world.layout.length(3)
    actions, before = tiny.plans(PLANS, 2), observed(world).proprio
    clean = prefix_embeds(world)
    for h, state in enumerate(decoded):
        action_embeds, condition = world._act(actions[:, h])
        written = state_embeds(world, state.codes_SN, state.proprio_SP, condition)
        clean = torch.cat([clean, action_embeds, written], 1)
        logits = full_forward(world, clean, None, before)
        assert_same(state.logits, logits)
        assert torch.equal(state.codes_SN, logits.frame.argmax(-1))
        assert torch.equal(state.proprio_SP, logits.proprio.argmax(-1))
        before = state.proprio_SP


DECODERS = {
    "sequential": lambda w, temperature: SequentialDecoder(w.backbone, w.layout, temperature),
    "one pass": lambda w, temperature: ParallelDecoder(w.backbone, w.layout, w.path("uniform"), 1, temperature),
    "three passes": lambda w, temperature: ParallelDecoder(w.backbone, w.layout, w.path("uniform"), 3, temperature),
}


@torch.inference_mode()
@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)
def test_every_token_is_of_its_own_kind_and_the_generator_decides(world, make):
    v = world.layout.vocabulary
    decoded, _ = decode_twice(world, make(world, 3.0))
    for state in decoded:
        assert state.codes_SN.shape == (PLANS, len(world.layout.frame_slots))
        assert 0 <= int(state.codes_SN.min()) <= int(state.codes_SN.max()) < v.vision.size
        assert 0 <= int(state.proprio_SP.min()) <= int(state.proprio_SP.max()) < v.state.size
        widths = [getattr(state.logits, field.name).shape[-1] for field in fields(StateLogits)]
        assert widths == [v.vision.size, v.state.size, v.reward.size, v.success.size]
    again, _ = decode_twice(world, make(world, 3.0))
    for state, same in zip(decoded, again, strict=True):
        assert torch.equal(state.codes_SN, same.codes_SN) and torch.equal(state.proprio_SP, same.proprio_SP)
        assert torch.equal(state.logits.frame, same.logits.frame)


@torch.inference_mode()
def test_hot_sampling_reaches_codes_that_are_not_the_most_likely(world):
    cold, _ = decode_twice(world, DECODERS["sequential"](world, 0.0))
    hot, _ = decode_twice(world, DECODERS["sequential"](world, 5.0))
    assert not torch.equal(cold[0].codes_SN, hot[0].codes_SN)


@pytest.mark.parametrize("passes", [0, -1])
def test_less_than_one_pass_is_refused(world, passes):
    with pytest.raises(ValueError, match=f"passes must be >= 1, got {passes}"):
        ParallelDecoder(world.backbone, world.layout, world.path("uniform"), passes)


def test_a_full_cache_is_named(world):
    _, condition = world._act(tiny.plans(PLANS, 1)[:, 0])
    cache = KVCache(world.backbone.config, PLANS, 4)
    with pytest.raises(ValueError, match="cache is full"), torch.inference_mode():
        pending = torch.zeros(PLANS, 1, world.backbone.config.hidden_size)
        DECODERS["one pass"](world, 0.0).decode(cache, pending, condition, observed(world), generator())


def test_expected_bin_lies_between_bins():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf, -torch.inf, 1.0]])
    assert expected_bin(logits).tolist() == [0.5, 2.0]
