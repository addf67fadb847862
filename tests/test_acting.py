"""The policy role: what is drawn is what is scored, alone or in a batch, from a picture or from its tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from emu_embodied.acting import Actor, Situations
from emu_embodied.records import Observation
from emu_embodied.world_model import WorldModel
from tests import tiny


def observations(count: int = 5, t: int = 0) -> list[Observation]:
    return [tiny.observation(tiny.make_episode(seed), t) for seed in range(count)]


def blocks(count: int, seed: int = 0) -> np.ndarray:
    return tiny.plans(count, 1, seed)[:, 0].numpy()


def histories(actor: Actor, states: int, count: int = 5) -> Situations:
    found = actor.see(observations(count))
    for t in range(1, states):
        found = actor.follow(found, blocks(count, t), observations(count, t))
    return found


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module", params=[(), tiny.OBJECTS], ids=["plain", "objects"])
def world(request: pytest.FixtureRequest) -> WorldModel:
    return tiny.make_world(objects=request.param)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("context", "states"), [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2)])
def test_log_probs_are_those_of_the_draw(world, context, states, temperature):
    actor = Actor(world, context_states=context)
    situations = histories(actor, states)
    sample = actor.act(situations, torch.Generator().manual_seed(1), temperature)
    scores = actor.log_probs(situations, sample.bins_BA, temperature)
    assert torch.allclose(scores.log_probs_BA, sample.log_probs_BA, atol=1e-5)
    assert scores.log_probs_BA.shape == scores.entropy_BA.shape == sample.bins_BA.shape == (5, tiny.ACTIONS)
    assert sample.actions_BKA.shape == (5, tiny.BLOCK, tiny.ACTIONS)
    assert torch.equal(world.actions.encode(sample.actions_BKA), sample.bins_BA)


def test_draws_follow_the_distribution(world):
    actor = Actor(world)
    situations = actor.see(observations(1)).rows([0] * 4000)
    bins = actor.act(situations, torch.Generator().manual_seed(0), 1.5).bins_BA
    pairs = torch.cartesian_prod(*[torch.arange(8)] * 2)
    scores = actor.log_probs(situations.rows(slice(len(pairs))), pairs, 1.5)
    wanted = scores.log_probs_BA.sum(1).exp()
    assert float(wanted.sum()) == pytest.approx(1, abs=1e-4)  # the last dimension is drawn given the first
    found = torch.bincount(bins[:, 0] * 8 + bins[:, 1], minlength=64) / 4000
    assert (found - wanted).abs().sum() < 0.15
    first = wanted.view(8, 8).sum(1)
    assert float(scores.entropy_BA[0, 0]) == pytest.approx(float(-(first * first.log()).sum()), abs=1e-4)


@pytest.mark.parametrize("context", [1, 2])
def test_a_batch_is_its_rows(world, context):
    """Also rows of different age, each with its own generator."""
    actor = Actor(world, context_states=context)
    mixed = Situations.cat([histories(actor, 1, 2), histories(actor, 3, 3)])
    seeds = range(5)
    together = actor.act(mixed, generators(*seeds), 1.0)
    scored = actor.log_probs(mixed, together.bins_BA)
    assert torch.allclose(scored.log_probs_BA, together.log_probs_BA, atol=1e-5)
    for i in seeds:
        alone = actor.act(mixed.rows([i]), generators(i), 1.0)
        assert torch.equal(alone.bins_BA[0], together.bins_BA[i])
        assert torch.allclose(alone.log_probs_BA[0], together.log_probs_BA[i], atol=1e-5)


def test_the_same_seed_gives_the_same_bytes(world):
    actor = Actor(world)
    situations = actor.see(observations(16))
    drawn = [actor.act(situations, torch.Generator().manual_seed(seed), 2.0) for seed in (0, 0, 1)]
    bytes_of = [(s.bins_BA.numpy().tobytes(), s.log_probs_BA.numpy().tobytes()) for s in drawn]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]


def test_what_is_kept_is_small_and_enough(world):
    """The last states alone decide, and only as many as the actor looks at."""
    actor = Actor(world, context_states=2)
    long, short = histories(actor, 4), actor.see(observations(t=2))
    short = actor.follow(short, blocks(5, 3), observations(t=3))
    for mine, other in zip(*([getattr(s, n) for n in Situations.__slots__] for s in (long, short)), strict=True):
        assert torch.equal(mine, other)
    assert {long.text_BL.dtype, long.codes_BTN.dtype, long.proprio_BTP.dtype} == {torch.int16}
    assert long.nbytes < 5 * 200
    assert not torch.equal(
        actor.log_probs(long, blocks_of(actor, 5)).log_probs_BA,
        actor.log_probs(actor.see(observations(t=3)), blocks_of(actor, 5)).log_probs_BA,
    )


def blocks_of(actor: Actor, count: int) -> torch.Tensor:
    return torch.zeros(count, actor.world.layout.action_dim, dtype=torch.int16)


def test_objects_are_seen_as_a_belief_sees_them(world):
    situations = Actor(world).see(observations())
    for row, observation in enumerate(observations()):
        wanted = world.observe([observation]).objects_O
        found = world.proprio.decode(situations.proprio_BTP[row, 0].long())[len(tiny.FIELDS) :]
        half_a_bin = torch.tensor([(field.high - field.low) / 32 for field in world.config.objects])
        assert found.shape == wanted.shape and bool(((found - wanted).abs() <= half_a_bin + 1e-5).all())
    places = situations.proprio_BTP[:, 0, len(tiny.FIELDS) :]
    assert not world.config.objects or len(places.unique(dim=0)) > 1


def test_imagined_states_are_followed_as_tokens(world):
    actor = Actor(world, context_states=2)
    seen = actor.see(observations())
    after = actor.follow(seen, blocks(5), observations(t=1))
    there = actor.see(observations(t=1))
    again = actor.follow_tokens(seen, blocks(5), there.codes_BTN[:, -1], there.proprio_BTP[:, -1])
    assert all(torch.equal(getattr(after, name), getattr(again, name)) for name in Situations.__slots__)


def test_scores_have_a_gradient_into_every_layer(world):
    world.backbone.requires_grad_(True)
    try:
        actor = Actor(world)
        situations = actor.see(observations())
        sample = actor.act(situations, torch.Generator().manual_seed(0), 1.0)
        scores = actor.log_probs(situations, sample.bins_BA)
        (scores.log_probs_BA.sum() + scores.entropy_BA.sum()).backward()
        for name, parameter in world.backbone.named_parameters():
            moved = parameter.grad is not None and bool(parameter.grad.any())
            assert moved == (not name.startswith("action_embedding")), name
    finally:
        world.backbone.zero_grad()
        world.backbone.requires_grad_(False)


def test_a_new_instruction_counts_at_once(world):
    actor = Actor(world, context_states=2)
    seen, later = actor.see(observations()), observations(t=1)
    told = [replace(observation, instruction="stop") for observation in later]
    after = actor.follow(seen, blocks(5), told)
    assert torch.equal(after.text_BL, actor.see(told).text_BL)


def test_what_cannot_act_is_refused(world):
    with pytest.raises(ValueError, match="no action tokens"):
        Actor(tiny.make_world(action_bins=1))
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"context_states is {wrong}: these weights act on 1 to 3 states"):
            Actor(world, context_states=wrong)
    actor = Actor(world)
    seen = actor.see(observations())
    with pytest.raises(ValueError, match="seeded generator"):
        actor.act(seen, None, 1.0)
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        actor.act(seen, None, -1.0)
    with pytest.raises(ValueError, match="3 generators for 5 rows"):
        actor.act(seen, generators(0, 1, 2), 1.0)
    blind = replace(observations(1)[0], frames={"front": observations(1)[0].frames["front"]})
    with pytest.raises(ValueError, match="lacks wrist"):
        actor.see([blind])
    for proprio in (np.zeros(2), np.array([0, np.nan, 0])):
        with pytest.raises(ValueError, match="3 finite numbers"):
            actor.see([replace(observations(1)[0], proprio=proprio)])
