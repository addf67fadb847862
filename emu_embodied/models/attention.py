"""Attention of new tokens to their own sequence and to a prefix that all sequences share, in one softmax.

Shape letters: S sequences, T new tokens, H query heads, G key-value heads, E own keys, P prefix keys, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from emu_embodied.models.masks import NoisyCopies


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None = None,
    causal: bool = False,
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
    prefix_bias: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Scaled dot-product attention with grouped heads.

    Args:
        query: [S, T, H, D].
        key: [S, G, E, D].
        value: [S, G, E, D].
        bias: added to the scores, [T, E] or broadcastable to [S, H, T, E].
        causal: T == E and each token sees itself and those before it; excludes ``bias``.
        prefix: keys and values [1, G, P, D] shared by all sequences.
        prefix_bias: added to the scores of the prefix, [1, P].
        dropout: probability of dropping an attention weight.

    Returns:
        [S, T, H, D].
    """
    if prefix is not None and query.device.type == "cpu" and not torch.is_grad_enabled():
        return _attend_in_two_parts(query, key, value, bias, causal, prefix, prefix_bias)
    if prefix is not None:
        length = prefix[0].shape[2]
        key = torch.cat([prefix[0].expand(len(key), -1, -1, -1), key], dim=2)
        value = torch.cat([prefix[1].expand(len(value), -1, -1, -1), value], dim=2)
        if causal:
            tokens = query.shape[1]
            bias = query.new_full((tokens, tokens), float("-inf")).triu(1)
            causal = False
        if bias is not None or prefix_bias is not None:
            own = query.new_zeros(1, key.shape[2] - length) if bias is None else bias
            first = query.new_zeros(1, length) if prefix_bias is None else prefix_bias
            bias = torch.cat([first.expand(*own.shape[:-1], length), own], dim=-1)
    sequences, tokens, heads, width = query.shape
    groups = key.shape[1]
    if tokens == 1 and heads != groups and bias is None:
        # Heads that share keys become rows of one product, which reads the keys once.
        rows = query.reshape(sequences, groups, heads // groups, width)
        return F.scaled_dot_product_attention(rows, key, value, dropout_p=dropout).view(query.shape)
    return F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key,
        value,
        attn_mask=bias,
        is_causal=causal,
        dropout_p=dropout,
        enable_gqa=heads != groups,
    ).transpose(1, 2)


def attend_with_copies(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, copies: NoisyCopies, *, dropout: float = 0.0
) -> torch.Tensor:
    """Attention of a clean stream and its noisy copies, piece by piece.

    Equal to masking all pairs, without computing the pairs that the mask forbids (most of them).

    Args:
        query: [S, L, H, D], clean stream first, then the copies.
        key: [S, G, L, D].
        value: [S, G, L, D].
        copies: where the copies belong.
        dropout: probability of dropping an attention weight.

    Returns:
        [S, L, H, D].
    """
    if copies.flex and query.is_cuda and not dropout:
        from emu_embodied.models.flex import attend_with_copies_flex  # importing its compiler takes seconds

        return attend_with_copies_flex(query, key, value, copies)
    clean, length = copies.clean_length, copies.block_length
    mixed = [attend(query[:, :clean], key[:, :, :clean], value[:, :, :clean], causal=True, dropout=dropout)]
    for index, start in enumerate(copies.block_starts):
        own = slice(clean + index * length, clean + (index + 1) * length)
        seen_key = torch.cat([key[:, :, :start], key[:, :, own]], 2)
        seen_value = torch.cat([value[:, :, :start], value[:, :, own]], 2)
        mixed.append(attend(query[:, own], seen_key, seen_value, dropout=dropout))
    return torch.cat(mixed, 1)


def _attend_in_two_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    causal: bool,
    prefix: tuple[torch.Tensor, torch.Tensor],
    prefix_bias: torch.Tensor | None,
) -> torch.Tensor:
    """Attend to the own keys and to the prefix apart, then join both by their log-sum-exp.

    This is exact, copies nothing, and lets the queries of all sequences meet the one prefix in one product.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own, own_lse = flash(query.transpose(1, 2), key, value, 0.0, causal, attn_mask=bias)
    sequences, tokens, heads, width = query.shape
    rows = query.reshape(1, sequences * tokens, heads, width).transpose(1, 2)
    shared, shared_lse = flash(rows, *prefix, attn_mask=prefix_bias)
    own, own_lse = own.transpose(1, 2), own_lse.transpose(1, 2)
    shared = shared.transpose(1, 2).reshape(query.shape)
    shared_lse = shared_lse.transpose(1, 2).reshape(own_lse.shape)
    return torch.lerp(own, shared, torch.sigmoid(shared_lse - own_lse).unsqueeze(-1).to(own.dtype))
