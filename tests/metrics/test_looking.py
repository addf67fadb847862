"""A probe that looks: finds what is marked in some cell and named by a word, and nothing where nothing is."""

from __future__ import annotations

import numpy as np
import torch

from emu_embodied.metrics.looking import look
from emu_embodied.metrics.probes import Place, Split, kernel, probe, words

GRID, EPISODES, EACH = (6, 6), 360, 2
EPISODE_M = np.repeat(np.arange(EPISODES), EACH)
SPLIT = Split.of(EPISODE_M, 0.33)
PLACE = Place("ball", (1, 2), "cm", 100.0)


def scenes(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Cells with a red and a blue mark in two of them, words that name one, and where that is (in the last columns)."""
    rng = np.random.default_rng(seed)
    states = len(EPISODE_M)
    cells = rng.normal(size=(states, 36, 5)).astype(np.float32)
    marks = {"red": 4.0 * np.eye(5)[0], "blue": 4.0 * np.eye(5)[1]}
    told, where = [], np.zeros((states, 3), np.float32)
    for m in range(states):
        red, blue = rng.choice(36, 2, replace=False)
        cells[m, red] += marks["red"]
        cells[m, blue] += marks["blue"]
        named = ("red", "blue")[int(rng.integers(2))]
        told.append(f"reach the {named} ball")
        where[m, 1:] = np.array(divmod(red if named == "red" else blue, 6)) / 10
    return torch.from_numpy(cells), words(told), where


def test_what_is_named_is_found_where_a_linear_probe_sees_little() -> None:
    cells, told, where = scenes()
    found = look(cells, told, where, PLACE, SPLIT, GRID)
    [linear] = probe(kernel(cells.flatten(1), ~SPLIT.held_M, told), where, [PLACE], SPLIT)
    assert abs(found.guess - linear.guess) < 1e-3 and found.unit == "cm"
    assert found.error < 0.4 * found.guess and linear.error > 0.7 * linear.guess
    assert found.ci95[0] <= found.error <= found.ci95[1]


def test_the_words_are_needed() -> None:
    cells, told, where = scenes()
    assert look(cells, torch.ones_like(told[:, :1]), where, PLACE, SPLIT, GRID).error > 0.5 * 24


def test_nothing_is_found_in_noise() -> None:
    cells, told, where = scenes()
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=cells.shape).astype(np.float32))
    found = look(noise, told, where, PLACE, SPLIT, GRID)
    assert found.error > 0.9 * found.guess


def test_what_is_measured_is_not_fitted() -> None:
    cells, told, where = scenes()
    spoilt = where.copy()
    spoilt[SPLIT.held_M] += 100.0
    before, after = look(cells, told, where, PLACE, SPLIT, GRID), look(cells, told, spoilt, PLACE, SPLIT, GRID)
    assert after.error > 100 * 100 and before.error < 20
