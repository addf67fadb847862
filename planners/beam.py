"""Beam search over action blocks: plans grow block by block, and only the best beginnings go on.

As it is done with the tokens of language models, with two differences: what scores a beginning is the future it leads
to, not its likelihood; and where nothing proposes, blocks are drawn around the one before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from emu_embodied.planners.proposals import Proposals
from emu_embodied.planners.sampling import PlanSpace, Search, SearchConfig, lowest
from emu_embodied.protocols import Evaluate
from emu_embodied.records import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamConfig(SearchConfig):
    """Settings of ``BeamSearch``; ``samples * iterations`` whole plans are what its beginnings may cost together."""

    width: int = 8
    """Beginnings that go on from each block to the next."""
    proposal_share: float = 0.75
    """Share of the blocks tried that are proposed, if anything proposes, in [0, 1]."""

    def __post_init__(self) -> None:
        SearchConfig.__post_init__(self)
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")


class BeamSearch:
    """Tries blocks after the best beginnings of plans.

    A beginning of h blocks costs h blocks of imagination, so a search tries more of them than ``samples * iterations``:
    as many after each block as make the same number of imagined blocks. Every warm start is among those tried, block
    by block, whether its beginning is among the best or not.
    """

    def __init__(self, space: PlanSpace, config: BeamConfig | None = None):
        self.space = space
        self.config = config or BeamConfig()

    def plan(
        self,
        evaluate: Evaluate,
        warm_start: torch.Tensor | None,
        generator: torch.Generator,
        proposals: Proposals | None = None,
    ) -> Plan:
        """Search beside a warm start (or zeros); see ``emu_embodied.planners.proposals.ProposedPlanner``."""
        config, space = self.config, self.space
        search = Search(space, config, evaluate, warm_start, generator)
        count = max(1, 2 * config.samples * config.iterations // (space.horizon + 1))
        starts_SMA = search.starts_SMA[:count]
        beams_SMA = starts_SMA[:1, :0]
        for h in range(space.horizon):
            parents_SMA = beams_SMA[torch.arange(count - len(starts_SMA)) % len(beams_SMA)]
            here = slice(h * space.knots_per_block, (h + 1) * space.knots_per_block)
            blocks_SMA = self._blocks(parents_SMA, search.start_MA[here], generator, proposals)
            upto_SMA = starts_SMA[:, : here.stop]
            tried_SMA = torch.cat([upto_SMA, torch.cat([parents_SMA, blocks_SMA], dim=1)])
            cost_S = search.score(tried_SMA, whole=h + 1 == space.horizon)
            beams_SMA = tried_SMA[lowest(cost_S, config.width)]
        return search.best()

    def _blocks(
        self,
        parents_SMA: torch.Tensor,
        start_MA: torch.Tensor,
        generator: torch.Generator,
        proposals: Proposals | None,
    ) -> torch.Tensor:
        """The knots of a block to try after each beginning [S, M of a block, A].

        Proposed ones come first; of the others every second one goes on as it went, the rest as the warm start does.
        """
        config, space = self.config, self.space
        count = len(parents_SMA)
        proposed = round(config.proposal_share * count) if proposals is not None else 0
        centres_SMA = start_MA.expand(count, -1, -1).clone()
        if parents_SMA.shape[1]:
            centres_SMA[::2] = parents_SMA[::2, -1:]
        noise_SMA = config.noise(count, space.knots_per_block, space.action_dim, generator)
        blocks_SMA = (centres_SMA + config.init_std * noise_SMA).clamp_(-1.0, 1.0)
        if proposals is not None and proposed > 0:
            done_ShKA = space.expand(parents_SMA[:proposed])
            blocks_SKA = proposals(done_ShKA, generator).to(blocks_SMA.device)
            blocks_SMA[:proposed] = replace(space, horizon=1).to_knots(blocks_SKA[:, None])
        return blocks_SMA
