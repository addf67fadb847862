"""The optimizers of the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from emu_embodied.train.loop import LoopConfig

OptimizerName = Literal["adamw", "muon"]


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices between embedding and head, AdamW for everything else.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that one learning rate
    serves both. Both are torch's own; they share one ``state``, each parameter's under itself.

    Args:
        matrices: what Muon updates.
        others: AdamW's groups.
        learning_rate: of both.
        betas: AdamW's moment decays.
        weight_decay: of the matrices.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[dict[str, Any]],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        rest = [torch.optim.AdamW(others, lr=learning_rate, betas=betas, fused=True)] if others else []
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, *rest)
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups, {})
        for part in self.parts:
            part.state = self.state
        # The very groups of the parts, so that a rate set here is theirs.
        self.param_groups = groups

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # there is no loss to evaluate anew
        """One step of both."""
        for part in self.parts:
            part.step()


def build_optimizer(config: LoopConfig, module: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of everything in a module that is trained; norms, biases and embedding tables are not decayed.

    Where a module has no hidden matrices, ``muon`` is AdamW.
    """
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    head = getattr(module, "lm_head", None)
    outer = tables | ({id(head.weight)} if isinstance(head, nn.Linear) else set())
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if config.optimizer == "muon" and p.ndim == 2 and id(p) not in outer]
    chosen = {id(p) for p in matrices}
    rest = [p for p in trained if id(p) not in chosen]
    decayed = [p for p in rest if p.ndim >= 2 and id(p) not in tables]
    kept = [p for p in rest if p.ndim < 2 or id(p) in tables]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not matrices:
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    return MuonAndAdamW(
        matrices,
        groups,
        learning_rate=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
