"""Attention masks: bool [queries, keys], True where a query may look at a key.

A mask speaks only of the new tokens of one call; whatever a KV cache already holds is visible to all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def causal(length: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Bool [length, length]: every token sees itself and what came before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def causal_then_parallel(clean: int, noisy: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Mask of one parallel decoding call: ``clean`` tokens that are new to the cache, then a block being denoised.

    Clean tokens are causal and never see the block; its tokens see every clean token and each other (Emu3.5, Fig. 9).

    Returns:
        bool [clean + noisy, clean + noisy].
    """
    mask = causal(clean + noisy, device)
    mask[clean:, clean:] = True
    return mask


def dida_training_mask(
    clean_length: int, block_starts: Sequence[int], block_length: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Mask of a training sequence: a clean stream followed by noisy copies of some of its blocks.

    The layout is ``[clean 0 .. clean_length) [copy of block 0] [copy of block 1] ...``; copy b holds ``block_length``
    tokens and stands for the clean tokens from ``block_starts[b]`` on. Clean tokens are causal and see no noise. Tokens
    of copy b see the clean tokens before ``block_starts[b]`` (never their own clean originals) and all of copy b.

    Args:
        clean_length: tokens of the clean stream.
        block_starts: position in the clean stream at which each copied block begins.
        block_length: tokens of one copy.
        device: where to make it.

    Returns:
        bool [L, L], ``L = clean_length + len(block_starts) * block_length``.

    Raises:
        ValueError: if a block does not begin inside the clean stream.
    """
    if any(not 0 <= start <= clean_length for start in block_starts):
        raise ValueError(f"block_starts {list(block_starts)} must lie in [0, {clean_length}], the clean stream")
    starts = torch.as_tensor(block_starts, dtype=torch.long, device=device)
    noisy_length = len(starts) * block_length
    # A clean token's horizon is its own position; a noisy one's is the last clean token before its block.
    horizon = torch.cat([torch.arange(clean_length, device=device), starts.repeat_interleave(block_length) - 1])
    clean_keys = torch.arange(clean_length, device=device) <= horizon[:, None]
    copy = torch.arange(len(starts), device=device).repeat_interleave(block_length)
    noisy_keys = torch.zeros(clean_length + noisy_length, noisy_length, dtype=torch.bool, device=device)
    noisy_keys[clean_length:] = copy[:, None] == copy
    return torch.cat([clean_keys, noisy_keys], dim=1)


@dataclass(frozen=True, slots=True)
class NoisyCopies:
    """The structure behind ``dida_training_mask``: attention that knows it skips what the mask forbids.

    Attributes:
        clean_length: tokens of the clean stream.
        block_starts: position in the clean stream at which each copied block begins.
        block_length: tokens of one copy.
        flex: compute it by FlexAttention where there is a GPU and no dropout, else piece by piece.
    """

    clean_length: int
    block_starts: tuple[int, ...]
    block_length: int
    flex: bool = False

    def dense(self, device: torch.device | str | None = None) -> torch.Tensor:
        """The same as a mask."""
        return dida_training_mask(self.clean_length, self.block_starts, self.block_length, device)
