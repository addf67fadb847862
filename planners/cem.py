"""Cross-entropy method with correlated noise and kept elites (iCEM, Pinneri et al. 2020, arXiv:2008.06389)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from emu_embodied.planners.sampling import PlanSpace, Search, SearchConfig, draw, lowest
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

    @property
    def elites(self) -> int:
        """Number of elites."""
        return max(1, round(self.elite_share * self.samples))


class CEM:
    """Fits a Gaussian over knots to the elites of its own candidates, again and again."""

    def __init__(self, space: PlanSpace, config: CEMConfig | None = None):
        self.space = space
        self.config = config or CEMConfig()

    def plan(self, evaluate: Evaluate, warm_start: torch.Tensor | None, generator: torch.Generator) -> Plan:
        """Search from a warm start float32 [H, K, A] (or zeros); see ``emu_embodied.protocols.Planner``."""
        config = self.config
        search = Search(self.space, evaluate, warm_start, generator.device)
        mean_MA = search.start_MA
        std_MA = torch.full_like(mean_MA, config.init_std)
        kept_SMA, kept_cost_S = mean_MA.new_empty(0, *mean_MA.shape), mean_MA.new_empty(0)
        for _ in range(config.iterations):
            knots_SMA = draw(
                mean_MA, std_MA, samples=config.samples, correlation=config.correlation, generator=generator
            )
            cost_S = torch.cat([search.score(knots_SMA), kept_cost_S])
            knots_SMA = torch.cat([knots_SMA, kept_SMA])
            elite_S = lowest(cost_S, config.elites)
            elites_SMA = knots_SMA[elite_S]
            mean_MA = torch.lerp(elites_SMA.mean(dim=0), mean_MA, config.momentum)
            std_MA = torch.lerp(elites_SMA.std(dim=0, correction=0), std_MA, config.momentum).clamp_min(config.min_std)
            kept_SMA, kept_cost_S = elites_SMA[: config.kept_elites], cost_S[elite_S[: config.kept_elites]]
        return search.answer(mean_MA) if config.answer == "mean" else search.best()
