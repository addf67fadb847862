"""Attention of new tokens to a shared prefix and to their own sequence, in one softmax.

Shape letters: S sequences, H query heads, G key-value heads, T new tokens, E own keys, P prefix keys, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from emu_embodied.models.masks import NoisyCopies

KeyValue = tuple[torch.Tensor, torch.Tensor]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    causal: bool = False,
    prefix: KeyValue | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Scaled dot-product attention with grouped heads and an optional prefix that all sequences share.

    Args:
        query: [S, H, T, D].
        key: [S, G, E, D].
        value: [S, G, E, D].
        bias: added to the scores, [T, E] or broadcastable to [S, H, T, E].
        causal: T == E and each token sees itself and those before it; excludes ``bias``.
        prefix: keys and values [1, G, P, D], visible to every query.
        dropout: probability of dropping an attention weight.

    Returns:
        [S, H, T, D].
    """
    grouped = query.shape[1] != key.shape[1]
    if prefix is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=causal, dropout_p=dropout, enable_gqa=grouped
        )
    if query.device.type == "cpu" and not torch.is_grad_enabled():
        return _attend_in_two_parts(query, key, value, bias, causal, prefix)
    sequences, length = len(key), prefix[0].shape[2]
    key = torch.cat([prefix[0].expand(sequences, -1, -1, -1), key], dim=2)
    value = torch.cat([prefix[1].expand(sequences, -1, -1, -1), value], dim=2)
    if causal:
        tokens = query.shape[2]
        bias = torch.full((tokens, tokens), float("-inf"), device=query.device, dtype=query.dtype).triu(1)
    if bias is not None:
        bias = F.pad(bias, (length, 0))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, enable_gqa=grouped)


def attend_with_copies(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, copies: NoisyCopies, *, dropout: float = 0.0
) -> torch.Tensor:
    """Attention of a clean stream and its noisy copies, piece by piece.

    Equal to masking all pairs, without computing the pairs that the mask forbids (most of them).

    Args:
        query: [B, H, L, D], clean stream first, then the copies.
        key: [B, G, L, D].
        value: [B, G, L, D].
        copies: where the copies belong.
        dropout: probability of dropping an attention weight.
    """
    grouped = query.shape[1] != key.shape[1]
    clean, length = copies.clean_length, copies.block_length
    mixed = [
        F.scaled_dot_product_attention(
            query[:, :, :clean], key[:, :, :clean], value[:, :, :clean], is_causal=True, dropout_p=dropout, enable_gqa=grouped
        )
    ]
    for index, start in enumerate(copies.block_starts):
        own = slice(clean + index * length, clean + (index + 1) * length)
        seen_key = torch.cat([key[:, :, :start], key[:, :, own]], 2)
        seen_value = torch.cat([value[:, :, :start], value[:, :, own]], 2)
        mixed.append(
            F.scaled_dot_product_attention(
                query[:, :, own], seen_key, seen_value, dropout_p=dropout, enable_gqa=grouped
            )
        )
    return torch.cat(mixed, 2)


def _attend_in_two_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    causal: bool,
    prefix: KeyValue,
) -> torch.Tensor:
    """Attend to prefix and own keys apart, and join both by their log-sum-exp: exact, and nothing is copied."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own, own_lse = flash(query, key, value, 0.0, causal, attn_mask=bias)
    sequences, heads, tokens, width = query.shape
    groups = key.shape[1]
    # Every query of every sequence and of every head that shares a key-value head meets the one prefix in one product.
    folded = query.view(sequences, groups, -1, width).transpose(0, 1).reshape(1, groups, -1, width)
    shared, shared_lse = flash(folded, *prefix)
    shared = shared.view(groups, sequences, -1, width).transpose(0, 1).reshape(sequences, heads, tokens, width)
    shared_lse = shared_lse.view(groups, sequences, -1).transpose(0, 1).reshape(sequences, heads, tokens)
    return torch.lerp(own, shared, torch.sigmoid(shared_lse - own_lse).unsqueeze(-1).to(own.dtype))
