"""Contracts that every planner in the registry keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_embodied.planners.dynamics import TrueDynamics, evaluator
from emu_embodied.planners.objectives import PredictedReward
from emu_embodied.planners.registry import PLANNERS, make_planner
from emu_embodied.planners.sampling import PlanSpace, correlated_noise, shift
from tests.point_mass import PointMass

SPACE = PlanSpace(horizon=4, block=5, action_dim=3)
REFINING = sorted(set(PLANNERS) - {"shooting"})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quadratic(actions_SHKA: torch.Tensor) -> torch.Tensor:
    """Lowest (0) where every action is (0.5, -0.3, 0.9)."""
    return (actions_SHKA - torch.tensor([0.5, -0.3, 0.9])).square().mean(dim=(1, 2, 3))


@pytest.fixture(params=sorted(PLANNERS))
def planner(request):
    return make_planner(request.param, SPACE)


@pytest.mark.parametrize("name", REFINING)
def test_refining_beats_shooting_on_a_quadratic(name):
    cost = [make_planner(name, SPACE).plan(quadratic, None, seeded(s)).cost for s in range(5)]
    control = [make_planner("shooting", SPACE).plan(quadratic, None, seeded(s)).cost for s in range(5)]
    assert max(cost) < min(control)
    refined = make_planner(name, SPACE, iterations=15).plan(quadratic, None, seeded())
    assert refined.cost < 0.02


def test_reaches_with_a_point_mass(planner):
    simulator = PointMass()
    simulator.reset(seed=3)
    space = PlanSpace(horizon=4, block=5, action_dim=2)
    reaching = type(planner)(space, planner.config)
    evaluate = evaluator(TrueDynamics(simulator), PredictedReward(last_weight=4.0))
    plan = reaching.plan(evaluate, None, seeded())
    still = float(evaluate(torch.zeros(1, 4, 5, 2))[0])
    assert plan.cost < still - 0.25
    assert plan.cost == pytest.approx(float(evaluate(plan.actions_HKA[None])[0]), abs=1e-6)


def test_point_mass_better_than_shooting():
    simulator = PointMass()
    space = PlanSpace(horizon=6, block=5, action_dim=2, knots_per_block=5)
    evaluate = evaluator(TrueDynamics(simulator), PredictedReward())
    control = make_planner("shooting", space).plan(evaluate, None, seeded()).cost
    for name in REFINING:
        assert make_planner(name, space).plan(evaluate, None, seeded()).cost < control


def test_cost_is_of_the_returned_actions(planner):
    plan = planner.plan(quadratic, None, seeded())
    assert plan.cost == pytest.approx(float(quadratic(plan.actions_HKA[None])[0]), abs=1e-7)
    assert plan.actions_HKA.shape == (4, 5, 3)
    assert plan.evaluations == planner.config.samples * planner.config.iterations
    assert list(plan.best_costs) == sorted(plan.best_costs, reverse=True)
    assert len(plan.best_costs) == planner.config.iterations
    assert plan.best_costs[-1] == plan.cost


@pytest.mark.parametrize("name", REFINING)
def test_mean_as_answer(name):
    planner = make_planner(name, SPACE, answer="mean")
    plan = planner.plan(quadratic, None, seeded())
    assert plan.cost == pytest.approx(float(quadratic(plan.actions_HKA[None])[0]), abs=1e-7)
    assert plan.evaluations == planner.config.samples * planner.config.iterations + 1


def test_stays_in_the_box(planner):
    seen = []

    def outside(actions_SHKA):
        seen.append(actions_SHKA)
        return -actions_SHKA.sum(dim=(1, 2, 3))  # best is +infinity: the box must stop it

    plan = planner.plan(outside, 10 * torch.ones(4, 5, 3), seeded())
    assert torch.cat([*seen, plan.actions_HKA[None]]).abs().max() <= 1.0
    assert plan.actions_HKA.max() == 1.0


def test_same_generator_same_bytes(planner):
    first, second = (planner.plan(quadratic, None, seeded(7)) for _ in range(2))
    other = planner.plan(quadratic, None, seeded(8))
    assert first.actions_HKA.numpy().tobytes() == second.actions_HKA.numpy().tobytes()
    assert first.best_costs == second.best_costs
    assert not torch.equal(first.actions_HKA, other.actions_HKA)


def test_first_candidate_is_the_mean_and_a_warm_start_helps(planner):
    firsts = []

    def recording(actions_SHKA):
        firsts.append(actions_SHKA[0].clone())
        return quadratic(actions_SHKA)

    cold = planner.plan(recording, None, seeded())
    assert torch.equal(firsts[0], torch.zeros(4, 5, 3))
    best = torch.tensor([0.5, -0.3, 0.9]).expand(4, 5, 3)
    firsts.clear()
    warm = planner.plan(recording, best, seeded())
    assert torch.allclose(firsts[0], best)
    assert warm.cost < 1e-10 < cold.cost


def test_worst_costs_are_never_chosen(planner):
    def broken(actions_SHKA):
        cost_S = quadratic(actions_SHKA)
        cost_S[1::2] = torch.nan
        cost_S[2::4] = -torch.inf
        return cost_S

    samples = planner.config.samples
    with pytest.warns(RuntimeWarning, match=f"{samples * 3 // 4} of {samples} plan costs are not finite"):
        plan = planner.plan(broken, None, seeded())
    assert plan.cost == pytest.approx(float(quadratic(plan.actions_HKA[None])[0]), abs=1e-7)


@pytest.mark.filterwarnings("ignore:.*plan costs are not finite")
def test_no_finite_cost_is_an_error(planner):
    with pytest.raises(ValueError, match="none of the 64 candidate plans has a finite cost"):
        planner.plan(lambda actions: torch.full((len(actions),), torch.nan), None, seeded())


def test_wrong_shapes_are_named(planner):
    with pytest.raises(ValueError, match="one cost for each of 64 plans"):
        planner.plan(lambda actions: torch.zeros(len(actions), 1), None, seeded())
    with pytest.raises(ValueError, match=r"warm start must be .*\[4, 5, 3\], got \[3, 5, 3\]"):
        planner.plan(quadratic, torch.zeros(3, 5, 3), seeded())


def test_actions_are_held_over_their_knots(planner):
    space = PlanSpace(horizon=2, block=6, action_dim=3, knots_per_block=2)
    plan = type(planner)(space, planner.config).plan(quadratic, None, seeded())
    held = plan.actions_HKA.reshape(2, 2, 3, 3)
    assert torch.equal(held, held[:, :, :1].expand_as(held))
    assert not torch.equal(held[:, 0], held[:, 1])


def test_unknown_planner_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'cem'"):
        make_planner("cen", SPACE)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"elite_share": 1.5}, r"elite_share must be in \(0, 1\]"),
        ({"correlation": 1.0}, r"correlation must be in \[0, 1\)"),
        ({"samples": 0}, "samples and iterations"),
        ({"momentum": 1.0}, "momentum"),
        ({"kept_elites": -1}, "kept_elites"),
        ({"init_std": 0.0}, "init_std"),
    ],
)
def test_bad_settings(settings_, message):
    with pytest.raises(ValueError, match=message):
        make_planner("cem", SPACE, **settings_)
    with pytest.raises(ValueError, match="must divide the block of 5"):
        PlanSpace(horizon=2, block=5, action_dim=1, knots_per_block=2)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.sampled_from([(6, 1), (6, 2), (6, 3), (5, 5)]), st.integers(1, 4), st.integers(0, 99))
def test_knots_round_trip(horizon, block, action_dim, seed):
    steps, knots = block
    space = PlanSpace(horizon=horizon, block=steps, action_dim=action_dim, knots_per_block=knots)
    knots_SMA = torch.rand(3, space.knots, action_dim, generator=seeded(seed)) * 2 - 1
    actions_SHKA = space.expand(knots_SMA)
    assert actions_SHKA.shape == (3, horizon, steps, action_dim)
    for knots_MA, actions_HKA in zip(knots_SMA, actions_SHKA, strict=True):
        assert torch.allclose(space.to_knots(actions_HKA), knots_MA, atol=1e-6)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_noise_has_unit_variance_and_the_asked_correlation(correlation):
    noise_SMA = correlated_noise(20_000, 6, 2, correlation=correlation, generator=seeded())
    assert torch.allclose(noise_SMA.std(dim=0), torch.ones(6, 2), atol=0.03)
    neighbours = (noise_SMA[:, 1:] * noise_SMA[:, :-1]).mean(dim=0)
    assert torch.allclose(neighbours, torch.full((5, 2), correlation), atol=0.03)


def test_smallest_search(planner):
    tiny = make_planner(next(n for n, (_, c) in PLANNERS.items() if c is type(planner)), SPACE, samples=1, iterations=1)
    assert torch.equal(tiny.plan(quadratic, None, seeded()).actions_HKA, torch.zeros(4, 5, 3))


def test_shift_repeats_the_last_block():
    plan = torch.arange(4.0)[:, None, None].expand(4, 2, 1)
    assert shift(plan)[:, 0, 0].tolist() == [1, 2, 3, 3]
    assert shift(plan, 3)[:, 0, 0].tolist() == [3, 3, 3, 3]
    assert shift(plan, 4)[:, 0, 0].tolist() == [3, 3, 3, 3]
