"""One reward space: named terms, each on the same scale [1, 10], weighed and added (Emu3.5, section 3.2).

A term looks at one ``Outcome``: a rollout in a simulator, or one imagined state beside the real one. Terms are
registered by name; ``register`` adds one's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Literal

import numpy as np
import torch

LOWEST, HIGHEST = 1.0, 10.0
"""Ends of the common scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of one sample, as far as its loop knows it.

    Attributes:
        label: what it is, for messages, e.g. ``PandaPush-v0, seed 17``.
        group: number of its group.
        success: whether the task was solved.
        reward_T: float32 [T + 1], the environment's reward in [0, 1] of the first state and after every block.
        actions_TKA: float32 [T, K, A], what was done.
        budget: blocks there were for it [blocks].
        valid: share of the sampled tokens that stand for an action, in [0, 1].
        code_agreement: share of frame codes that an imagined state has in common with the real one.
        proprio_error: mean distance of imagined and real proprio, as a share of each field's range.
        psnr: of the imagined picture against the real one [dB].
    """

    label: str
    group: int
    success: bool | None = None
    reward_T: np.ndarray | None = None
    actions_TKA: np.ndarray | None = None
    budget: int | None = None
    valid: float | None = None
    code_agreement: float | None = None
    proprio_error: float | None = None
    psnr: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTerm:
    """One term."""

    name: str
    """What weights and logs call it."""
    kind: Literal["task", "general"]
    """Whether it speaks of the task, or holds for whatever is generated."""
    low: float
    """Raw value that becomes 1."""
    high: float
    """Raw value that becomes 10; values outside are clipped."""
    unit: str
    """Of the raw value."""
    measure: Callable[[Outcome], float | None]
    """The raw value; None where the outcome does not hold what it takes."""

    def normalised(self, raw: float) -> float:
        """A raw value on the common scale."""
        share = (raw - self.low) / (self.high - self.low)
        return LOWEST + (HIGHEST - LOWEST) * min(1.0, max(0.0, share))


TERMS: dict[str, RewardTerm] = {}
"""Name -> term."""


def register(term: RewardTerm) -> RewardTerm:
    """Make a term known.

    Raises:
        ValueError: if its name is taken or its range is empty.
    """
    if term.name in TERMS:
        raise ValueError(f"there is a reward term {term.name!r} already: give yours another name")
    if not (math.isfinite(term.low) and math.isfinite(term.high) and term.low < term.high):
        raise ValueError(f"reward term {term.name!r} has the range [{term.low}, {term.high}]: give low < high")
    TERMS[term.name] = term
    return term


def _success(outcome: Outcome) -> float | None:
    return None if outcome.success is None else float(outcome.success)


def _progress(outcome: Outcome) -> float | None:
    rewards = outcome.reward_T
    if rewards is None:
        return None
    if outcome.success:
        return 1.0
    return float((rewards[-1] - rewards[0]) / max(1e-6, 1.0 - rewards[0]))


def _smoothness(outcome: Outcome) -> float | None:
    if outcome.actions_TKA is None:
        return None
    means_TA = np.clip(outcome.actions_TKA, -1, 1).mean(1)
    return 1.0 - float(np.abs(np.diff(means_TA, axis=0)).mean() / 2) if len(means_TA) > 1 else 1.0


def _time(outcome: Outcome) -> float | None:
    if outcome.success is None or outcome.actions_TKA is None or not outcome.budget:
        return None
    return 1.0 - (len(outcome.actions_TKA) - 1) / outcome.budget if outcome.success else 0.0


def _agreement(outcome: Outcome) -> float | None:
    if outcome.code_agreement is None or outcome.proprio_error is None:
        return None
    return (outcome.code_agreement + 1.0 - outcome.proprio_error) / 2


for _term in (
    RewardTerm(name="success", kind="task", low=0, high=1, unit="1", measure=_success),
    RewardTerm(name="progress", kind="task", low=-1, high=1, unit="of the reward still to be had", measure=_progress),
    RewardTerm(name="smoothness", kind="task", low=0, high=1, unit="1", measure=_smoothness),
    RewardTerm(name="time", kind="task", low=0, high=1, unit="of the step budget left", measure=_time),
    RewardTerm(name="format", kind="task", low=0, high=1, unit="of the tokens", measure=lambda o: o.valid),
    RewardTerm(name="agreement", kind="general", low=0, high=1, unit="1", measure=_agreement),
    RewardTerm(name="fidelity", kind="general", low=10, high=30, unit="dB", measure=lambda o: o.psnr),
):
    register(_term)


@dataclass(frozen=True, slots=True)
class Scores:
    """The rewards of a batch.

    Attributes:
        total_R: float64, weighted mean of the terms, in [1, 10].
        terms: each weighed term on the common scale, float64 [R].
    """

    total_R: torch.Tensor
    terms: dict[str, torch.Tensor]

    def means(self) -> dict[str, float]:
        """``reward`` and ``reward/<term>``, for the log."""
        return {
            "reward": float(self.total_R.mean()),
            **{f"reward/{n}": float(v.mean()) for n, v in self.terms.items()},
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """What is wanted."""

    weights: Mapping[str, float] = field(default_factory=lambda: {"success": 1.0, "progress": 0.5, "time": 0.2})
    """Term -> weight; scaled to sum to 1."""

    def __post_init__(self) -> None:
        """Check names and weights.

        Raises:
            ValueError: for an unknown term (with the nearest), a weight below 0, or none above.
        """
        for name, weight in self.weights.items():
            if name not in TERMS:
                near = get_close_matches(name, TERMS, n=1, cutoff=0.0)[0]
                raise ValueError(f"unknown reward term {name!r}: did you mean {near!r}? Known: {', '.join(TERMS)}")
            if not 0 <= weight < math.inf:
                raise ValueError(f"the weight of reward term {name!r} is {weight}: give 0 or more")
        if not sum(self.weights.values()) > 0:
            raise ValueError("no reward term has a weight above 0: nothing could be learned")

    def score(self, outcomes: Sequence[Outcome]) -> Scores:
        """Score a batch.

        Raises:
            ValueError: naming term, group and outcome, where a term is NaN or cannot be measured in this loop.
        """
        terms = {}
        for name, weight in self.weights.items():
            if weight:
                values = [_normalised(TERMS[name], outcome) for outcome in outcomes]
                terms[name] = torch.tensor(values, dtype=torch.float64)
        total = sum(self.weights[name] * values for name, values in terms.items())
        assert isinstance(total, torch.Tensor)
        return Scores(total / sum(self.weights[name] for name in terms), terms)

    def gains(self, outcome: Outcome) -> torch.Tensor:
        """What every block added to the reward: float64 [T], the differences of the scores of what was done so far.

        Raises:
            ValueError: see ``score``; or if the outcome does not tell its blocks.
        """
        if outcome.reward_T is None or outcome.actions_TKA is None:
            raise ValueError(f"{outcome.label} does not tell its blocks: leave the discount out")
        blocks = len(outcome.actions_TKA)
        so_far = [
            replace(
                outcome,
                success=bool(outcome.success) and t == blocks,
                reward_T=outcome.reward_T[: t + 1],
                actions_TKA=outcome.actions_TKA[:t],
            )
            for t in range(blocks + 1)
        ]
        return self.score(so_far).total_R.diff()


def no_signal(scores: Scores, outcomes: Sequence[Outcome]) -> str:
    """Why nothing can be learned of groups whose rewards do not differ: each term and group with its one value."""
    groups: dict[int, list[int]] = {}
    for row, outcome in enumerate(outcomes):
        groups.setdefault(outcome.group, []).append(row)
    said = []
    for number, rows in groups.items():
        values = ", ".join(f"{name} = {float(term[rows[0]]):.3g}" for name, term in scores.terms.items())
        said.append(f"group {number} ({outcomes[rows[0]].label}): {values}")
    shown = said[:4] + ([f"and {len(said) - 4} more"] if len(said) > 4 else [])
    return "the reward is constant in every group; " + "; ".join(shown)


def _normalised(term: RewardTerm, outcome: Outcome) -> float:
    raw = term.measure(outcome)
    where = f"group {outcome.group} ({outcome.label})"
    if raw is None:
        raise ValueError(
            f"reward term {term.name!r} cannot be measured in {where}: this loop does not give what it takes"
        )
    if math.isnan(raw):
        raise ValueError(f"reward term {term.name!r} is NaN in {where}: mend the term, or give it weight 0")
    return term.normalised(raw)
