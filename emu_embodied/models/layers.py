"""The backbone's layers.

Shape letters: B batch, T new tokens, D width, K env steps in a block, A action dims.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from emu_embodied.models.attention import attend, attend_with_copies
from emu_embodied.models.cache import BorrowedCache, KVCache
from emu_embodied.models.config import EmuConfig
from emu_embodied.models.joint import Direct, JointLinear, linear
from emu_embodied.models.masks import NoisyCopies


class RMSNorm(Direct):
    """Root-mean-square norm over the last dimension, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., width]; ``eps`` is ``Call.eps``."""
        normed, weight = normalise(x, eps), self._parameters["weight"]
        return normed * weight if torch.is_grad_enabled() else normed.mul_(weight)


def normalise(x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Divide by the root mean square over the last dimension."""
    # A norm is one pass over x where a mean of squares is two, and this runs on every token of every candidate. Adding
    # a number costs three times as much as adding a tensor of one element, which counts when there is one token.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return x * scale if x.dtype == torch.float32 else (x * scale).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Call:
    """What all layers share in one call of ``core``.

    Attributes:
        eps: float32 scalar, added to the mean square in every norm.
        cos: cosines [1 or B, T, 1, head dim] of the rotary angles, the same in both halves of a head.
        sin: sines, negative in the first half.
        bias: added to the scores of own keys; or the copies that say which to compute; or None.
        prefix_bias: added to the scores of the prefix's keys, or None.
        causal: plain causal attention among new tokens, no bias needed.
        cache: where new keys and values go, or None.
        span: own keys read from the cache.
        prefix_span: keys read from its prefix.
        first: tokens before it are needed for their keys and values only, nothing else of them leaves the layer.
    """

    eps: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    bias: torch.Tensor | NoisyCopies | None = None
    prefix_bias: torch.Tensor | None = None
    causal: bool = False
    cache: KVCache | BorrowedCache | None = None
    span: int = 0
    prefix_span: int = 0
    first: int = 0

    def reading_from(self, first: int) -> Call:
        """The same for the last layer, where only the tokens from ``first`` on are read out."""
        return replace(self, first=first, bias=self.bias[..., first:, :] if torch.is_tensor(self.bias) else None)

    def rows(self, start: int, stop: int) -> Call:
        """The same for the sequences ``start .. stop - 1``."""
        cos, sin = (x if len(x) == 1 else x[start:stop] for x in (self.cos, self.sin))
        bias = self.bias[start:stop] if torch.is_tensor(self.bias) and self.bias.dim() == 4 else self.bias
        cache = self.cache.rows(start, stop) if isinstance(self.cache, KVCache) else self.cache
        return replace(self, cos=cos, sin=sin, bias=bias, cache=cache)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Call:
        """The same for a layer that lives on another device (models spread over several)."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name in ("eps", "cos", "sin", "bias", "prefix_bias")
            if isinstance(value := getattr(self, name), torch.Tensor)
        }
        return replace(self, **moved)


def rotations(
    positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``Call.cos`` and ``Call.sin`` of positions [T] or [B, T]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.view(-1, positions.shape[-1], 1, 1).float() * (1.0 / theta**exponents)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE: the first half of a head [..., head dim] are real parts, the second half imaginary parts."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class EmuAttention(JointLinear):
    """Grouped-query attention with per-head norm of queries and keys, then RoPE."""

    joint_names = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: EmuConfig, layer: int) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        self.layer = layer
        self.head_dim = head
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(width, config.num_attention_heads * head, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head, width, bias=False)
        self.q_norm = RMSNorm(head)
        self.k_norm = RMSNorm(head)

    def forward(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        """[B, T, D] -> [B, T - call.first, D]."""
        batch, tokens, first = len(x), x.shape[1], call.first
        modules = self._modules
        query, key, value = self.project(x)
        cos, sin = call.cos, call.sin
        key = _rotate(modules["k_norm"](key.view(batch, tokens, -1, self.head_dim), call.eps), cos, sin).transpose(1, 2)
        value = value.view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        if first:
            query, cos, sin = query[:, first:], cos[:, first:], sin[:, first:]
        query = _rotate(modules["q_norm"](query.view(batch, tokens - first, -1, self.head_dim), call.eps), cos, sin)
        dropout = self.dropout if self.training else 0.0
        if isinstance(call.bias, NoisyCopies):
            mixed = attend_with_copies(query, key, value, call.bias, dropout=dropout)
        else:
            prefix = None
            if call.cache is not None:
                prefix = call.cache.shared(self.layer, call.prefix_span)
                key, value = call.cache.write(self.layer, key, value, call.span)
            mixed = attend(
                query,
                key,
                value,
                call.bias,
                causal=call.causal,
                prefix=prefix,
                prefix_bias=call.prefix_bias,
                dropout=dropout,
            )
        return linear(modules["o_proj"], mixed.flatten(2))


class EmuMLP(JointLinear):
    """SwiGLU."""

    joint_names = ("gate_proj", "up_proj")

    def __init__(self, config: EmuConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        gate, up = self.project(x)
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(gate) * up)
        # In place: fresh memory for the widest tensors of the model costs as much as the arithmetic.
        return linear(self._modules["down_proj"], F.silu(gate, inplace=True).mul_(up))


class EmuLayer(Direct, GradientCheckpointingLayer):
    """Attention, then MLP, each on a normed copy and added to the stream."""

    def __init__(self, config: EmuConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = EmuAttention(config, layer)
        self.mlp = EmuMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.dropout = config.attention_dropout

    def forward(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        """[B, T, D] -> [B, T - call.first, D]."""
        attention, mlp, before, between = self._modules.values()
        y = attention(before(x, call.eps), call)
        x = (x[:, call.first :] if call.first else x) + self._drop(y)
        return x + self._drop(mlp(between(x, call.eps)))

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class ActionEmbedding(nn.Module):
    """Continuous embedding of an action block, added to every token of the state it leads to.

    Action tokens alone are too weak a condition: models learn to ignore them. The last layer starts at zero, so that a
    model which never saw an action is unchanged by it (iVideoGPT).
    """

    def __init__(self, config: EmuConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.action_block * config.action_dim, config.hidden_size)
        self.down = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, actions: torch.Tensor) -> torch.Tensor:
        """Action blocks [..., K, A] in [-1, 1] -> [..., D]."""
        return self.down(F.silu(self.up(actions.flatten(-2))))
