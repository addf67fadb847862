"""What may be done to the costs that a planner sees, without it knowing: means over noise, penalties."""

from __future__ import annotations

from collections.abc import Callable

import torch

from emu_embodied.protocols import Evaluate

Strangeness = Callable[[torch.Tensor], torch.Tensor]
"""How unlike what was seen in training plans [S, H, K, A] are: float32 [S]; 0 is usual, 1 as likely as any other."""


def averaged(evaluate: Evaluate, decodes: int) -> Evaluate:
    """The mean cost of ``decodes`` imaginations of each plan, each with its own noise.

    A generative model is noisy, and what is cheapest of many candidates is first of all lucky. It costs as much as
    ``decodes`` times the candidates; the true simulator gives the same future each time.
    """
    if decodes < 1:
        raise ValueError(f"decodes must be at least 1, got {decodes}")
    if decodes == 1:
        return evaluate

    def mean_cost(actions_SHKA: torch.Tensor) -> torch.Tensor:
        cost_S = evaluate(actions_SHKA.repeat_interleave(decodes, dim=0))
        return cost_S.unflatten(0, (-1, decodes)).mean(dim=1)

    return mean_cost


def penalised(evaluate: Evaluate, strangeness: Strangeness, weight: float) -> Evaluate:
    """Cost plus ``weight`` times how strange a plan is: a model is to be trusted where it has seen what is done."""

    def cost(actions_SHKA: torch.Tensor) -> torch.Tensor:
        cost_S = evaluate(actions_SHKA)
        return cost_S + weight * strangeness(actions_SHKA).to(cost_S.device)

    return cost
