"""Cross-entropy method with kept elites, and iCEM (Pinneri et al. 2020, arXiv:2008.06389) as a setting of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

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
    """What is returned: the cheapest candidate, or the last mean (one evaluation more; trusts a noisy model less)."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ICEMConfig(CEMConfig):
    """``CEM`` as iCEM: coloured noise, elites that outlive the decision, fewer candidates in later iterations."""

    beta: float | None = 2.0
    """See ``SearchConfig``; 0.25 to 4 in the paper, by task."""
    carried: int = 3
    """See ``SearchConfig``; the paper carries 0.3 of its 10 elites."""
    decay: float = 1.25
    """See ``CEMConfig``; the paper's."""


class CEM:
    """Fits a Gaussian over knots to the elites of its own candidates, again and again."""

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
        mean_MA = search.start_MA
        std_MA = torch.full_like(mean_MA, config.init_std)
        kept_SMA, kept_cost_S = mean_MA.new_empty(0, *mean_MA.shape), mean_MA.new_empty(0)
        for count in config.counts():
            knots_SMA = search.draw(mean_MA, std_MA, count)
            cost_S = torch.cat([search.score(knots_SMA), kept_cost_S])
            knots_SMA = torch.cat([knots_SMA, kept_SMA])
            elite_S = lowest(cost_S, config.elites)
            elites_SMA = knots_SMA[elite_S]
            mean_MA = torch.lerp(elites_SMA.mean(dim=0), mean_MA, config.momentum)
            std_MA = torch.lerp(elites_SMA.std(dim=0, correction=0), std_MA, config.momentum).clamp_min(config.min_std)
            kept_SMA, kept_cost_S = elites_SMA[: config.kept_elites], cost_S[elite_S[: config.kept_elites]]
        return search.answer(mean_MA) if config.answer == "mean" else search.best()
