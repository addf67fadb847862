"""Noise processes: where they begin and end, and that steps lead from one marginal to the next."""

from itertools import pairwise

import pytest
import torch

from emu_embodied.decode.metric import BetaSchedule, expected_distance, pick, squared_distances, tune_schedule
from emu_embodied.decode.paths import PATHS, MaskPath, MetricPath, StateCoupledPath, UniformPath, known_path, make_path
from emu_embodied.decode.sampling import sample
from emu_embodied.tokens.sequence import MASKED, StateTokens

SIZE, COUNT = 5, 40_000
VECTORS = torch.nn.functional.normalize(torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(3)), dim=-1)
MIXTURES = {"uniform": UniformPath, "state_coupled": StateCoupledPath, "mask": MaskPath}


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param](VECTORS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def near(share: float, expected: float) -> bool:
    """Within 4.5 standard deviations of a share of COUNT draws."""
    return abs(share - expected) < 4.5 * (max(expected * (1 - expected), 1e-4) / COUNT) ** 0.5


def shares(tokens: torch.Tensor) -> list[float]:
    return [float((tokens == value).float().mean()) for value in range(MASKED, SIZE)]


# -- every path -------------------------------------------------------------------------------------------------------


def test_every_path_ends_at_the_data_and_is_a_function_of_the_generator(path):
    x1, current = (torch.randint(SIZE, (3, 7), generator=generator(seed)) for seed in (0, 5))
    source = path.source(current, generator())
    assert source.dtype == torch.int64 and source.shape == (3, 7)
    assert MASKED <= int(source.min()) <= int(source.max()) < SIZE
    assert torch.equal(path.noise(x1, torch.ones(3, 1), current, generator()), x1)
    opened = torch.full_like(x1, MASKED) if isinstance(path, MaskPath) else source
    assert torch.equal(path.step(opened, x1, 0.75, 1.0, generator()), x1)
    noisy = path.noise(x1, torch.full((3, 1), 0.5), current, generator(1))
    assert torch.equal(noisy, path.noise(x1, torch.full((3, 1), 0.5), current, generator(1)))
    assert not torch.equal(noisy, path.noise(x1, torch.full((3, 1), 0.5), current, generator(2)))


def test_noise_at_the_beginning_of_time_is_the_source(path):
    rows = 4_000
    x1, current = torch.full((rows, 10), 2), torch.full((rows, 10), 4)
    noisy = path.noise(x1, torch.zeros(1), current, generator())
    drawn = path.source(current.view(1, -1), generator(1)).view(rows, 10)
    if isinstance(path, StateCoupledPath):
        pure = (noisy == 4).all(-1)
        # Half start from the state before alone; shares from U(0, 1) leave that 1 / 10 of the other half, more or less.
        assert 0.5 < float(pure.float().mean()) < 0.68
        assert torch.equal(drawn, current)
        noisy, drawn = noisy[pure], drawn[pure]
    assert all(near(found, share) for found, share in zip(shares(noisy), shares(drawn), strict=True))


def test_the_target_only_grows_more_likely_as_t_grows(path):
    x1, current = (torch.randint(SIZE, (COUNT,), generator=generator(seed)) for seed in (0, 5))
    distances = squared_distances(VECTORS, VECTORS)
    found = []
    for t in (0.0, 0.2, 0.5, 0.8, 1.0):
        x_t = path.noise(x1, torch.tensor(t), current, generator(1))
        far = torch.where(x_t == MASKED, 9.0, distances[x_t.clamp(min=0), x1])
        found.append((float((x_t == x1).float().mean()), float(far.mean())))
    for (less, far), (more, close) in pairwise(found):
        assert more > less and close < far
    assert found[-1] == (1.0, pytest.approx(0.0, abs=1e-5))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_sampler_with_a_perfect_predictor_ends_at_the_target(path, steps):
    x1, current = (torch.randint(SIZE, (3, 50), generator=generator(seed)) for seed in (0, 5))
    draws = generator(1)
    x_t = path.source(current, draws)
    for i in range(steps):
        x_t = path.step(x_t, x1, i / steps, (i + 1) / steps, draws)
    assert torch.equal(x_t, x1)


def test_candidates_share_all_random_numbers(path):
    current = torch.randint(SIZE, (1, 200), generator=generator(5)).expand(3, -1)
    x1 = torch.randint(SIZE, (1, 200), generator=generator(6)).expand(3, -1)
    draws = generator()
    x_t = path.source(current, draws)
    for t in (0.0, 0.3):
        assert torch.equal(x_t, x_t[:1].expand(3, -1))
        x_t = path.step(x_t, x1, t, t + 0.3, draws)
    assert torch.equal(x_t, x_t[:1].expand(3, -1))
    alone = path.step(path.source(current[:1], generator(9)), x1[:1], 0.0, 0.4, generator(7))
    together = path.step(path.source(current, generator(9)), x1, 0.0, 0.4, generator(7))
    assert torch.equal(alone.expand(3, -1), together)


def test_every_row_has_its_own_t(path):
    x1, current = torch.ones(2, COUNT, dtype=torch.long), torch.full((2, COUNT), 3)
    x_t = path.noise(x1, torch.tensor([[0.1], [0.9]]), current, generator())
    early, late = ((row == 1).float().mean() for row in x_t)
    assert float(late) > 0.7 > 0.5 > float(early)


# -- mixtures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 1.0])
def test_uniform_marginals(t):
    x1 = torch.full((COUNT,), 2)
    x_t = UniformPath(VECTORS).noise(x1, torch.tensor(t), x1, generator())
    for value in range(SIZE):
        expected = t * (value == 2) + (1 - t) / SIZE
        assert near(float((x_t == value).float().mean()), expected)


@pytest.mark.parametrize(("t", "t_next"), [(0.0, 0.25), (0.25, 0.5), (0.5, 0.9)])
@pytest.mark.parametrize("make", MIXTURES.values(), ids=MIXTURES)
def test_a_step_of_a_mixture_leads_to_the_next_marginal(make, t, t_next):
    path, x1, current = make(VECTORS), torch.full((1, COUNT), 3), torch.full((1, COUNT), 1)
    source = path.source(current, generator(2))
    x_t = torch.where(torch.rand(1, COUNT, generator=generator(4)) < t, x1, source)
    x_next = path.step(x_t, x1, t, t_next, generator(1))
    at_source = float((source == 3).float().mean())
    assert near(float((x_next == 3).float().mean()), t_next + (1 - t_next) * at_source)
    assert bool(((x_next == x_t) | (x_next == x1)).all())


def test_mixed_sources_replace_the_share_asked_for_and_nothing_else():
    current = torch.full((2, COUNT), 4)
    drawn = StateCoupledPath(VECTORS, 0.5).source(current, generator())
    assert torch.equal(drawn[0], drawn[1])
    assert near(float((drawn[0] == 4).float().mean()), 0.5 + 0.5 / SIZE)
    made = make_path("state_coupled", torch.randn(12, 4, generator=generator()), SIZE, 0.5)
    both = StateTokens(torch.full((1, COUNT), 11), current[:1])
    source = made.source(both, generator())
    assert near(float((source.codes == 11).float().mean()), 0.5 + 0.5 / 12)
    assert near(float((source.proprio == 4).float().mean()), 0.5 + 0.5 / SIZE)
    with pytest.raises(ValueError, match=r"noise_share is 1\.5"):
        StateCoupledPath(VECTORS, 1.5)


def test_a_filled_slot_keeps_its_token():
    x_t, x1 = torch.tensor([[MASKED, 2, MASKED]]), torch.tensor([[1, 1, 3]])
    assert MaskPath(VECTORS).step(x_t, x1, 0.5, 1.0, generator()).tolist() == [[1, 2, 3]]


# -- metric -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.3, 0.7])
def test_metric_marginals_are_a_softmax_of_distances(t):
    path, x1 = MetricPath(VECTORS), torch.full((COUNT,), 2)
    x_t = path.noise(x1, torch.tensor(t), x1, generator())
    distance = (VECTORS - VECTORS[2]).square().sum(-1)
    beta = path.schedule.c * (t / (1 - t)) ** path.schedule.alpha
    for value, share in enumerate(torch.softmax(-beta * distance, 0).tolist()):
        assert near(float((x_t == value).float().mean()), share)


def test_a_few_metric_steps_follow_the_marginals():
    path, x1 = MetricPath(VECTORS), torch.full((1, COUNT), 2)
    assert path.schedule == tune_schedule(VECTORS)
    distance = squared_distances(VECTORS, VECTORS)[2]
    x_t, times = path.source(x1, generator()), torch.linspace(0, 0.96, 7).tolist()
    for i, (t, t_next) in enumerate(pairwise(times)):
        stepped = path.step(x_t, x1, t, t_next, generator(10 + i))
        assert bool((distance[stepped] <= distance[x_t] + 1e-6).all())  # never away from the target
        x_t = stepped
        marginal = torch.softmax(-path.schedule.beta(torch.tensor(t_next)) * distance, 0)
        found = torch.bincount(x_t[0], minlength=SIZE) / COUNT
        torch.testing.assert_close(found, marginal, atol=0.012, rtol=0)


@pytest.mark.parametrize(
    "vectors",
    [
        torch.linspace(0, 1, 64)[:, None],
        torch.nn.functional.normalize(torch.randn(512, 16, generator=torch.Generator().manual_seed(0)), dim=-1),
        torch.nn.functional.normalize(torch.randn(300, 4, generator=torch.Generator().manual_seed(0)), dim=-1),
    ],
    ids=["bins", "codes in 16 dims", "codes in 4 dims"],
)
def test_the_tuned_schedule_makes_the_distance_fall_in_a_line(vectors):
    schedule = tune_schedule(vectors)
    times = torch.linspace(0.05, 0.95, 10)
    start = expected_distance(vectors, torch.zeros(1).numpy())[0]

    def deviation(found: BetaSchedule) -> float:
        falls = torch.from_numpy(expected_distance(vectors, found.beta(times).numpy()) / start)
        return float((falls - (1 - times)).square().mean().sqrt())

    assert deviation(schedule) == pytest.approx(schedule.deviation, abs=0.01)
    assert deviation(schedule) < 0.06 and deviation(schedule) < deviation(BetaSchedule(3.0, 0.9, 0.0))  # URSA's own
    for c, alpha in ((1.5, 1.0), (1 / 1.5, 1.0), (1.0, 1.5), (1.0, 1 / 1.5)):
        assert deviation(BetaSchedule(schedule.c * c, schedule.alpha * alpha, 0.0)) > deviation(schedule)


def test_equal_code_vectors_have_no_metric():
    with pytest.raises(ValueError, match="all code vectors are equal"):
        MetricPath(torch.ones(4, 2))


def test_a_large_codebook_is_handled_in_parts(monkeypatch):
    path, x1 = MetricPath(VECTORS), torch.randint(SIZE, (4, 9), generator=generator())
    whole = path.noise(x1, torch.full((4, 1), 0.5), x1, generator(1))
    step = path.step(whole, x1, 0.2, 0.6, generator(2))
    path.size = 2**23  # two tokens at a time
    assert torch.equal(path.noise(x1, torch.full((4, 1), 0.5), x1, generator(1)), whole)
    assert torch.equal(path.step(whole, x1, 0.2, 0.6, generator(2)), step)


def test_a_pick_is_proportional_to_the_weights_and_never_of_weight_zero():
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0]).expand(COUNT, -1)
    where = torch.rand(COUNT, generator=generator())
    where[:2] = torch.tensor([0.0, 1 - 2**-24])
    found = pick(weights, where)
    assert set(found.tolist()) == {1, 3} and near(float((found == 3).float().mean()), 0.75)


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
def test_a_path_of_a_state_treats_codes_and_bins_alike(name):
    made = make_path(name, torch.randn(12, 4, generator=generator()) * 7, 16)
    assert made.name == name
    target = StateTokens(torch.full((3, 8), 11), torch.full((3, 2), 15))
    before = StateTokens(torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long))
    source = made.source(before, generator())
    assert source.codes.shape == (3, 8) and source.proprio.shape == (3, 2)
    assert int(source.codes.max()) < 12 and int(source.proprio.max()) < 16
    clean = made.noise(target, torch.ones(3), before, generator())
    assert torch.equal(clean.codes, target.codes) and torch.equal(clean.proprio, target.proprio)
    last = made.step(source, target, 0.5, 1.0, generator())
    assert torch.equal(last.codes, target.codes) and torch.equal(last.proprio, target.proprio)


def test_an_unknown_path_names_the_nearest():
    assert known_path("metric") == "metric"
    with pytest.raises(ValueError, match="known: uniform, metric, state_coupled, mask; did you mean 'state_coupled'"):
        known_path("state-coupled")


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_samples_follow_the_softmax_and_the_generator():
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf]).expand(COUNT, -1)
    for temperature in (0.5, 1.0, 3.0):
        drawn = sample(logits, temperature, generator())
        for value, share in enumerate(torch.softmax(logits[0] / temperature, -1).tolist()):
            assert near(float((drawn == value).float().mean()), share)
        assert torch.equal(drawn, sample(logits, temperature, generator()))
    assert bool((sample(logits, 0.0, None) == 2).all())


def test_sampling_without_a_generator_or_below_zero_is_refused():
    with pytest.raises(ValueError, match="needs a seeded generator"):
        sample(torch.zeros(3), 1.0, None)
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        sample(torch.zeros(3), -1.0, generator())
