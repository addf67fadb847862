"""Linear probes: they find what is there, all of it, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_embodied.metrics.probes import FOLDS, STRENGTHS, Place, Split, _solutions, kernel, places, probe, words
from emu_embodied.records import Field

STATES, EPISODES = 240, 40
EPISODE_M = np.repeat(np.arange(EPISODES), STATES // EPISODES)
SPLIT = Split.of(EPISODE_M, 0.33)
PLACE = Place("ball", (0, 1), "cm", 100.0)


def features(width: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randn(STATES, width, generator=torch.Generator().manual_seed(seed))


def score(kernel_MM: torch.Tensor, targets_MO: np.ndarray):
    [found] = probe(kernel_MM, targets_MO, [PLACE], SPLIT)
    return found


def test_positions_are_found_among_fields() -> None:
    fields = [
        Field("ee_x", "m", 0, 1), Field("ee_y", "m", 0, 1), Field("ee_z", "m", 0, 1), Field("ee_vx", "m/s", 0, 1),
        Field("gripper", "m", 0, 1), Field("block_x", "px", 0, 9), Field("block_y", "px", 0, 9),
        Field("block_sin", "1", -1, 1), Field("block_cos", "1", -1, 1), Field("lone_x", "m", 0, 1),
    ]  # fmt: skip
    found = {place.name: place for place in places(fields)}
    assert list(found) == ["ee", "block", "block_angle"]
    assert found["ee"].axes == (0, 1, 2) and found["block"].axes == (5, 6) and found["block_angle"].axes == (7, 8)
    units = [(place.unit, round(place.scale, 3)) for place in found.values()]
    assert units == [("cm", 100), ("px", 1), ("deg", 57.296)]


def test_errors_are_distances_in_their_unit() -> None:
    assert PLACE.error(np.array([[0.03, 0.04, 9.0]]), np.zeros((1, 3))) == pytest.approx([5.0])
    turn = Place("angle", (0, 1), "deg", 180 / np.pi)
    angles = np.deg2rad([[170.0], [10.0]])
    pairs = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    assert turn.error(pairs[:1], np.array([[np.sin(-3.0), np.cos(-3.0)]])) == pytest.approx([360 - 170 - np.rad2deg(3)])
    assert turn.error(pairs, pairs) == pytest.approx([0, 0])
    # The length of what was read says nothing.
    assert turn.error(0.2 * pairs, pairs) == pytest.approx([0, 0], abs=1e-9)


def test_a_planted_linear_map_is_recovered() -> None:
    seen = features()
    planted = 0.1 * seen[:, :3] @ torch.tensor([[1.0, 0.0], [0.5, -1.0], [0.0, 2.0]])
    found = score(kernel(seen, ~SPLIT.held_M), planted.numpy() + np.array([0.4, -0.2]))
    assert found.unit == "cm" and found.guess > 15
    assert found.error < 0.01 * found.guess
    assert found.ci95[0] <= found.error <= found.ci95[1]


def test_noise_on_it_is_not_read() -> None:
    seen = features()
    noise = 0.05 * torch.randn(STATES, 2, generator=torch.Generator().manual_seed(9))
    found = score(kernel(seen, ~SPLIT.held_M), (0.1 * seen[:, :2] + noise).numpy())
    expected = 100 * float(noise[SPLIT.held_M].norm(dim=1).mean())
    assert expected < found.error < 1.25 * expected < found.guess


@pytest.mark.parametrize("seen", [torch.full((STATES, 8), 3.0), torch.zeros(STATES, 1)])
def test_constant_vectors_give_the_constant_guess(seen: torch.Tensor) -> None:
    found = score(kernel(seen, ~SPLIT.held_M), np.random.default_rng(0).normal(size=(STATES, 2)))
    assert found.error == pytest.approx(found.guess)


def test_unrelated_vectors_are_no_better_than_the_guess() -> None:
    # As many features as states: without a well chosen strength the fit would be perfect and the rest nonsense.
    found = score(kernel(features(400), ~SPLIT.held_M), np.random.default_rng(0).normal(size=(STATES, 2)))
    assert found.guess < 1.1 * found.error and found.error < 1.3 * found.guess


def test_which_thing_is_meant_is_read_with_the_words() -> None:
    seen = features(6)
    told = ["reach the red ball" if i % 2 else "go to the blue ball" for i in EPISODE_M]
    meant = np.array(["red" in text for text in told])[:, None]
    places_MO = 0.1 * np.where(meant, seen[:, :2].numpy(), seen[:, 2:4].numpy())
    blind = score(kernel(seen, ~SPLIT.held_M), places_MO)
    heard = score(kernel(seen, ~SPLIT.held_M, words(told)), places_MO)
    assert blind.error > 0.5 * blind.guess and heard.error < 0.05 * heard.guess


def test_one_instruction_adds_nothing() -> None:
    seen = features()
    plain, told = kernel(seen, ~SPLIT.held_M), kernel(seen, ~SPLIT.held_M, words(["push it"] * STATES))
    assert torch.allclose(plain, told, atol=1e-5)


@given(seed=st.integers(0, 2**16), which=st.sampled_from(range(len(STRENGTHS))))
@settings(max_examples=20, deadline=None)
def test_the_kernel_form_is_ridge_regression(seed: int, which: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    seen, targets = (torch.randn(30, n, generator=generator, dtype=torch.float64) for n in (5, 2))
    fit, asked = np.arange(22), np.arange(22, 30)
    found = _solutions(seen @ seen.T, targets, fit, asked)[which]
    normal = seen[fit].T @ seen[fit] + STRENGTHS[which] * torch.eye(5, dtype=torch.float64)
    expected = seen[asked] @ torch.linalg.solve(normal, seen[fit].T @ targets[fit])
    assert torch.allclose(found, expected, atol=1e-7)


def test_episodes_are_held_out_whole() -> None:
    for number in range(EPISODES):
        assert len(set(SPLIT.held_M[number == EPISODE_M])) == 1
    assert 0.3 < SPLIT.held_M.mean() < 0.37
    with pytest.raises(ValueError, match=f"give at least {3 * FOLDS}"):
        Split.of(np.arange(11), 0.33)
    assert Split.of(np.arange(3 * FOLDS), 0.33).held_M.sum() == FOLDS


def test_more_episodes_would_help_where_half_of_them_do_worse() -> None:
    seen = features(120)
    planted = 0.1 * seen[:, :2]
    planted = planted + 0.05 * torch.randn(STATES, 2, generator=torch.Generator().manual_seed(1))
    found = score(kernel(seen, ~SPLIT.held_M), planted.numpy())
    assert found.error < 0.9 * found.error_of_half < found.guess


def test_what_is_measured_is_not_fitted() -> None:
    """Held-out targets may be anything: what is read of the others does not change."""
    seen, targets = features(), np.random.default_rng(0).normal(size=(STATES, 2))
    found = kernel(seen, ~SPLIT.held_M)
    spoilt = targets.copy()
    spoilt[SPLIT.held_M] += 1000.0
    before, after = score(found, targets), score(found, spoilt)
    assert after.error > 1000 * 100 and before.error < 300
    assert after.guess - before.guess == pytest.approx(100 * np.hypot(1000, 1000), rel=0.02)
