"""observe -> imagine -> render at toy size: what is shared, what is recomputed, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emu_embodied.decode import dida
from emu_embodied.decode.grammar import state_logits
from emu_embodied.decode.order import ORDERS
from emu_embodied.decode.paths import PATHS, UniformPath
from emu_embodied.models.cache import KVCache
from emu_embodied.models.masks import causal_then_parallel
from emu_embodied.protocols import WorldModel as WorldModelProtocol
from emu_embodied.records import Imagination, Observation
from emu_embodied.tokens.sequence import StateTokens
from emu_embodied.world_model import WorldModel
from tests import tiny

EPISODE = tiny.make_episode(3, blocks=6)
SEEN = [tiny.observation(EPISODE, t) for t in range(7)]
DONE = list(EPISODE.actions_TKA)


@pytest.fixture(scope="module", params=["dida", "autoregressive"])
def world(request):
    return tiny.make_world(decoding=request.param)


@pytest.fixture
def fresh():
    return tiny.make_world()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_same(found: Imagination, expected: Imagination) -> None:
    assert torch.equal(found.tokens_SHN, expected.tokens_SHN)
    for name in ("proprio_SHP", "reward_SH", "success_SH"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=2e-5, rtol=1e-4)


def bytes_of(imagination: Imagination) -> list[bytes]:
    names = ("tokens_SHN", "proprio_SHP", "reward_SH", "success_SH")
    return [getattr(imagination, name).numpy().tobytes() for name in names]


def extended(world: WorldModel, states: int):
    belief = world.observe(SEEN[:1])
    for t in range(1, states):
        belief = world.extend(belief, DONE[t - 1], SEEN[t])
    return belief


# -- observe and extend -----------------------------------------------------------------------------------------------


def test_satisfies_the_seam(world):
    model: WorldModelProtocol = world
    assert (model.block, model.horizon) == (tiny.BLOCK, 2)


@pytest.mark.parametrize("states", [1, 2, 3, 6])
def test_extending_equals_observing_the_whole_history(world, states):
    step_by_step, at_once = extended(world, states), world.observe(SEEN[:states], DONE[: states - 1])
    assert step_by_step.cache.total_length == at_once.cache.total_length
    assert step_by_step.history == at_once.history == tuple(SEEN[:states][-2:])
    assert all(np.array_equal(a, b) for a, b in zip(step_by_step.actions, at_once.actions, strict=True))
    assert torch.equal(step_by_step.tokens_N, world.encode_frames(SEEN[states - 1].frames))
    assert step_by_step.proprio_P.tolist() == at_once.proprio_P.tolist() == SEEN[states - 1].proprio.tolist()
    assert len(at_once.actions) == len(at_once.history) - 1
    actions = tiny.plans(3, 4)
    assert_same(world.imagine(step_by_step, actions, generator()), world.imagine(at_once, actions, generator()))


def test_the_history_and_its_actions_matter(world):
    actions = tiny.plans(2, 2)
    told = world.imagine(world.observe(SEEN[:2], DONE[:1]), actions, generator())
    for history, between in ((SEEN[1:2], []), (SEEN[:2], [-DONE[0]]), ([SEEN[3], SEEN[1]], DONE[:1])):
        other = world.imagine(world.observe(history, between), actions, generator())
        assert not torch.allclose(told.reward_SH, other.reward_SH, atol=1e-4)


def test_extending_computes_only_what_is_new_and_leaves_the_belief_alone(fresh, monkeypatch):
    belief, actions = fresh.observe(SEEN[:1]), tiny.plans(3, 2)
    before = bytes_of(fresh.imagine(belief, actions, generator()))
    read, core = [], fresh.backbone.core

    def counted(embeds, *args, **kwargs):
        read.append(embeds.shape[1])
        return core(embeds, *args, **kwargs)

    monkeypatch.setattr(fresh.backbone, "core", counted)
    longer = fresh.extend(belief, DONE[0], SEEN[1])
    assert read == [fresh.layout.step_tokens]
    assert longer.cache.total_length == belief.cache.total_length + fresh.layout.step_tokens
    assert bytes_of(fresh.imagine(belief, actions, generator())) == before


def test_a_new_instruction_is_heard(fresh):
    turned = replace(SEEN[1], instruction="go left")
    belief = fresh.extend(fresh.observe(SEEN[:1]), DONE[0], turned)
    actions = tiny.plans(2, 2)
    expected = fresh.imagine(fresh.observe([SEEN[0], turned], DONE[:1]), actions, generator())
    assert_same(fresh.imagine(belief, actions, generator()), expected)
    old = fresh.imagine(fresh.observe(SEEN[:2], DONE[:1]), actions, generator())
    assert not torch.allclose(old.reward_SH, expected.reward_SH, atol=1e-4)


# -- imagine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 2, 3, 7])
def test_imagination_has_its_shapes_and_ranges(world, horizon):
    found = world.imagine(world.observe(SEEN[:2], DONE[:1]), tiny.plans(3, horizon), generator())
    assert found.tokens_SHN.shape == (3, horizon, 8) and found.tokens_SHN.dtype == torch.int64
    assert found.proprio_SHP.shape == (3, horizon, 3) and found.reward_SH.shape == (3, horizon)
    assert 0 <= int(found.tokens_SHN.min()) <= int(found.tokens_SHN.max()) < 12
    for values in (found.reward_SH, found.success_SH):
        assert values.shape == (3, horizon) and 0 < float(values.min()) <= float(values.max()) < 1
    for p, field in enumerate(tiny.FIELDS):
        assert field.low < float(found.proprio_SHP[..., p].min()) <= float(found.proprio_SHP[..., p].max()) < field.high
    # Blocks already imagined do not depend on how much further one looks.
    shorter = world.imagine(world.observe(SEEN[:2], DONE[:1]), tiny.plans(3, horizon)[:, :1], generator())
    torch.testing.assert_close(found.reward_SH[:, :1], shorter.reward_SH, atol=2e-5, rtol=1e-4)


def test_plans_are_imagined_apart_as_together(world):
    belief, actions = world.observe(SEEN[:1]), tiny.plans(4, 5)
    together = world.imagine(belief, actions, generator())
    for s in range(4):
        alone = world.imagine(belief, actions[s : s + 1], generator())
        names = ("tokens_SHN", "proprio_SHP", "reward_SH", "success_SH")
        assert_same(alone, Imagination(*(getattr(together, name)[s : s + 1] for name in names)))
    assert not torch.allclose(together.reward_SH[0], together.reward_SH[1])


def test_a_shared_prefix_equals_copies_of_it(world, monkeypatch):
    belief, actions = world.observe(SEEN[:2], DONE[:1]), tiny.plans(3, 5)
    shared = world.imagine(belief, actions, generator())

    def copies(num_plans: int, prefix: KVCache) -> KVCache:
        copy = KVCache(world.backbone.config, num_plans, world.layout.length(4))
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            copy.keys[layer][:, :, : prefix.length] = keys[:, :, : prefix.length]
            copy.values[layer][:, :, : prefix.length] = values[:, :, : prefix.length]
        copy.length = prefix.length
        return copy

    monkeypatch.setattr(world, "_branches", copies)
    assert_same(world.imagine(belief, actions, generator()), shared)


def test_memory_of_an_imagination_serves_the_next(fresh):
    actions = tiny.plans(3, 7)  # goes beyond the window: the cache starts anew on the way, too
    beliefs = [fresh.observe(SEEN[:1]), fresh.observe(SEEN[:2], DONE[:1])]
    expected = [bytes_of(tiny.make_world().imagine(belief, actions, generator())) for belief in beliefs]
    held = []
    for _ in range(2):
        for belief, bytes_expected in zip(beliefs, expected, strict=True):
            assert bytes_of(fresh.imagine(belief, actions, generator())) == bytes_expected
            held.append(fresh._spares[3].keys[0].data_ptr())
    assert len(set(held)) == 1
    fresh.imagine(beliefs[0], actions[:2], generator())
    assert list(fresh._spares) == [2]  # memory for the latest number of candidates only


class NewMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(args) if torch.is_tensor(tensor)}
        for tensor in tree_leaves(found):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.bytes += tensor.untyped_storage().nbytes()
        return found


def test_candidates_take_no_copy_of_the_prefix(fresh):
    plans, taken = 50, []
    beliefs = [fresh.observe(SEEN[:1]), fresh.observe(SEEN[:2], DONE[:1])]
    with torch.inference_mode():
        for belief in beliefs:
            cache = fresh._branches(plans, belief.cache)
            pending, condition = fresh._act(tiny.plans(plans, 1)[:, 0])
            current = StateTokens(belief.tokens_N, fresh.proprio.encode(belief.proprio_P)).expand(plans)
            with NewMemory() as memory:
                fresh.decoder.decode(cache, pending, condition, current, generator())
            taken.append(memory.bytes)
    longer = sum(keys.nbytes for keys in beliefs[1].cache.keys) - sum(keys.nbytes for keys in beliefs[0].cache.keys)
    assert abs(taken[1] - taken[0]) < longer < plans * longer


class Reads(TorchDispatchMode):
    """Counts how often Python looks at a number of a tensor, which waits for the device where there is one."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        self.count += function in (aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", ORDERS)
def test_a_rollout_waits_for_its_device_at_its_ends_only(fresh, order, monkeypatch):
    monkeypatch.setattr(dida, "_on_host", lambda tensor: False)  # as where tensors lie on a device
    world = fresh.with_decoding("dida", passes=3, order=order)
    belief, counts = world.observe(SEEN[:1]), []
    for horizon in (1, 2, 6):
        with Reads() as reads:
            world.imagine(belief, tiny.plans(2, horizon))
        counts.append(reads.count)
    assert counts[0] <= 4 and len(set(counts)) == 1


@pytest.mark.parametrize("decoding", ["dida", "autoregressive"])
def test_half_precision_imagines_nearly_the_same(fresh, decoding):
    actions = tiny.plans(3, 5)
    world = fresh.with_decoding(decoding)
    exact = world.imagine(world.observe(SEEN[:2], DONE[:1]), actions, generator())
    world.backbone.bfloat16()
    found = world.imagine(world.observe(SEEN[:2], DONE[:1]), actions, generator())
    assert found.reward_SH.dtype == torch.float32
    torch.testing.assert_close(found.reward_SH[:, 0], exact.reward_SH[:, 0], atol=0.05, rtol=0.0)
    torch.testing.assert_close(found.proprio_SHP[:, 0], exact.proprio_SHP[:, 0], atol=0.1, rtol=0.0)


def test_same_generator_same_bytes(world):
    belief, actions = world.observe(SEEN[:1]), tiny.plans(2, 3)
    first = bytes_of(world.imagine(belief, actions, generator(5)))
    assert bytes_of(world.imagine(belief, actions, generator(5))) == first
    if world.config.decoding == "dida":
        assert bytes_of(world.imagine(belief, actions, generator(6))) != first


class Spy:
    """Keeps what a decoder was given and what came out."""

    def __init__(self, decoder):
        self.decoder, self.calls = decoder, []

    def decode(self, cache, pending, condition, current, draws):
        start = cache.total_length
        self.calls.append((start, pending.shape[1], self.decoder.decode(cache, pending, condition, current, draws)))
        return self.calls[-1][-1]


class SilentPath(UniformPath):
    """Noise without chance."""

    def source(self, current_SN, generator):
        return torch.arange(current_SN.shape[-1]).expand_as(current_SN) % self.size


@torch.inference_mode()
@pytest.mark.parametrize("decoding", ["dida", "autoregressive"])
def test_beyond_the_window_imagination_goes_on_from_its_own_latest_states(decoding, monkeypatch):
    monkeypatch.setitem(PATHS, "uniform", SilentPath)
    world = tiny.make_world(decoding=decoding)
    layout, backbone = world.layout, world.backbone
    spy = Spy(world.decoder)
    world.__dict__["decoder"] = spy
    actions = tiny.plans(2, 5)
    world.imagine(world.observe(SEEN[:1]), actions, generator())
    # Window of 4: one observed and three imagined states, then two imagined ones are the context of the next two.
    assert [start for start, *_ in spy.calls][3] == layout.text_tokens
    assert max(start + pending for start, pending, _ in spy.calls) + layout.state_tokens <= layout.length(4)
    for h, context in ((3, [1, 2]), (4, [1, 2, 3])):
        pieces = [world._text(EPISODE.instruction).expand(2, -1, -1)]
        for t in context:
            state = spy.calls[t][-1]
            embeds = backbone.embed(layout.state_ids(state.codes_SN, state.proprio_SP))
            if t > context[0]:
                action_embeds, condition = world._act(actions[:, t])
                pieces.append(action_embeds)
                embeds = embeds + condition[:, None]
            pieces.append(embeds)
        action_embeds, condition = world._act(actions[:, h])
        clean = torch.cat([*pieces, action_embeds], 1)
        found = spy.calls[h][-1]
        codes, proprio = found.codes_SN, found.proprio_SP
        if decoding == "dida":
            codes, proprio = (torch.arange(n)[None].expand(2, -1) % size for n, size in ((8, 12), (3, 16)))
        last = backbone.embed(layout.state_ids(codes, proprio)) + condition[:, None]
        clean, noisy = (clean, last) if decoding == "dida" else (torch.cat([clean, last], 1), last[:, :0])
        stream = torch.cat([clean, noisy], 1)
        mask = causal_then_parallel(clean.shape[1], noisy.shape[1])
        hidden = backbone.core(stream, torch.arange(stream.shape[1]), mask)
        logits = state_logits(backbone, layout, hidden[:, -layout.state_tokens :], spy.calls[h - 1][-1].proprio_SP)
        torch.testing.assert_close(found.logits.frame, logits.frame, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found.logits.proprio, logits.proprio, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found.logits.reward, logits.reward, atol=2e-5, rtol=1e-4)


def test_the_path_asked_for_decodes_from_the_state_before():
    world = tiny.make_world(paths=("uniform", "state_coupled", "mask"))
    belief, actions = world.observe(SEEN[:1]), tiny.plans(2, 3)
    found = {}
    for name in world.config.paths:
        other = world.with_decoding("dida", path=name)
        assert other.config.paths[0] == name and set(other.config.paths) == set(world.config.paths)
        found[name] = other.imagine(belief, actions, generator())
    assert_same(found["uniform"], world.imagine(belief, actions, generator()))
    assert not torch.equal(found["uniform"].tokens_SHN, found["mask"].tokens_SHN)
    # A coupled source is no chance; the state that was observed, and then each imagined one, is read.
    coupled = world.with_decoding("dida", path="state_coupled")
    assert_same(coupled.imagine(belief, actions, generator(7)), found["state_coupled"])
    sources = []
    decoder = coupled.decoder
    object.__setattr__(decoder, "path", replace(decoder.path, frame=Noted(decoder.path.frame, sources)))
    coupled.imagine(belief, actions, generator())
    assert torch.equal(sources[0], belief.tokens_N.expand(2, -1))
    for h in (1, 2):
        assert torch.equal(sources[h], found["state_coupled"].tokens_SHN[:, h - 1])


class Noted:
    """Keeps what states decoding started from."""

    def __init__(self, path, sources):
        self.path, self.sources = path, sources

    def source(self, current_SN, draws):
        self.sources.append(current_SN)
        return self.path.source(current_SN, draws)

    def step(self, *arguments):
        return self.path.step(*arguments)


def test_decoders_are_exchangeable_on_one_set_of_weights(fresh):
    belief, actions = fresh.observe(SEEN[:1]), tiny.plans(2, 2)
    other = fresh.with_decoding("autoregressive")
    assert other.backbone is fresh.backbone
    assert not torch.equal(
        other.imagine(belief, actions).tokens_SHN, fresh.imagine(belief, actions, generator()).tokens_SHN
    )
    refined = fresh.with_decoding("dida", passes=3, temperature=1.0)
    assert refined.imagine(belief, actions, generator()).tokens_SHN.shape == (2, 2, 8)
    with pytest.raises(ValueError, match="were adapted with uniform, not with 'mask': run"):
        fresh.with_decoding("dida", path="mask")
    with pytest.raises(ValueError, match="did you mean 'metric'"):
        fresh.with_decoding("dida", path="metrics")
    raw = tiny.make_world(paths=(), decoding="autoregressive")
    with pytest.raises(ValueError, match="train dida"):
        raw.with_decoding("dida").imagine(raw.observe(SEEN[:1]), actions, generator())


# -- render -----------------------------------------------------------------------------------------------------------


def test_rendering_decodes_the_chosen_plans_and_blocks_camera_by_camera(world):
    found = world.imagine(world.observe(SEEN[:1]), tiny.plans(3, 4), generator())
    frames = world.render(found, [2, 0], [3, 1, 0])
    assert set(frames) == set(tiny.CAMERAS)
    for c, camera in enumerate(tiny.CAMERAS):
        assert frames[camera].shape == (2, 3, 8, 8, 3) and frames[camera].dtype == np.uint8
        codes = found.tokens_SHN[2, 1, 4 * c : 4 * c + 4]
        assert np.array_equal(frames[camera][0, 1], world.frames.decode(codes[None])[0])
    with pytest.raises(ValueError, match="no frame tokens"):
        world.render(replace(found, tokens_SHN=None), [0], [0])


# -- what is refused --------------------------------------------------------------------------------------------------


def test_histories_that_do_not_fit_are_refused(world):
    for history, actions in (([], []), (SEEN[:2], []), (SEEN[:1], DONE[:1])):
        with pytest.raises(ValueError, match="observations need"):
            world.observe(history, actions)
    with pytest.raises(ValueError, match=r"an action block must be 2 x 2 finite numbers"):
        world.observe(SEEN[:2], [DONE[0][:1]])


def without(observation: Observation, camera: str) -> Observation:
    return replace(observation, frames={name: f for name, f in observation.frames.items() if name != camera})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda o: without(o, "wrist"), r"reads cameras \('front', 'wrist'\); the observation has \('front',\)"),
        (lambda o: replace(o, frames={n: f[:4] for n, f in o.frames.items()}), "render at 8 x 8 pixels"),
        (lambda o: replace(o, frames={n: f.astype(np.float32) for n, f in o.frames.items()}), "expected uint8"),
        (lambda o: replace(o, proprio=o.proprio[:2]), r"proprio must be 3 finite numbers \(x, y, grip\)"),
        (lambda o: replace(o, proprio=o.proprio * np.nan), "proprio must be 3 finite numbers"),
        (
            lambda o: replace(o, instruction="go to the far right"),
            "instruction of 19 bytes; this model reads at most 12",
        ),
    ],
)
def test_observations_that_do_not_fit_are_refused(world, spoil, message):
    with pytest.raises(ValueError, match=message):
        world.observe([spoil(SEEN[0])])
    with pytest.raises(ValueError, match=message):
        world.extend(world.observe(SEEN[:1]), DONE[0], spoil(SEEN[1]))


@pytest.mark.parametrize("shape", [(3, 2, 2), (3, 0, 2, 2), (0, 2, 2, 2), (3, 2, 1, 2), (3, 2, 2, 3)])
def test_plans_of_another_shape_are_refused(world, shape):
    with pytest.raises(ValueError, match=r"actions must be \[S, H, 2, 2\]"):
        world.imagine(world.observe(SEEN[:1]), torch.zeros(shape), generator())


def test_actions_that_are_no_numbers_are_refused(world):
    actions = tiny.plans(2, 2)
    actions[1, 1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        world.imagine(world.observe(SEEN[:1]), actions, generator())
    with pytest.raises(ValueError, match="finite numbers"):
        world.extend(world.observe(SEEN[:1]), DONE[0] * np.nan, SEEN[1])


@pytest.mark.parametrize("kind", ["vision", "state", "reward", "success"])
def test_nan_weights_are_named_whichever_head_they_are_in(fresh, kind):
    fresh.backbone.lm_head.weight[getattr(fresh.layout.vocabulary, kind).start, 0] = torch.nan
    with pytest.raises(ValueError, match="candidate 0 at block 0"):
        fresh.imagine(fresh.observe(SEEN[:1]), tiny.plans(2, 2), generator())


def test_nan_is_named_with_its_candidate_and_block(fresh):
    action = fresh.layout.vocabulary.action
    fresh.backbone.model.embed_tokens.weight[action.stop - 1] = torch.nan  # only a large action reads this row
    actions = torch.zeros(3, 3, tiny.BLOCK, tiny.ACTIONS)
    fresh.imagine(fresh.observe(SEEN[:1]), actions, generator())
    actions[1, 2] = 1.0
    with pytest.raises(ValueError, match="NaN for candidate 1 at block 2"):
        fresh.imagine(fresh.observe(SEEN[:1]), actions, generator())
