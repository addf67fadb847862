"""Where candidates may come from besides noise: what a planner asks for, without knowing who answers.

Shape letters: S candidates, H horizon in blocks, h blocks decided so far, K env steps in a block, A action dims.
"""

from __future__ import annotations

from typing import Protocol

import torch

from emu_embodied.protocols import Evaluate
from emu_embodied.records import Plan


class Proposals(Protocol):
    """Goes on with plans, from the state of one decision."""

    def __call__(self, done_ShKA: torch.Tensor, generator: torch.Generator, /) -> torch.Tensor:
        """A next block float32 [S, K, A] for each of S beginnings of plans [S, h, K, A], drawn anew in each call.

        Args:
            done_ShKA: float32, what each plan has decided; h is 0 where plans begin.
            generator: of the draws.
        """
        ...


def propose(
    proposals: Proposals, count: int, shape_HKA: tuple[int, int, int], generator: torch.Generator
) -> torch.Tensor:
    """Whole plans float32 [S, H, K, A], block by block."""
    horizon, block, action_dim = shape_HKA
    plans_ShKA = torch.empty(count, 0, block, action_dim)
    for _ in range(horizon):
        block_SKA = proposals(plans_ShKA, generator)
        plans_ShKA = torch.cat([plans_ShKA.to(block_SKA.device), block_SKA[:, None]], dim=1)
    return plans_ShKA


class ProposedPlanner(Protocol):
    """A ``Planner`` that takes proposals."""

    def plan(
        self,
        evaluate: Evaluate,
        warm_start: torch.Tensor | None,
        generator: torch.Generator,
        proposals: Proposals | None = None,
    ) -> Plan:
        """Search from ``warm_start``.

        Args:
            evaluate: costs of candidates.
            warm_start: float32 [H, K, A], or several [S, H, K, A], of which the first is where the search starts;
                None for a cold start.
            generator: of all noise.
            proposals: goes on with plans; some of the first candidates are its own.
        """
        ...
