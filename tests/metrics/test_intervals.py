import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_embodied.metrics.intervals import Z95, bootstrap_mean, newcombe, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "interval"),
    # Newcombe 1998, Statistics in Medicine 17, table I (method 3).
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_published_values(successes, trials, interval):
    assert wilson(successes, trials) == pytest.approx(interval, abs=5e-5)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_and_mirrors(counts):
    successes, trials = counts
    low, high = wilson(successes, trials)
    assert 0.0 <= low <= successes / trials <= high <= 1.0
    mirrored = wilson(trials - successes, trials)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)
    for end in (low, high):  # the ends solve the score equation
        if 0 < end < 1:
            assert abs(successes / trials - end) == pytest.approx(Z95 * np.sqrt(end * (1 - end) / trials), abs=1e-9)


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_are_no_counts(successes, trials):
    with pytest.raises(ValueError, match="trials"):
        wilson(successes, trials)


@pytest.mark.parametrize(
    ("counts", "interval"),
    # Newcombe 1998, Statistics in Medicine 17, 873 to 890, table II (method 10).
    [
        ((56, 70, 48, 80), (0.0524, 0.3339)),
        ((9, 10, 3, 10), (0.1705, 0.8090)),
        ((6, 7, 2, 7), (0.0582, 0.8062)),
        ((5, 56, 0, 29), (-0.0381, 0.1926)),
        ((0, 10, 0, 20), (-0.1611, 0.2775)),
        ((10, 10, 0, 20), (0.6791, 1.0)),
    ],
)
def test_newcombe_published_values(counts, interval):
    assert newcombe(*counts) == pytest.approx(interval, abs=1e-4)


@given(st.integers(1, 80), st.integers(1, 80), st.data())
def test_newcombe_mirrors_and_holds_the_difference(trials, other_trials, data):
    successes, other = data.draw(st.integers(0, trials)), data.draw(st.integers(0, other_trials))
    low, high = newcombe(successes, trials, other, other_trials)
    assert -1 <= low <= successes / trials - other / other_trials <= high <= 1
    turned = newcombe(other, other_trials, successes, trials)
    assert (-turned[1], -turned[0]) == pytest.approx((low, high), abs=1e-12)


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_mean(rng.normal(3.0, 1.0, 40), rng, resamples=400)
        hits += low <= 3.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_is_seeded_and_refuses_nothing():
    values = np.arange(10.0)
    assert bootstrap_mean(values, np.random.default_rng(1)) == bootstrap_mean(values, np.random.default_rng(1))
    with pytest.raises(ValueError, match="at least one number"):
        bootstrap_mean(np.array([]), np.random.default_rng(0))
