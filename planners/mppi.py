"""Model predictive path integral control, elite-weighted as in TD-MPC2 (Hansen et al. 2024, arXiv:2310.16828)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from emu_embodied.planners.proposals import Proposals
from emu_embodied.planners.sampling import PlanSpace, Search, SearchConfig, lowest
from emu_embodied.protocols import Evaluate
from emu_embodied.records import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class MPPIConfig(SearchConfig):
    """Settings of ``MPPI``."""

    elite_share: float = 0.25
    """Share of ``samples`` that is weighted, the cheapest ones; the others count for nothing."""
    temperature: float = 0.5
    """Sharpness of the weights [standard deviations of the elites' costs], so that no objective needs its own."""
    min_std: float = 0.05
    """Smallest standard deviation [action units]; keeps a search from freezing."""
    answer: Literal["best", "mean"] = "best"
    """What is returned: the cheapest candidate, or the last weighted mean (one evaluation more)."""

    def __post_init__(self) -> None:
        SearchConfig.__post_init__(self)
        if not 0.0 < self.elite_share <= 1.0:
            raise ValueError(f"elite_share must be in (0, 1], got {self.elite_share}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    @property
    def elites(self) -> int:
        """Number of elites."""
        return max(1, round(self.elite_share * self.samples))


class MPPI:
    """Moves a Gaussian over knots to the exponentially weighted mean of its candidates."""

    def __init__(self, space: PlanSpace, config: MPPIConfig | None = None):
        self.space = space
        self.config = config or MPPIConfig()

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
        for _ in range(config.iterations):
            knots_SMA = search.candidates(mean_MA + std_MA * search.noise(config.samples), mean_MA)
            cost_S = search.score(knots_SMA)
            elite_S = lowest(cost_S, config.elites)
            elites_SMA, elite_cost_S = knots_SMA[elite_S], cost_S[elite_S]
            spread = elite_cost_S.std(correction=0).clamp_min(torch.finfo(torch.float32).eps)
            weights_S11 = torch.softmax(-elite_cost_S / (config.temperature * spread), dim=0)[:, None, None]
            mean_MA = (weights_S11 * elites_SMA).sum(dim=0)
            variance_MA = (weights_S11 * (elites_SMA - mean_MA).square()).sum(dim=0)
            std_MA = variance_MA.sqrt().clamp(config.min_std, config.init_std)
        return search.answer(mean_MA) if config.answer == "mean" else search.best()
