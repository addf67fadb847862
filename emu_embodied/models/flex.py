"""Attention of noisy copies by PyTorch's FlexAttention: one fused kernel that skips the blocks the mask forbids.

Emu3.5 trains DiDA so (a block mask, section 3.3). For CUDA devices; on a CPU it has no gradient and wins nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import cast

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from emu_embodied.models.masks import NoisyCopies


def attend_with_copies_flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, copies: NoisyCopies
) -> torch.Tensor:
    """The same as ``attend_with_copies``, without dropout.

    Args:
        query: [S, L, H, D], clean stream first, then the copies.
        key: [S, G, L, D].
        value: [S, G, L, D].
        copies: where the copies belong.

    Returns:
        [S, L, H, D].
    """
    run = _compiled() if query.is_cuda else cast("Callable[..., torch.Tensor]", flex_attention)
    mask = block_mask(copies, str(query.device))
    return run(query.transpose(1, 2), key, value, block_mask=mask, enable_gqa=True).transpose(1, 2)


@lru_cache(maxsize=16)
def block_mask(copies: NoisyCopies, device: str) -> BlockMask:
    """The copies' mask, which blocks of it are empty and which full; made once for each shape."""
    length = copies.clean_length + len(copies.block_starts) * copies.block_length
    places = torch.arange(length, device=device)
    starts = torch.tensor(copies.block_starts, device=device)
    copy_L = (places - copies.clean_length).div(copies.block_length, rounding_mode="floor").clamp(min=-1)
    # The last clean token that each token sees.
    horizon_L = torch.where(copy_L < 0, places, starts[copy_L.clamp(min=0)] - 1)

    def allowed(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        clean = (copy_L[k] < 0) & (k <= horizon_L[q])
        return clean | ((copy_L[k] >= 0) & (copy_L[k] == copy_L[q]))

    return create_block_mask(allowed, None, None, length, length, device=device)


@cache
def _compiled() -> Callable[..., torch.Tensor]:
    return cast("Callable[..., torch.Tensor]", torch.compile(flex_attention, dynamic=False))
