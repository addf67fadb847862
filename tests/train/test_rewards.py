"""The contract of every reward term, and what is said of one that fails."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_embodied.train.rewards import TERMS, Outcome, RewardConfig, RewardTerm, no_signal, register

SOON = {"success": True, "actions_TKA": np.ones((2, 5, 2))}


def outcome(rng: np.random.Generator, group: int = 0, **changes) -> Outcome:
    blocks = int(rng.integers(1, 6))
    values = {
        "label": "Dot-v0, seed 3", "group": group, "success": bool(rng.integers(2)),
        "reward_T": rng.random(blocks + 1).astype(np.float32),
        "actions_TKA": rng.uniform(-1.5, 1.5, (blocks, 5, 3)).astype(np.float32), "budget": 6,
        "valid": float(rng.random()), "code_agreement": float(rng.random()), "proprio_error": float(rng.random()),
        "psnr": float(rng.uniform(0, 60)),
    }  # fmt: skip
    return Outcome(**(values | changes))


@pytest.mark.parametrize("name", TERMS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_terms_lie_on_the_common_scale(name, seed):
    found = RewardConfig(weights={name: 2.0}).score([outcome(np.random.default_rng(seed))])
    assert 1 <= float(found.total_R) <= 10
    assert found.means().keys() == {"reward", f"reward/{name}"}


@pytest.mark.parametrize("name", TERMS)
def test_terms_say_what_they_lack(name):
    with pytest.raises(ValueError, match=rf"{name}.*group 4"):
        RewardConfig(weights={name: 1.0}).score([Outcome(label="Dot-v0", group=4)])


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        ("success", {"success": True}, {"success": False}),
        ("progress", {"reward_T": np.array([0.2, 0.8])}, {"reward_T": np.array([0.2, 0.3])}),
        ("smoothness", {"actions_TKA": np.ones((3, 5, 2))}, {"actions_TKA": np.array([[[1.0]], [[-1.0]], [[1.0]]])}),
        ("time", SOON, {"success": True, "actions_TKA": np.ones((5, 5, 2))}),
        ("time", {"success": True, "actions_TKA": np.ones((6, 5, 2))}, {"success": False}),
        ("format", {"valid": 1.0}, {"valid": 0.5}),
        ("agreement", {"code_agreement": 0.9, "proprio_error": 0.1}, {"code_agreement": 0.9, "proprio_error": 0.3}),
        ("fidelity", {"psnr": 25.0}, {"psnr": 15.0}),
    ],
)  # fmt: skip
def test_better_is_more(name, better, worse):
    rng = np.random.default_rng(0)
    pair = [outcome(rng, **({"success": False} | changes)) for changes in (better, worse)]
    found = RewardConfig(weights={name: 1.0}).score(pair).total_R
    assert found[0] > found[1]


def test_weights_are_scaled():
    rng = np.random.default_rng(1)
    batch = [outcome(rng) for _ in range(5)]
    found = RewardConfig(weights={"success": 3.0, "time": 1.0, "format": 0.0}).score(batch)
    torch.testing.assert_close(found.total_R, 0.75 * found.terms["success"] + 0.25 * found.terms["time"])
    assert found.terms.keys() == {"success", "time"}


def test_ones_own_term(monkeypatch):
    monkeypatch.setattr("emu_embodied.train.rewards.TERMS", dict(TERMS))
    term = RewardTerm(name="haste", kind="task", low=0, high=2, unit="1", measure=lambda o: float("nan"))
    register(term)
    with pytest.raises(ValueError, match=r"haste.*NaN in group 7"):
        RewardConfig(weights={"haste": 1.0, "success": 1.0}).score([outcome(np.random.default_rng(0), group=7)])
    with pytest.raises(ValueError, match="already"):
        register(term)
    with pytest.raises(ValueError, match="low < high"):
        register(RewardTerm(name="none", kind="task", low=1, high=1, unit="1", measure=lambda o: 0.0))


@pytest.mark.parametrize(
    ("weights", "said"), [({"sucess": 1.0}, "'success'"), ({"success": -1.0}, "0 or more"), ({"time": 0.0}, "above 0")]
)
def test_bad_weights(weights, said):
    with pytest.raises(ValueError, match=said):
        RewardConfig(weights=weights)


def test_a_constant_reward_is_named():
    rng = np.random.default_rng(0)
    batch = [outcome(rng, group=g, success=g == 0) for g in (0, 0, 1, 1)]
    said = no_signal(RewardConfig(weights={"success": 1.0}).score(batch), batch)
    assert "group 0 (Dot-v0, seed 3): success = 10" in said and "group 1" in said and "success = 1" in said


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_gains_add_up(seed):
    one = outcome(np.random.default_rng(seed), success=bool(seed % 2))
    config = RewardConfig()
    gains = config.gains(one)
    start = config.score([replace(one, success=False, reward_T=one.reward_T[:1], actions_TKA=one.actions_TKA[:0])])
    assert len(gains) == len(one.actions_TKA)
    torch.testing.assert_close(start.total_R[0] + gains.sum(), config.score([one]).total_R[0])


def test_gains_of_what_has_no_blocks():
    with pytest.raises(ValueError, match="leave the discount out"):
        RewardConfig(weights={"agreement": 1.0}).gains(Outcome(label="x", group=0))
