"""Random shooting: the best of many candidates that nobody refined, the control every solver is compared with."""

from __future__ import annotations

import torch

from emu_embodied.planners.proposals import Proposals
from emu_embodied.planners.sampling import PlanSpace, Search, SearchConfig
from emu_embodied.protocols import Evaluate
from emu_embodied.records import Plan


class RandomShooting:
    """Draws ``samples`` candidates ``iterations`` times from one fixed distribution and returns the cheapest.

    The warm start is only the first candidate; the distribution stays centred on zero actions.
    """

    def __init__(self, space: PlanSpace, config: SearchConfig | None = None):
        self.space = space
        self.config = config or SearchConfig()

    def plan(
        self,
        evaluate: Evaluate,
        warm_start: torch.Tensor | None,
        generator: torch.Generator,
        proposals: Proposals | None = None,
    ) -> Plan:
        """Search beside a warm start (or zeros); see ``emu_embodied.planners.proposals.ProposedPlanner``."""
        config = self.config
        search = Search(self.space, config, evaluate, warm_start, generator, proposals)
        centre_MA = torch.zeros_like(search.start_MA)
        for _ in range(config.iterations):
            search.score(search.candidates(config.init_std * search.noise(config.samples), centre_MA))
        return search.best()
