"""Actions, proprio and reward as bins: the round trip is within half a bin, what lies outside is clipped."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emu_embodied.records import Field
from emu_embodied.tokens.actions import ActionTokenizer
from emu_embodied.tokens.states import ProprioTokenizer, RewardTokenizer

BINS = st.integers(1, 300)
UNIT = st.floats(0, 1, width=32)
ROUNDING = 1 + 1e-3


@given(BINS, st.integers(1, 4), st.data())
def test_actions_survive_within_half_a_bin(bins, block, data):
    held = torch.tensor(data.draw(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=5)))
    tokenizer = ActionTokenizer(bins, block)
    actions_KA = held.expand(block, -1)
    tokens_A = tokenizer.encode(actions_KA)
    assert tokens_A.dtype == torch.int64 and 0 <= int(tokens_A.min()) <= int(tokens_A.max()) < bins
    back_KA = tokenizer.decode(tokens_A)
    assert back_KA.shape == actions_KA.shape
    assert float((back_KA - actions_KA).abs().max()) <= ROUNDING / bins
    assert torch.equal(tokenizer.encode(back_KA), tokens_A)


def test_action_tokens_carry_the_mean_of_the_block_and_are_clipped():
    tokenizer = ActionTokenizer(8, 2)
    actions = torch.tensor([[[[-1.0, 9.0], [0.5, 9.0]]], [[[1.0, -9.0], [1.0, -9.0]]]])
    assert tokenizer.encode(actions).tolist() == [[[3, 7]], [[7, 0]]]
    assert tokenizer.decode(torch.tensor([[3, 7]])).tolist() == [[[-0.125, 0.875], [-0.125, 0.875]]]


@st.composite
def fields(draw):
    low = draw(st.floats(-100, 100, width=32))
    return Field("f", "m", low, low + draw(st.floats(0.0625, 100, width=32)))


@given(BINS, st.lists(fields(), min_size=1, max_size=4), st.data())
def test_proprio_survives_within_half_a_bin(bins, described, data):
    tokenizer = ProprioTokenizer(tuple(described), bins)
    low, high = (torch.tensor([getattr(f, end) for f in described]) for end in ("low", "high"))
    share = torch.tensor(data.draw(st.lists(UNIT, min_size=len(described), max_size=len(described))))
    value_P = low + share * (high - low)
    tokens_P = tokenizer.encode(value_P)
    assert 0 <= int(tokens_P.min()) <= int(tokens_P.max()) < bins
    half = (high - low) / bins / 2
    slack = 1e-5 * low.abs().max()  # float32 near large offsets
    assert bool(((tokenizer.decode(tokens_P) - value_P).abs() <= half * ROUNDING + slack).all())
    assert tokenizer.encode(low - 1).tolist() == [0] * len(described)
    assert tokenizer.encode(high + 1).tolist() == [bins - 1] * len(described)


@given(BINS, UNIT)
def test_reward_survives_within_half_a_bin(bins, reward):
    tokenizer = RewardTokenizer(bins)
    token = tokenizer.encode(torch.tensor([reward]))
    assert 0 <= int(token) < bins
    assert abs(float(tokenizer.decode(token)) - reward) <= ROUNDING / bins / 2
    assert tokenizer.encode(torch.tensor([-1.0, 2.0])).tolist() == [0, bins - 1]


def test_expected_bins_are_read_between_the_centres():
    tokenizer = ProprioTokenizer((Field("f", "m", 0.0, 4.0),), 4)
    assert tokenizer.decode(torch.tensor([1.5])).tolist() == [2.0]
    assert RewardTokenizer(4).decode(torch.tensor(1.5)).item() == 0.5


def test_fitted_ranges_cover_the_data_even_where_it_is_constant():
    named = [Field("x", "m", -9.0, 9.0), Field("still", "rad", -9.0, 9.0)]
    fitted = ProprioTokenizer.fit(named, [0.0, 1.0], [2.0, 1.0], 16)
    assert [(f.name, f.unit) for f in fitted.fields] == [("x", "m"), ("still", "rad")]
    assert (fitted.fields[0].low, fitted.fields[0].high) == pytest.approx((-0.1, 2.1))
    assert fitted.fields[1].low < 1.0 < fitted.fields[1].high
    with pytest.raises(ValueError, match="'still' has an empty range"):
        ProprioTokenizer((Field("still", "rad", 1.0, 1.0),), 16)
