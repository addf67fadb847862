"""Cross-entropy method over a Gaussian, with the settings of iCEM (Pinneri et al. 2020, arXiv:2008.06389), or bins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F

from emu_embodied.planners.proposals import Proposals
from emu_embodied.planners.sampling import PlanSpace, Search, SearchConfig, lowest
from emu_embodied.protocols import Evaluate
from emu_embodied.records import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class CEMConfig(SearchConfig):
    """Settings of ``CEM``."""

    elite_share: float = 0.125
    """Share of ``samples`` that the next mean and standard deviation are fitted to, the cheapest ones."""
    kept_elites: int = 3
    """Elites that stay candidates in the next iteration, with the cost they have."""
    min_std: float = 0.05
    """Smallest standard deviation [action units]; keeps a search from freezing."""
    momentum: float = 0.1
    """Share of the old mean and standard deviation in the new ones, in [0, 1)."""
    decay: float = 1.0
    """How many times fewer candidates an iteration draws than the one before it, at least 1. The sum over iterations
    stays ``samples * iterations``: the first draw more, the last fewer."""
    answer: Literal["best", "mean"] = "best"
    """What is returned: the cheapest candidate, or the centre of the last distribution (one evaluation more; trusts a
    noisy model less)."""

    def __post_init__(self) -> None:
        SearchConfig.__post_init__(self)
        if not 0.0 < self.elite_share <= 1.0:
            raise ValueError(f"elite_share must be in (0, 1], got {self.elite_share}")
        if self.kept_elites < 0:
            raise ValueError(f"kept_elites must not be negative, got {self.kept_elites}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.decay < 1.0:
            raise ValueError(f"decay must be at least 1, got {self.decay}")

    @property
    def elites(self) -> int:
        """Number of elites."""
        return max(1, round(self.elite_share * self.samples))

    def counts(self) -> list[int]:
        """Candidates that each iteration draws: at least one each, ``samples * iterations`` together."""
        shares = [self.decay**-iteration for iteration in range(self.iterations)]
        spare, total = (self.samples - 1) * self.iterations, sum(shares)
        upto = [round(spare * sum(shares[: done + 1]) / total) for done in range(self.iterations)]
        return [1 + now - before for before, now in zip([0, *upto], upto, strict=False)]

    def around(self, start_MA: torch.Tensor) -> Distribution:
        """The distribution that a search begins with."""
        return Gaussian(self, start_MA)


@dataclass(frozen=True, kw_only=True, slots=True)
class ICEMConfig(CEMConfig):
    """``CEM`` as iCEM: coloured noise, elites that outlive the decision, fewer candidates in later iterations."""

    beta: float | None = 1.0
    """See ``SearchConfig``; 0.25 to 4 in the paper, by task. Over a plan's few knots 2 drifts too much."""
    carried: int = 3
    """See ``SearchConfig``; the paper carries 0.3 of its 10 elites."""
    decay: float = 1.25
    """See ``CEMConfig``; the paper's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CategoricalConfig(CEMConfig):
    """``CEM`` over the bins that action tokens stand for, which can keep two ways of going at once."""

    bins: int = 21
    """Bins of an action's range [-1, 1]; with an odd number standing still is among them."""
    smoothing: float = 2.0
    """Elites' worth of probability that is spread evenly over all bins (Laplace smoothing)."""

    def __post_init__(self) -> None:
        CEMConfig.__post_init__(self)
        if self.bins < 2:
            raise ValueError(f"bins must be at least 2, got {self.bins}")
        if self.smoothing <= 0:
            raise ValueError(f"smoothing must be positive, got {self.smoothing}")

    def around(self, start_MA: torch.Tensor) -> Categorical:
        """The distribution that a search begins with."""
        return Categorical(self, start_MA)


class Distribution(Protocol):
    """What a search draws candidates from and fits to the best of them."""

    @property
    def centre_MA(self) -> torch.Tensor:
        """Its most likely candidate [M, A]."""
        ...

    def shaped(self, noise_SMA: torch.Tensor) -> torch.Tensor:
        """Candidates [S, M, A] made of Gaussian noise of unit variance, whose correlations they keep."""
        ...

    def fit(self, elites_SMA: torch.Tensor) -> None:
        """Move towards the elites."""
        ...


class Gaussian:
    """Independent Gaussians over knots, but for what correlates their noise.

    Args:
        config: widths and momentum.
        start_MA: mean it begins with.
    """

    def __init__(self, config: CEMConfig, start_MA: torch.Tensor):
        self._config = config
        self.centre_MA = start_MA
        self._std_MA = torch.full_like(start_MA, config.init_std)

    def shaped(self, noise_SMA: torch.Tensor) -> torch.Tensor:
        """See ``Distribution``."""
        return self.centre_MA + self._std_MA * noise_SMA

    def fit(self, elites_SMA: torch.Tensor) -> None:
        """See ``Distribution``."""
        config = self._config
        self.centre_MA = torch.lerp(elites_SMA.mean(dim=0), self.centre_MA, config.momentum)
        std_MA = torch.lerp(elites_SMA.std(dim=0, correction=0), self._std_MA, config.momentum)
        self._std_MA = std_MA.clamp_min(config.min_std)


class Categorical:
    """A probability for each bin of each knot; it begins as a Gaussian does.

    Args:
        config: bins, smoothing and momentum.
        start_MA: where it begins.
    """

    def __init__(self, config: CategoricalConfig, start_MA: torch.Tensor):
        self._config = config
        self._centres_V = (torch.arange(config.bins, device=start_MA.device) + 0.5) / config.bins * 2 - 1
        offset_MAV = (self._centres_V - start_MA[..., None]) / config.init_std
        self._p_MAV = torch.softmax(-offset_MAV.square() / 2, dim=-1)

    @property
    def centre_MA(self) -> torch.Tensor:
        """See ``Distribution``."""
        return self._centres_V[self._p_MAV.argmax(dim=-1)]

    def shaped(self, noise_SMA: torch.Tensor) -> torch.Tensor:
        """See ``Distribution``: the bin at each quantile (a Gaussian copula)."""
        quantile_MAS = torch.special.ndtr(noise_SMA).permute(1, 2, 0).contiguous()
        bin_MAS = torch.searchsorted(self._p_MAV.cumsum(dim=-1)[..., :-1].contiguous(), quantile_MAS)
        return self._centres_V[bin_MAS].permute(2, 0, 1)

    def fit(self, elites_SMA: torch.Tensor) -> None:
        """See ``Distribution``."""
        config = self._config
        bin_SMA = ((elites_SMA + 1) / 2 * config.bins).long().clamp(0, config.bins - 1)
        chosen_MAV = F.one_hot(bin_SMA, config.bins).sum(dim=0).float()
        fitted_MAV = (chosen_MAV + config.smoothing / config.bins) / (len(elites_SMA) + config.smoothing)
        self._p_MAV = torch.lerp(fitted_MAV, self._p_MAV, config.momentum)


class CEM:
    """Fits a distribution over knots to the elites of its own candidates, again and again."""

    def __init__(self, space: PlanSpace, config: CEMConfig | None = None):
        self.space = space
        self.config = config or CEMConfig()

    def plan(
        self,
        evaluate: Evaluate,
        warm_start: torch.Tensor | None,
        generator: torch.Generator,
        proposals: Proposals | None = None,
    ) -> Plan:
        """Search from a warm start (or zeros); see ``emu_embodied.planners.proposals.ProposedPlanner``."""
        config = self.config
        search = Search(self.space, config, evaluate, warm_start, generator, proposals)
        distribution = config.around(search.start_MA)
        kept_SMA, kept_cost_S = search.starts_SMA[:0], search.start_MA.new_empty(0)
        for count in config.counts():
            knots_SMA = search.candidates(distribution.shaped(search.noise(count)), distribution.centre_MA)
            cost_S = torch.cat([search.score(knots_SMA), kept_cost_S])
            elite_S = lowest(cost_S, config.elites)
            elites_SMA = torch.cat([knots_SMA, kept_SMA])[elite_S]
            distribution.fit(elites_SMA)
            kept_SMA, kept_cost_S = elites_SMA[: config.kept_elites], cost_S[elite_S[: config.kept_elites]]
        return search.answer(distribution.centre_MA) if config.answer == "mean" else search.best()
