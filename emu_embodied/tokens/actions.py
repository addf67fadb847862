"""Action blocks as tokens: one token for each action dimension, the mean over the block's K env steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ActionTokenizer:
    """Uniform bins over [-1, 1].

    The tokens carry the block's mean action: the policy role emits them and holds the action over the block. The
    world-model role additionally receives all K x A numbers unrounded (``EmuConfig.action_block``).

    Attributes:
        bins: bins for each dimension.
        block: env steps K in a block.
    """

    bins: int
    block: int

    def encode(self, actions_KA: torch.Tensor) -> torch.Tensor:
        """Float [..., K, A] in [-1, 1] -> int64 bins [..., A]; values outside are clipped."""
        mean = actions_KA.mean(-2)
        return ((mean + 1) / 2 * self.bins).floor().clamp(0, self.bins - 1).long()

    def decode(self, bins_A: torch.Tensor) -> torch.Tensor:
        """int64 bins [..., A] -> float32 [..., K, A]: the bins' centres, held over the block."""
        held = (bins_A.float() + 0.5) / self.bins * 2 - 1
        return held.unsqueeze(-2).expand(*held.shape[:-1], self.block, held.shape[-1]).clone()
