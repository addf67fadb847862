"""The token policy's say in a plan, on a toy world whose weights are random but move with every input."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from emu_embodied.acting import Actor
from emu_embodied.planners.dynamics import ImaginedDynamics, TrueDynamics
from emu_embodied.planners.objectives import PredictedReward
from emu_embodied.planners.proposals import propose
from emu_embodied.planners.registry import make_planner
from emu_embodied.planners.sampling import PlanSpace
from emu_embodied.policies.guides import TokenGuide
from emu_embodied.policies.planning import ImaginedSource, PlanningPolicy
from emu_embodied.policies.registry import PlanningBudget, PolicySpec, make_policy
from tests.point_mass import PointMass, PointMassModel
from tests.tiny import ACTIONS, BLOCK, OBJECTS, make_episode, make_world, observation, plans


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=[(), OBJECTS], ids=["plain", "objects"])
def world(request):
    return make_world(objects=request.param)


@pytest.fixture(scope="module")
def episode():
    return make_episode()


def guided(world, episode, *, temperature: float = 1.0, context_states: int = 1) -> tuple[TokenGuide, ImaginedDynamics]:
    """A guide that has seen two states, and imagination from there."""
    guide = TokenGuide(Actor(world, context_states=context_states), temperature=temperature)
    first, second = observation(episode, 0), observation(episode, 1)
    guide.reset(first)
    guide.advance(episode.actions_TKA[0], second)
    return guide, ImaginedDynamics(world, world.observe([first, second], [episode.actions_TKA[0]]))


@pytest.mark.parametrize("context_states", [1, 2])
def test_what_is_most_likely_is_proposed(world, episode, context_states):
    """At temperature 0 each block is what the policy does in the state that was imagined before it."""
    world = world.with_decoding("autoregressive")  # no noise: every imagination of a beginning is the same
    guide, dynamics = guided(world, episode, temperature=0.0, context_states=context_states)
    proposals = guide.proposals(dynamics, seeded())
    plan_HKA = propose(proposals, 1, (3, BLOCK, ACTIONS), seeded())[0]
    actor = guide.actor
    situation = actor.see([observation(episode, 0)])
    situation = actor.follow(situation, episode.actions_TKA[:1], [observation(episode, 1)])
    imagination = dynamics.imagine(plan_HKA[None], seeded())
    for h in range(3):
        assert torch.equal(plan_HKA[h], actor.act(situation).actions_BKA[0])
        numbers = [imagination.proprio_SHP] + [imagination.objects_SHO] * bool(world.config.objects)
        bins_P = world.proprio.encode(torch.cat(numbers, -1)[:, h])
        situation = actor.follow_tokens(situation, plan_HKA[None, h], imagination.tokens_SHN[:, h], bins_P)


def test_proposals_are_drawn_and_seeded(world, episode):
    guide, dynamics = guided(world, episode)
    drawn = [propose(guide.proposals(dynamics, seeded()), 6, (2, BLOCK, ACTIONS), seeded(seed)) for seed in (0, 0, 1)]
    assert drawn[0].shape == (6, 2, BLOCK, ACTIONS) and drawn[0].abs().max() <= 1
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert len(drawn[0].flatten(1).unique(dim=0)) > 1


@pytest.mark.parametrize("context_states", [1, 2])
def test_strangeness_is_what_the_policy_says_of_the_first_block(world, episode, context_states):
    guide, _ = guided(world, episode, context_states=context_states)
    actions_SHKA = plans(5, 2)
    actor = guide.actor
    situation = actor.follow(
        actor.see([observation(episode, 0)]), episode.actions_TKA[:1], [observation(episode, 1)]
    ).rows([0] * 5)
    scores = actor.log_probs(situation, world.actions.encode(actions_SHKA[:, 0]))
    expected_S = -scores.log_probs_BA.detach().mean(1) / math.log(world.config.action_bins)
    assert torch.allclose(guide.strangeness(actions_SHKA), expected_S, atol=1e-4)
    assert torch.allclose(guide.strangeness(actions_SHKA[:2]), expected_S[:2], atol=1e-4)  # the state read once serves


def test_the_usual_is_the_least_strange(world, episode):
    guide, _ = guided(world, episode)
    usual_KA = guide.actor.act(guide._situation).actions_BKA[0]
    strange_S = guide.strangeness(torch.cat([usual_KA[None, None], plans(20, 1)]))
    assert strange_S[0] <= strange_S[1:].median()
    guide.advance(episode.actions_TKA[1], observation(episode, 2))
    assert not torch.allclose(strange_S, guide.strangeness(torch.cat([usual_KA[None, None], plans(20, 1)])))


def test_a_guide_needs_an_episode_and_frames(world, episode):
    with pytest.raises(ValueError, match="temperature is -1"):
        TokenGuide(Actor(world), temperature=-1.0)
    guide = TokenGuide(Actor(world))
    with pytest.raises(ValueError, match="reset the policy"):
        guide.strangeness(plans(1, 1))
    guide.reset(observation(episode, 0))
    proposals = guide.proposals(TrueDynamics(PointMass()), seeded())
    with pytest.raises(ValueError, match="give TrueDynamics a tokenize function"):
        proposals(torch.zeros(1, 1, 5, 2), seeded())


class Prefers:
    """A guide that would always do the same, and finds all else strange."""

    def __init__(self, block_KA: torch.Tensor):
        self.block_KA = block_KA
        self.seen: list[np.ndarray] = []

    def reset(self, observation):
        self.seen = [observation.proprio]

    def advance(self, action_KA, observation):
        self.seen.append(observation.proprio)

    def proposals(self, dynamics, generator):
        return lambda done_ShKA, draws: self.block_KA.expand(len(done_ShKA), -1, -1)

    def strangeness(self, actions_SHKA):
        return (actions_SHKA[:, 0] - self.block_KA).abs().mean(dim=(1, 2))


def test_a_policy_listens_to_its_guide():
    simulator = PointMass()
    simulator.reset(seed=0)
    guide = Prefers(torch.full((5, 2), -0.625))
    planner = make_planner("cem", PlanSpace(horizon=3, block=5, action_dim=2))
    source = ImaginedSource(PointMassModel())
    policy = PlanningPolicy(planner, PredictedReward(), source, guide=guide, strangeness=1000.0)
    policy.reset(simulator.observe())
    for count in range(1, 4):
        action_KA = policy.act(simulator.observe())
        assert np.allclose(action_KA, -0.625, atol=0.02)
        assert len(guide.seen) == count
        simulator.step_block(action_KA)


def test_strangeness_needs_a_guide():
    planner = make_planner("cem", PlanSpace(horizon=3, block=5, action_dim=2))
    with pytest.raises(ValueError, match="needs a guide"):
        PlanningPolicy(planner, PredictedReward(), ImaginedSource(PointMassModel()), strangeness=0.1)


def test_costs_are_averaged_over_decodes():
    model = PointMassModel()
    planner = make_planner("cem", PlanSpace(horizon=3, block=5, action_dim=2), samples=16, iterations=2)
    policy = PlanningPolicy(planner, PredictedReward(), ImaginedSource(model), decodes=3)
    simulator = PointMass()
    simulator.reset(seed=0)
    policy.reset(simulator.observe())
    policy.act(simulator.observe())
    assert model.imagined == [48, 48]
    assert policy.decisions[0].plan.evaluations == 32


def test_who_is_guided():
    budget = PlanningBudget(samples=8, iterations=1, proposals=0.25)
    for name, expected in (("imagined", True), ("true", True), ("shooting", False), ("token", False)):
        assert PolicySpec(name=name, budget=budget).guided == expected
        assert not PolicySpec(name=name).guided
    assert PolicySpec(name="true", budget=budget).needs_model and PolicySpec(name="true", budget=budget).looks
    with pytest.raises(ValueError, match="emits no action tokens"):
        make_policy(PolicySpec(name="imagined", budget=budget), PointMass(), world_model=PointMassModel())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decodes": 0}, "decodes is 0"),
        ({"proposals": 1.5}, "proposals is 1.5"),
        ({"strangeness": -1.0}, "strangeness"),
    ],
)
def test_bad_budgets(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PlanningBudget(), **change)
