"""Numbers that are read out as moves."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from emu_embodied.decode.grammar import from_changes


@given(bins=st.integers(2, 40), seed=st.integers(0, 1000))
def test_every_bin_is_come_to_by_one_move(bins, seed):
    draws = torch.Generator().manual_seed(seed)
    moves = torch.randn(3, 2, bins, generator=draws)
    before = torch.randint(bins, (3, 2), generator=draws)
    found = from_changes(moves, before)
    assert torch.equal(found.sort(-1).values, moves.sort(-1).values)
    for row in range(3):
        for number in range(2):
            for move in range(-(bins // 2), bins - bins // 2):
                there = (int(before[row, number]) + move) % bins
                assert found[row, number, there] == moves[row, number, move + bins // 2]


def test_the_middle_says_that_it_stays():
    moves = torch.zeros(4, 16)
    moves[:, 8] = 5.0
    before = torch.tensor([0, 3, 8, 15])
    assert torch.equal(from_changes(moves, before).argmax(-1), before)
