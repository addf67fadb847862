"""Random shooting: the best of many candidates that nobody refined, the control every solver is compared with."""

from __future__ import annotations

import torch

from emu_embodied.planners.sampling import PlanSpace, Search, SearchConfig, draw
from emu_embodied.protocols import Evaluate
from emu_embodied.records import Plan


class RandomShooting:
    """Draws ``samples`` candidates ``iterations`` times from one fixed distribution and returns the cheapest.

    The warm start is only the first candidate; the distribution stays centred on zero actions.
    """

    def __init__(self, space: PlanSpace, config: SearchConfig | None = None):
        self.space = space
        self.config = config or SearchConfig()

    def plan(self, evaluate: Evaluate, warm_start: torch.Tensor | None, generator: torch.Generator) -> Plan:
        """Search beside a warm start float32 [H, K, A] (or zeros); see ``emu_embodied.protocols.Planner``."""
        search = Search(self.space, evaluate, warm_start, generator.device)
        centre_MA = torch.zeros_like(search.start_MA)
        std_MA = torch.full_like(centre_MA, self.config.init_std)
        for iteration in range(self.config.iterations):
            knots_SMA = draw(
                centre_MA,
                std_MA,
                samples=self.config.samples,
                correlation=self.config.correlation,
                generator=generator,
                first_MA=search.start_MA if iteration == 0 else None,
            )
            search.score(knots_SMA)
        return search.best()
