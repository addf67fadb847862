"""What every sampling planner shares: the space it searches, the noise, and the scoring of candidates.

Shape letters: S candidates, M knots of one plan, H horizon in blocks, K env steps in a block, A action dims.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from emu_embodied.planners.proposals import Proposals, propose
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

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape [H, K, A] of a plan."""
        return self.horizon, self.block, self.action_dim

    def expand(self, knots_SMA: torch.Tensor) -> torch.Tensor:
        """Knots [S, M, A] to actions [S, H, K, A]: every knot held for its share of the block."""
        held = knots_SMA.repeat_interleave(self.block // self.knots_per_block, dim=1)
        return held.unflatten(1, (-1, self.block))

    def to_knots(self, actions_SHKA: torch.Tensor) -> torch.Tensor:
        """Actions [S, H, K, A] to the nearest knots [S, M, A] in the box: the mean over the steps a knot is held.

        Raises:
            ValueError: if the actions have another shape.
        """
        given = list(actions_SHKA.shape[1:])
        if given != [*self.shape]:
            raise ValueError(f"a warm start must be [horizon, block, action_dim] = {[*self.shape]}, got {given}")
        held = actions_SHKA.float().reshape(len(actions_SHKA), self.knots, -1, self.action_dim)
        return held.mean(dim=2).clamp(-1.0, 1.0)


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
    beta: float | None = None
    """Exponent of coloured noise, which takes the place of ``correlation`` where it is given: 0 is white, 2 drifts."""
    carried: int = 0
    """Cheapest candidates besides the plan that the next decision starts with."""
    proposal_share: float = 0.25
    """Share of the first iteration's candidates that are proposed to the planner, if anything proposes, in [0, 1]."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.iterations < 1:
            raise ValueError(f"samples and iterations must be at least 1, got {self.samples} and {self.iterations}")
        if self.init_std <= 0:
            raise ValueError(f"init_std must be positive, got {self.init_std}")
        if not 0.0 <= self.correlation < 1.0:
            raise ValueError(f"correlation must be in [0, 1), got {self.correlation}")
        if self.beta is not None and self.beta < 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")
        if self.carried < 0:
            raise ValueError(f"carried must not be negative, got {self.carried}")
        if not 0.0 <= self.proposal_share <= 1.0:
            raise ValueError(f"proposal_share must be in [0, 1], got {self.proposal_share}")

    def noise(self, samples: int, knots: int, action_dim: int, generator: torch.Generator) -> torch.Tensor:
        """Gaussian noise [S, M, A] over knots; every entry has unit variance."""
        if self.beta is not None:
            return coloured_noise(samples, knots, action_dim, beta=self.beta, generator=generator)
        return correlated_noise(samples, knots, action_dim, correlation=self.correlation, generator=generator)


def correlated_noise(
    samples: int, knots: int, action_dim: int, *, correlation: float, generator: torch.Generator
) -> torch.Tensor:
    """Unit-variance Gaussian noise [S, M, A] whose neighbouring knots correlate (a first-order autoregression)."""
    noise_SMA = torch.randn(samples, knots, action_dim, generator=generator, device=generator.device)
    fresh = (1.0 - correlation**2) ** 0.5
    for knot in range(1, knots):
        noise_SMA[:, knot] = correlation * noise_SMA[:, knot - 1] + fresh * noise_SMA[:, knot]
    return noise_SMA


def coloured_noise(
    samples: int, knots: int, action_dim: int, *, beta: float, generator: torch.Generator
) -> torch.Tensor:
    """Unit-variance Gaussian noise [S, M, A] whose power falls with frequency as ``frequency ** -beta``.

    As in iCEM (Pinneri et al. 2020, arXiv:2008.06389), after Timmer and König (1995), where the constant part has the
    power of the lowest frequency. Unlike there it is cut out of a series four times as long: one that closes on itself
    over the two to five knots of a plan in blocks is white or nearly so, whatever its colour.
    """
    period = 4 * knots
    amplitude_F = torch.fft.rfftfreq(period, device=generator.device).clamp_min(1.0 / period) ** (-beta / 2)
    mirrored_F = torch.full_like(amplitude_F, 2.0)  # all but the constant and the highest frequency count twice
    mirrored_F[0] = mirrored_F[-1] = 1.0
    power = (mirrored_F * amplitude_F.square()).sum() / period
    white_SAM = torch.randn(samples, action_dim, period, generator=generator, device=generator.device)
    series_SAM = torch.fft.irfft(torch.fft.rfft(white_SAM) * (amplitude_F / power.sqrt()), n=period)
    return series_SAM[..., :knots].transpose(1, 2).contiguous()


@dataclass(frozen=True, slots=True)
class SearchedPlan(Plan):
    """A plan, and what else the search found.

    Attributes:
        carried_SHKA: float32 [S, H, K, A], the cheapest candidates besides the plan, cheapest first; None for none.
    """

    carried_SHKA: torch.Tensor | None = None


def carry(plan: Plan, blocks: int = 1) -> torch.Tensor:
    """The warm start of the next search, when the first blocks of a plan were executed.

    Returns:
        float32 [H, K, A], or where the search carried further candidates [S, H, K, A], the plan first.
    """
    if not isinstance(plan, SearchedPlan) or plan.carried_SHKA is None:
        return shift(plan.actions_HKA, blocks)
    return shift(torch.cat([plan.actions_HKA[None], plan.carried_SHKA]), blocks)


def shift(actions_HKA: torch.Tensor, blocks: int = 1) -> torch.Tensor:
    """What is left of plans [..., H, K, A] whose first blocks were executed: moved up, the last block repeated."""
    horizon = actions_HKA.shape[-3]
    later_H = torch.arange(blocks, blocks + horizon, device=actions_HKA.device).clamp_max(horizon - 1)
    return actions_HKA.index_select(-3, later_H)


class Search:
    """One search: where it starts, its candidates, their scores, and the best of them so far.

    Args:
        space: what is searched.
        config: how.
        evaluate: costs of candidates.
        warm_start: float32 [H, K, A], or several [S, H, K, A]: the search starts from the first, the others are
            candidates of the first iteration. None starts from zero actions.
        generator: of all noise; candidates lie on its device.
        proposals: proposes ``proposal_share`` of the first iteration's candidates.
    """

    def __init__(
        self,
        space: PlanSpace,
        config: SearchConfig,
        evaluate: Evaluate,
        warm_start: torch.Tensor | None,
        generator: torch.Generator,
        proposals: Proposals | None = None,
    ):
        self.space = space
        self.config = config
        self._evaluate = evaluate
        self._generator = generator
        self._proposals = proposals
        if warm_start is None:
            self.starts_SMA = torch.zeros(1, space.knots, space.action_dim, device=generator.device)
        else:
            several = warm_start[None] if warm_start.ndim == 3 else warm_start
            self.starts_SMA = space.to_knots(several.to(generator.device))
        self.start_MA = self.starts_SMA[0]
        self._best_SMA, self._best_cost_S = self.starts_SMA[:0], self.starts_SMA.new_empty(0)
        self._best_costs: list[float] = []
        self._evaluations = 0

    def noise(self, count: int) -> torch.Tensor:
        """Noise [S, M, A] of unit variance for so many candidates."""
        knots, action_dim = self.start_MA.shape
        return self.config.noise(count, knots, action_dim, self._generator)

    def candidates(self, drawn_SMA: torch.Tensor, centre_MA: torch.Tensor) -> torch.Tensor:
        """What an iteration tries [S, M, A]: what was drawn, clipped to the box, the first replaced by the centre.

        Those of the first iteration also hold where the search starts (as the first), what is proposed, and the other
        warm starts, as far as there is room.
        """
        given_SMA = centre_MA[None] if self._best_costs else self._given(len(drawn_SMA))
        return torch.cat([given_SMA, drawn_SMA[len(given_SMA) :]]).clamp_(-1.0, 1.0)

    def _given(self, count: int) -> torch.Tensor:
        """The candidates of the first iteration that are not drawn, at most ``count``: [S, M, A]."""
        given = [self.starts_SMA[:1], self.starts_SMA[1:]]
        proposed = round(self.config.proposal_share * count)
        if self._proposals is not None and proposed > 0:
            actions_SHKA = propose(self._proposals, proposed, self.space.shape, self._generator)
            given.insert(1, self.space.to_knots(actions_SHKA.to(self.start_MA.device)))
        return torch.cat(given)[:count]

    def score(self, knots_SMA: torch.Tensor, *, whole: bool = True) -> torch.Tensor:
        """Costs float32 [S] of one iteration's candidates; those that are not finite count as the worst (``inf``).

        Args:
            knots_SMA: the candidates.
            whole: they are plans, the cheapest of which are remembered; else they are beginnings of plans.

        Raises:
            ValueError: if ``evaluate`` returns another shape, or no finite cost at all.
        """
        cost_S = self._costs(knots_SMA)
        if not bool(cost_S.isfinite().any()):
            raise ValueError(
                f"none of the {len(cost_S)} candidate plans has a finite cost: check the objective and the model's "
                "predictions (diverged weights, a goal with NaN)"
            )
        if whole:
            cost_of_all_S = torch.cat([self._best_cost_S, cost_S])
            best_S = lowest(cost_of_all_S, 1 + self.config.carried)
            self._best_SMA = torch.cat([self._best_SMA, knots_SMA])[best_S]
            self._best_cost_S = cost_of_all_S[best_S]
            self._best_costs.append(float(self._best_cost_S[0]))
        return cost_S

    def best(self) -> SearchedPlan:
        """The cheapest candidate of all iterations."""
        return self._plan(self._best_SMA[0], float(self._best_cost_S[0]), self._best_SMA[1:])

    def answer(self, knots_MA: torch.Tensor) -> SearchedPlan:
        """These knots as the plan, at the price of one more evaluation; the best if their cost is not finite."""
        cost = float(self._costs(knots_MA[None])[0])
        if cost == torch.inf:
            return self.best()
        return self._plan(knots_MA, cost, self._best_SMA[: self.config.carried])

    def _plan(self, knots_MA: torch.Tensor, cost: float, carried_SMA: torch.Tensor) -> SearchedPlan:
        return SearchedPlan(
            actions_HKA=self.space.expand(knots_MA[None])[0],
            cost=cost,
            best_costs=tuple(self._best_costs),
            evaluations=self._evaluations,
            carried_SHKA=self.space.expand(carried_SMA) if len(carried_SMA) else None,
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
