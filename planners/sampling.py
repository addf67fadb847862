"""What every sampling planner shares: the space it searches, correlated noise, and the scoring of candidates.

Shape letters: S candidates, M knots of one plan, H horizon in blocks, K env steps in a block, A action dims.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from emu_embodied.protocols import Evaluate
from emu_embodied.records import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSpace:
    """The box of action sequences a planner searches, through few knots: an action is held from knot to knot."""

    horizon: int
    """Length H of a plan [blocks]."""
    block: int
    """Length K of a block [env steps]."""
    action_dim: int
    """Number A of action dimensions, each in [-1, 1]."""
    knots_per_block: int = 1
    """Free actions in a block; each is held for ``block / knots_per_block`` env steps."""

    def __post_init__(self) -> None:
        if min(self.horizon, self.block, self.action_dim, self.knots_per_block) < 1:
            raise ValueError(f"horizon, block, action_dim and knots_per_block must be at least 1, got {self}")
        if self.block % self.knots_per_block:
            raise ValueError(f"knots_per_block={self.knots_per_block} must divide the block of {self.block} env steps")

    @property
    def knots(self) -> int:
        """Number M of knots in a plan."""
        return self.horizon * self.knots_per_block

    def expand(self, knots_SMA: torch.Tensor) -> torch.Tensor:
        """Knots [S, M, A] to actions [S, H, K, A]: every knot held for its share of the block."""
        held = knots_SMA.repeat_interleave(self.block // self.knots_per_block, dim=1)
        return held.unflatten(1, (self.horizon, self.block))

    def to_knots(self, actions_HKA: torch.Tensor) -> torch.Tensor:
        """Actions [H, K, A] to the nearest knots [M, A] in the box: the mean over the steps each knot is held.

        Raises:
            ValueError: if the actions have another shape.
        """
        if tuple(actions_HKA.shape) != (self.horizon, self.block, self.action_dim):
            raise ValueError(
                f"a warm start must be [horizon, block, action_dim] = "
                f"{[self.horizon, self.block, self.action_dim]}, got {list(actions_HKA.shape)}"
            )
        return actions_HKA.float().reshape(self.knots, -1, self.action_dim).mean(dim=1).clamp(-1.0, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """What all sampling planners are configured with."""

    samples: int = 64
    """Candidates drawn in an iteration."""
    iterations: int = 4
    """Iterations of one search."""
    init_std: float = 0.6
    """Standard deviation of the first iteration's noise [action units; the box is 2 wide]."""
    correlation: float = 0.5
    """Correlation of the noise of neighbouring knots, in [0, 1); 0.3 to 0.5 in VP2 (Tian et al. 2023)."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.iterations < 1:
            raise ValueError(f"samples and iterations must be at least 1, got {self.samples} and {self.iterations}")
        if self.init_std <= 0:
            raise ValueError(f"init_std must be positive, got {self.init_std}")
        if not 0.0 <= self.correlation < 1.0:
            raise ValueError(f"correlation must be in [0, 1), got {self.correlation}")


def correlated_noise(
    samples: int, knots: int, action_dim: int, *, correlation: float, generator: torch.Generator
) -> torch.Tensor:
    """Unit-variance Gaussian noise [S, M, A] whose neighbouring knots correlate (a first-order autoregression)."""
    noise_SMA = torch.randn(samples, knots, action_dim, generator=generator, device=generator.device)
    fresh = (1.0 - correlation**2) ** 0.5
    for knot in range(1, knots):
        noise_SMA[:, knot] = correlation * noise_SMA[:, knot - 1] + fresh * noise_SMA[:, knot]
    return noise_SMA


def draw(
    mean_MA: torch.Tensor,
    std_MA: torch.Tensor,
    *,
    samples: int,
    correlation: float,
    generator: torch.Generator,
    first_MA: torch.Tensor | None = None,
) -> torch.Tensor:
    """Candidates [S, M, A] around a mean, clipped to the box; the first is ``first_MA``, or the mean itself."""
    noise_SMA = correlated_noise(samples, *mean_MA.shape, correlation=correlation, generator=generator)
    knots_SMA = mean_MA + std_MA * noise_SMA
    knots_SMA[0] = mean_MA if first_MA is None else first_MA
    return knots_SMA.clamp_(-1.0, 1.0)


def shift(actions_HKA: torch.Tensor, blocks: int = 1) -> torch.Tensor:
    """The warm start left by a plan [H, K, A] whose first blocks were executed: moved up, its last block repeated."""
    rest = actions_HKA[blocks:]
    return torch.cat([rest, actions_HKA[-1:].expand(len(actions_HKA) - len(rest), -1, -1)])


class Search:
    """One search: where it starts, the scoring of its candidates, and the best of them so far."""

    def __init__(self, space: PlanSpace, evaluate: Evaluate, warm_start: torch.Tensor | None, device: torch.device):
        self.space = space
        self._evaluate = evaluate
        zeros_MA = torch.zeros(space.knots, space.action_dim, device=device)
        self.start_MA = zeros_MA if warm_start is None else space.to_knots(warm_start.to(device))
        self._best_MA, self._best_cost = self.start_MA, torch.inf
        self._best_costs: list[float] = []
        self._evaluations = 0

    def score(self, knots_SMA: torch.Tensor) -> torch.Tensor:
        """Costs float32 [S] of one iteration's candidates; those that are not finite count as the worst (``inf``).

        Raises:
            ValueError: if ``evaluate`` returns another shape, or no finite cost at all.
        """
        cost_S = self._costs(knots_SMA)
        best = int(cost_S.argmin())
        cost = float(cost_S[best])
        if cost == torch.inf:
            raise ValueError(
                f"none of the {len(cost_S)} candidate plans has a finite cost: check the objective and the model's "
                "predictions (diverged weights, a goal with NaN)"
            )
        if cost < self._best_cost:
            self._best_MA, self._best_cost = knots_SMA[best].clone(), cost
        self._best_costs.append(self._best_cost)
        return cost_S

    def best(self) -> Plan:
        """The cheapest candidate of all iterations."""
        return self._plan(self._best_MA, self._best_cost)

    def answer(self, knots_MA: torch.Tensor) -> Plan:
        """These knots as the plan, at the price of one more evaluation; the best if their cost is not finite."""
        cost = float(self._costs(knots_MA[None])[0])
        return self.best() if cost == torch.inf else self._plan(knots_MA, cost)

    def _plan(self, knots_MA: torch.Tensor, cost: float) -> Plan:
        return Plan(
            actions_HKA=self.space.expand(knots_MA[None])[0],
            cost=cost,
            best_costs=tuple(self._best_costs),
            evaluations=self._evaluations,
        )

    def _costs(self, knots_SMA: torch.Tensor) -> torch.Tensor:
        samples = len(knots_SMA)
        cost_S = self._evaluate(self.space.expand(knots_SMA)).detach()
        if tuple(cost_S.shape) != (samples,):
            raise ValueError(f"evaluate must return one cost for each of {samples} plans, got {list(cost_S.shape)}")
        self._evaluations += samples
        cost_S = cost_S.to(knots_SMA.device, torch.float32)
        bad_S = ~cost_S.isfinite()
        if bad_S.any():
            message = f"{int(bad_S.sum())} of {samples} plan costs are not finite; taken as worst"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            cost_S = cost_S.masked_fill(bad_S, torch.inf)
        return cost_S


def lowest(cost_S: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` cheapest candidates, cheapest first, fewer where fewer costs are finite."""
    return cost_S.argsort(stable=True)[: min(count, int(cost_S.isfinite().sum()))]
