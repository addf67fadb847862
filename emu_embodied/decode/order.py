"""Which tokens of a state settle when: rules that choose among the tokens still open after a pass.

Shape letters: S candidates, M tokens of a state that are decoded (frame codes, then proprio bins), V ids of one kind.
"""

from __future__ import annotations

import difflib
import math
from typing import Literal

import torch

from emu_embodied.decode.grammar import StateLogits
from emu_embodied.tokens.sequence import StateTokens

Order = Literal["random", "confidence", "entropy"]
"""``random``: as the noise process has it; ``confidence``: the likeliest predictions first, as many a pass as the time
says; ``entropy``: as many as are nearly certain together."""

ORDERS: tuple[Order, ...] = ("random", "confidence", "entropy")


def check_order(order: str, time_shift: float, entropy_bound: float) -> None:
    """Check the settings of a sampler of several passes.

    Raises:
        ValueError: for an unknown order (with the nearest), or a number out of its range.
    """
    if order not in ORDERS:
        near = difflib.get_close_matches(order, ORDERS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown order {order!r}; known: {', '.join(ORDERS)}{hint}")
    if not time_shift > 0:
        raise ValueError(f"time_shift is {time_shift}, it has to be above 0")
    if not entropy_bound >= 0:
        raise ValueError(f"entropy_bound is {entropy_bound} nats, it has to be at least 0")


def times(passes: int, shift: float = 1.0) -> list[float]:
    """Times of the passes, from 0 (noise) to 1: ``passes + 1`` numbers.

    URSA's schedule t = 1 - shift s / (1 + (shift - 1) s), with s falling evenly from 1 to 0: above 1 it stays longer
    near noise.
    """
    remaining = [1 - i / passes for i in range(passes + 1)]
    return [1 - shift * s / (1 + (shift - 1) * s) for s in remaining]


def settled_by(t: float, tokens: int) -> int:
    """How many of ``tokens`` the order ``confidence`` has settled by time t: their share t, rounded up."""
    return min(tokens, math.ceil(tokens * t - 1e-9))


def log_probabilities(logits: StateLogits, predicted: StateTokens) -> torch.Tensor:
    """Log probability float32 [S, M] of each predicted token."""
    pairs = ((logits.frame, predicted.codes), (logits.proprio, predicted.proprio))
    return torch.cat([_chosen(part, ids) for part, ids in pairs], -1)


def entropies(logits: StateLogits) -> torch.Tensor:
    """Entropy float32 [S, M] of each token's distribution [nats]."""
    return torch.cat([_entropy(part) for part in (logits.frame, logits.proprio)], -1)


def most_confident(scores_SM: torch.Tensor, open_SM: torch.Tensor, count: int) -> torch.Tensor:
    """Bool [S, M]: the open tokens of highest score, as many as leave ``count`` tokens settled in all."""
    ranked = scores_SM.masked_fill(~open_SM, torch.inf).topk(count, -1).indices
    return torch.zeros_like(open_SM).scatter(-1, ranked, True) & open_SM


def within_entropy(entropies_SM: torch.Tensor, open_SM: torch.Tensor, bound: float) -> torch.Tensor:
    """Bool [S, M]: the open tokens of lowest entropy whose sum stays within ``bound`` [nats], and always the first.

    Tokens are predicted apart from each other, so what a pass may get wrong by settling several at once is bounded by
    the sum of their entropies (the entropy-bounded sampler, arXiv 2505.24857).
    """
    ordered, order = entropies_SM.masked_fill(~open_SM, -1.0).sort(-1)  # what is settled comes first and adds nothing
    first_S1 = (~open_SM).sum(-1, keepdim=True).clamp(max=open_SM.shape[-1] - 1)
    within_SM = (ordered.clamp(min=0).cumsum(-1) <= bound).scatter(-1, first_S1, True)
    return torch.zeros_like(open_SM).scatter(-1, order, within_SM) & open_SM


def _chosen(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
