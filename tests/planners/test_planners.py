"""Contracts that every planner in the registry keeps."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_embodied.planners.cem import CategoricalConfig, ICEMConfig
from emu_embodied.planners.dynamics import TrueDynamics, evaluator
from emu_embodied.planners.objectives import PredictedReward
from emu_embodied.planners.registry import PLANNERS, has_setting, make_planner
from emu_embodied.planners.sampling import PlanSpace, carry, coloured_noise, correlated_noise, shift
from emu_embodied.tokens.actions import ActionTokenizer
from tests.point_mass import PointMass

SPACE = PlanSpace(horizon=4, block=5, action_dim=3)
REFINING = sorted(set(PLANNERS) - {"shooting"})
WITH_CENTRE = sorted(name for name in PLANNERS if has_setting(name, "answer"))


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
    assert list(plan.best_costs) == sorted(plan.best_costs, reverse=True)
    assert plan.best_costs[-1] == plan.cost


@pytest.mark.parametrize("name", sorted(PLANNERS))
def test_a_budget_is_of_imagined_blocks(name):
    tried = []
    planner = make_planner(name, SPACE, samples=24, iterations=3)
    plan = planner.plan(lambda actions: (tried.append(actions), quadratic(actions))[1], None, seeded())
    assert plan.evaluations == sum(len(actions) for actions in tried)
    blocks = sum(actions.shape[0] * actions.shape[1] for actions in tried)
    if name == "beam":
        assert 0.9 * 24 * 3 * 4 < blocks <= 24 * 3 * 4
    else:
        assert blocks == 24 * 3 * 4 and len(plan.best_costs) == 3


@pytest.mark.parametrize("name", WITH_CENTRE)
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
    assert max(float(actions.abs().max()) for actions in [*seen, plan.actions_HKA]) <= 1.0
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
    assert not firsts[0].any()
    best = torch.tensor([0.5, -0.3, 0.9]).expand(4, 5, 3)
    firsts.clear()
    warm = planner.plan(recording, best, seeded())
    assert torch.allclose(firsts[0], best[: len(firsts[0])])
    assert warm.cost < 1e-10 < cold.cost


def test_worst_costs_are_never_chosen(planner):
    def broken(actions_SHKA):
        cost_S = quadratic(actions_SHKA)
        cost_S[1::2] = torch.nan
        cost_S[2::4] = -torch.inf
        return cost_S

    with pytest.warns(RuntimeWarning, match=r"\d+ of \d+ plan costs are not finite; taken as worst"):
        plan = planner.plan(broken, None, seeded())
    assert plan.cost == pytest.approx(float(quadratic(plan.actions_HKA[None])[0]), abs=1e-7)


@pytest.mark.filterwarnings("ignore:.*plan costs are not finite")
def test_no_finite_cost_is_an_error(planner):
    with pytest.raises(ValueError, match=r"none of the \d+ candidate plans has a finite cost"):
        planner.plan(lambda actions: torch.full((len(actions),), torch.nan), None, seeded())


def test_wrong_shapes_are_named(planner):
    with pytest.raises(ValueError, match=r"one cost for each of \d+ plans"):
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
    with pytest.raises(ValueError, match="unknown setting of cem 'elite_shares': did you mean 'elite_share'"):
        make_planner("cem", SPACE, elite_shares=0.5)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"elite_share": 1.5}, r"elite_share must be in \(0, 1\]"),
        ({"correlation": 1.0}, r"correlation must be in \[0, 1\)"),
        ({"samples": 0}, "samples and iterations"),
        ({"momentum": 1.0}, "momentum"),
        ({"kept_elites": -1}, "kept_elites"),
        ({"init_std": 0.0}, "init_std"),
        ({"beta": -0.5}, "beta must not be negative"),
        ({"carried": -1}, "carried must not be negative"),
        ({"proposal_share": 1.1}, r"proposal_share must be in \[0, 1\]"),
        ({"decay": 0.9}, "decay must be at least 1"),
        ({"bins": 1}, "bins must be at least 2"),
        ({"smoothing": 0.0}, "smoothing must be positive"),
        ({"width": 0}, "width must be at least 1"),
    ],
)
def test_bad_settings(settings_, message):
    [setting] = settings_
    name = next(name for name in PLANNERS if has_setting(name, setting))
    with pytest.raises(ValueError, match=message):
        make_planner(name, SPACE, **settings_)
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
    assert torch.allclose(space.to_knots(actions_SHKA), knots_SMA, atol=1e-6)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_noise_has_unit_variance_and_the_asked_correlation(correlation):
    noise_SMA = correlated_noise(20_000, 6, 2, correlation=correlation, generator=seeded())
    assert torch.allclose(noise_SMA.std(dim=0), torch.ones(6, 2), atol=0.03)
    neighbours = (noise_SMA[:, 1:] * noise_SMA[:, :-1]).mean(dim=0)
    assert torch.allclose(neighbours, torch.full((5, 2), correlation), atol=0.03)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.floats(0.0, 4.0))
def test_coloured_noise_has_unit_variance(knots, beta):
    noise_SMA = coloured_noise(20_000, knots, 2, beta=beta, generator=seeded())
    assert torch.allclose(noise_SMA.std(dim=0), torch.ones(knots, 2), atol=0.04)
    assert noise_SMA.mean().abs() < 0.03


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_coloured_noise_has_the_asked_spectrum(beta):
    """How knots correlate is the Fourier transform of the power, over a series of four times the plan."""
    frequency = torch.arange(32) / 32
    power = torch.minimum(frequency, 1 - frequency).clamp_min(1 / 32) ** -beta
    noise_SMA = coloured_noise(20_000, 8, 1, beta=beta, generator=seeded())
    for lag in range(1, 8):
        expected = float((power * torch.cos(2 * torch.pi * frequency * lag)).sum() / power.sum())
        found = float((noise_SMA[:, lag:] * noise_SMA[:, :-lag]).mean())
        assert found == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("knots", [2, 5])
def test_drifting_noise_explores_further(knots):
    """The sum over a plan, how far a velocity leads, is what colour is for; also over the few knots of blocks."""
    reach = [coloured_noise(4096, knots, 1, beta=beta, generator=seeded()).sum(1).std() for beta in (0.0, 1.0, 3.0)]
    assert reach[0] * 1.1 < reach[1] < reach[2] / 1.05


@pytest.mark.parametrize("name", sorted(PLANNERS))
def test_smallest_search(name):
    tiny = make_planner(name, SPACE, samples=1, iterations=1)
    assert torch.equal(tiny.plan(quadratic, None, seeded()).actions_HKA, torch.zeros(4, 5, 3))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.floats(1.0, 4.0))
def test_fewer_candidates_in_later_iterations_and_as_many_in_all(samples, iterations, decay):
    counts = ICEMConfig(samples=samples, iterations=iterations, decay=decay).counts()
    assert sum(counts) == samples * iterations and len(counts) == iterations and min(counts) >= 1
    assert all(later <= sooner + 1 for sooner, later in itertools.pairwise(counts))  # rounded
    if decay == 1.0:
        assert set(counts) == {samples}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(PLANNERS)), st.integers(0, 10_000), st.integers(1, 24), st.integers(1, 3))
def test_any_search_keeps_the_contract(name, seed, samples, iterations):
    planner = make_planner(name, SPACE, samples=samples, iterations=iterations, carried=2)
    start = torch.rand(4, 5, 3, generator=seeded(seed + 1)) * 2.4 - 1.2
    start = start[:, :1].expand(4, 5, 3)  # what one knot a block can hold
    plan = planner.plan(quadratic, start, seeded(seed))
    again = planner.plan(quadratic, start, seeded(seed))
    assert plan.actions_HKA.numpy().tobytes() == again.actions_HKA.numpy().tobytes()
    assert plan.actions_HKA.abs().max() <= 1
    assert plan.cost == pytest.approx(float(quadratic(plan.actions_HKA[None])[0]), abs=1e-6)
    assert plan.cost <= float(quadratic(start.clamp(-1, 1)[None])[0]) + 1e-6  # a warm start never hurts


@pytest.mark.parametrize("name", sorted(PLANNERS))
def test_next_decision_starts_with_what_was_carried(name):
    planner = make_planner(name, SPACE, carried=3)
    plan = planner.plan(quadratic, None, seeded())
    warm = carry(plan, 1)
    assert warm.shape == (4, 4, 5, 3)
    assert torch.equal(warm[0], shift(plan.actions_HKA, 1))
    assert plan.cost <= quadratic(plan.carried_SHKA)[0] <= quadratic(plan.carried_SHKA)[-1]
    tried = []
    planner.plan(lambda actions: (tried.append(actions), quadratic(actions))[1], warm, seeded(1))
    whole = next(actions for actions in tried if actions.shape[1] == 4)
    assert torch.allclose(whole[0], warm[0])
    assert all((whole - one).abs().amax(dim=(1, 2, 3)).min() < 1e-6 for one in warm)


def test_nothing_is_carried_unless_asked():
    plan = make_planner("cem", SPACE).plan(quadratic, None, seeded())
    assert torch.equal(carry(plan, 2), shift(plan.actions_HKA, 2))


def test_elites_stay_candidates():
    """Where later candidates are worse by chance alone, the elites fitted to still are the best of all iterations."""
    calls = []

    def worsening(actions_SHKA):
        calls.append(quadratic(actions_SHKA) + len(calls))
        return calls[-1]

    plans = [make_planner("cem", SPACE, kept_elites=kept, answer="mean") for kept in (0, 8)]
    forgot, kept = (plan.plan(worsening, None, seeded()).actions_HKA for plan in plans)
    assert not torch.equal(forgot, kept)
    first = min(float(costs.min()) for costs in calls[:4])
    assert plans[1].plan(quadratic, None, seeded()).best_costs[0] == pytest.approx(first, abs=1e-6)


def test_icem_is_a_setting_of_cem():
    settings_ = {"beta": 2.0, "carried": 3, "decay": 1.25}
    one, other = (make_planner(name, SPACE, **settings_).plan(quadratic, None, seeded()) for name in ("cem", "icem"))
    assert torch.equal(one.actions_HKA, other.actions_HKA)


class Sure:
    """Proposes the best block, whatever was done before, and remembers what it was asked."""

    def __init__(self, block: torch.Tensor):
        self.block = block
        self.asked = []

    def __call__(self, done_ShKA, generator):
        self.asked.append(tuple(done_ShKA.shape))
        assert done_ShKA.shape[2:] == (5, 3)
        return self.block.expand(len(done_ShKA), -1, -1)


@pytest.mark.parametrize("name", sorted(PLANNERS))
def test_proposals_are_tried(name):
    sure = Sure(torch.tensor([0.5, -0.3, 0.9]).expand(5, 3))
    plan = make_planner(name, SPACE).plan(quadratic, None, seeded(), sure)
    assert plan.cost < 1e-10
    assert len(sure.asked) == 4 and [h for _, h, _, _ in sure.asked] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", sorted(PLANNERS))
def test_no_proposals_where_their_share_is_nothing(name):
    sure = Sure(torch.tensor([0.5, -0.3, 0.9]).expand(5, 3))
    with_none = make_planner(name, SPACE, proposal_share=0.0).plan(quadratic, None, seeded(), sure)
    assert not sure.asked
    assert with_none.cost == make_planner(name, SPACE).plan(quadratic, None, seeded()).cost


def test_bins_keep_two_ways_of_going():
    """Left and right are equally good, the middle is not."""

    def apart(actions_SHKA):
        return -actions_SHKA.mean(dim=(1, 2, 3)).abs()

    space = PlanSpace(horizon=1, block=5, action_dim=1)
    planner = make_planner("categorical", space, answer="mean", iterations=8, samples=64)
    assert planner.plan(apart, None, seeded()).cost < -0.8


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 64), st.integers(0, 99))
def test_bins_are_those_of_action_tokens(bins, seed):
    tokenizer = ActionTokenizer(bins=bins, block=5)
    distribution = CategoricalConfig(bins=bins, smoothing=1e-6, momentum=0.0).around(torch.zeros(4, 3))
    drawn_SMA = distribution.shaped(torch.randn(16, 4, 3, generator=seeded(seed)))
    held = drawn_SMA[:, :, None].expand(16, 4, 5, 3)
    assert torch.allclose(tokenizer.decode(tokenizer.encode(held)), held)
    distribution.fit(drawn_SMA[:1].expand(8, -1, -1))
    assert torch.allclose(distribution.centre_MA, drawn_SMA[0])
    assert torch.allclose(distribution.shaped(torch.zeros(1, 4, 3)), drawn_SMA[:1])


def test_a_beam_goes_on_from_the_best_beginnings():
    """A plan whose blocks are right one after another is found although no whole plan like it was ever drawn."""
    target_HA = torch.tensor([[0.8, -0.8], [-0.8, 0.8], [0.8, 0.8], [-0.8, -0.8]])

    def cost(actions_SHKA):
        return (actions_SHKA.mean(dim=2) - target_HA[: actions_SHKA.shape[1]]).square().mean(dim=(1, 2))

    space = PlanSpace(horizon=4, block=5, action_dim=2)
    beam, shooting = (make_planner(name, space).plan(cost, None, seeded()).cost for name in ("beam", "shooting"))
    assert beam < 0.1 < shooting / 2


def test_shift_repeats_the_last_block():
    plan = torch.arange(4.0)[:, None, None].expand(4, 2, 1)
    assert shift(plan)[:, 0, 0].tolist() == [1, 2, 3, 3]
    assert shift(plan, 3)[:, 0, 0].tolist() == [3, 3, 3, 3]
    assert shift(plan, 4)[:, 0, 0].tolist() == [3, 3, 3, 3]
