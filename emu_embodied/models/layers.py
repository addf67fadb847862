"""The backbone's layers.

Shape letters: B batch, T new tokens, D width, K env steps in a block, A action dims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from emu_embodied.models.attention import attend, attend_with_copies
from emu_embodied.models.cache import BorrowedCache, KVCache
from emu_embodied.models.config import EmuConfig
from emu_embodied.models.joint import Bare, Bound, JointLinear, cheapest
from emu_embodied.models.masks import NoisyCopies


class RMSNorm(Bare):
    """Root-mean-square norm over the last dimension, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., width]; ``eps`` is ``Call.eps``."""
        return normalise(x, eps, self.weight)

    def bare(self) -> Callable[..., torch.Tensor]:
        """``forward``."""
        return partial(normalise, weight=self.weight)


def normalise(x: torch.Tensor, eps: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Divide by the root mean square over the last dimension, then multiply by a weight."""
    # A norm is one pass over x where a mean of squares is two, and this runs on every token of every candidate. Adding
    # a number costs three times as much as adding a tensor of one element, which counts when there is one token.
    norm = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
    normed = x * torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
    if x.dtype != torch.float32:
        normed = normed.to(x.dtype)
    return normed * weight if torch.is_grad_enabled() else normed.mul_(weight)


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
    frequencies, signs = _frequencies(head_dim, theta, positions.device)
    angles = positions.view(-1, positions.shape[-1], 1, 1) * frequencies
    cos, sin = angles.cos(), angles.sin().mul_(signs)
    return (cos, sin) if dtype == torch.float32 else (cos.to(dtype), sin.to(dtype))


@lru_cache(maxsize=64)
def _frequencies(head_dim: int, theta: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary frequency of each dimension of a head and the sign of its sine, float32 [head dim] each."""
    with torch.inference_mode(False):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        ones = torch.ones_like(exponents)
        return (1.0 / theta**exponents).repeat(2), torch.cat([-ones, ones])


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
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(width, self.heads * head, bias=False)
        self.k_proj = nn.Linear(width, self.groups * head, bias=False)
        self.v_proj = nn.Linear(width, self.groups * head, bias=False)
        self.o_proj = nn.Linear(self.heads * head, width, bias=False)
        self.q_norm = RMSNorm(head)
        self.k_norm = RMSNorm(head)
        self.join()

    def look_up(self) -> tuple[Callable[..., torch.Tensor], ...]:
        """Calls that give queries, keys and values [B, T, E] of x, that norm queries and keys, and the last map."""
        joint = self.joint()
        project = self._project_apart if joint is None else partial(F.linear, weight=joint)
        norms = cheapest(self.q_norm), cheapest(self.k_norm)
        norm: Callable[..., torch.Tensor] = self._norm_apart
        if all(isinstance(call, partial) for call in norms):
            weights = self.q_norm.weight.expand(self.heads, -1), self.k_norm.weight.expand(self.groups, -1)
            norm = partial(normalise, weight=torch.cat(weights))
        return project, norm, cheapest(self.o_proj)

    def _project_apart(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)

    def _norm_apart(self, heads: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        query, key = heads.split([self.heads, self.groups], 2)
        return torch.cat([self.q_norm(query, eps), self.k_norm(key, eps)], 2)

    def forward(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        """[B, T, D] -> [B, T - call.first, D]."""
        calls = self.calls
        project, norm, out = self.bind() if calls is None or torch.is_grad_enabled() else calls
        batch, tokens, _ = x.shape
        heads, groups, cache = self.heads, self.groups, call.cache
        states = project(x).view(batch, tokens, -1, self.head_dim)
        turned, value = states.split_with_sizes([heads + groups, groups], 2)
        query, key = _rotate(norm(turned, call.eps), call.cos, call.sin).split_with_sizes([heads, groups], 2)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if call.first:
            query, tokens = query[:, call.first :], tokens - call.first
        dropout = self.dropout if self.training else 0.0
        if isinstance(call.bias, NoisyCopies):
            mixed = attend_with_copies(query, key, value, call.bias, dropout=dropout)
        else:
            prefix = None
            if cache is not None:
                prefix = cache.shared(self.layer, call.prefix_span) if call.prefix_span else None
                key, value = cache.write(self.layer, key, value, call.span)
            mixed = attend(query, key, value, call.bias, call.causal, prefix, call.prefix_bias, dropout)
        return out(mixed.reshape(batch, tokens, -1))


class EmuMLP(JointLinear):
    """SwiGLU."""

    joint_names = ("gate_proj", "up_proj")

    def __init__(self, config: EmuConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.join()

    def look_up(self) -> tuple[Callable[..., Any], ...]:
        """Calls that give both halves, gate and up, of x, and the last map."""
        joint = self.joint()
        halves = self._halves_apart if joint is None else partial(_halves, weight=joint)
        return halves, cheapest(self.down_proj)

    def _halves_apart(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        if torch.is_grad_enabled():
            halves, down = self.bind()
            gate, up = halves(x)
            return down(F.silu(gate) * up)
        halves, down = self.calls or self.bind()
        gate, up = halves(x)
        # In place: fresh memory for the widest tensors of the model costs as much as the arithmetic.
        return down(F.silu(gate, inplace=True).mul_(up))


def _halves(x: torch.Tensor, weight: torch.Tensor) -> Sequence[torch.Tensor]:
    half = weight.shape[0] // 2
    return F.linear(x, weight).split_with_sizes([half, half], -1)


class EmuLayer(Bound, GradientCheckpointingLayer):
    """Attention, then MLP, each on a normed copy and added to the stream."""

    def __init__(self, config: EmuConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = EmuAttention(config, layer)
        self.mlp = EmuMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.dropout = config.attention_dropout

    def look_up(self) -> tuple[Callable[..., torch.Tensor], ...]:
        """Calls of norm, attention, norm and MLP."""
        for part in (self.self_attn, self.mlp):
            part.bind()
        parts = self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp
        return tuple(cheapest(part) for part in parts)

    def forward(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        """[B, T, D] -> [B, T - call.first, D]."""
        return self._run(x, call)

    def bare(self) -> Callable[..., torch.Tensor]:
        """What ``forward`` is without checkpointing."""
        return self._run

    def _run(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        calls = self.calls
        before, attention, between, mlp = self.bind() if calls is None or torch.is_grad_enabled() else calls
        dropout = self.dropout if self.training else 0.0
        y = attention(before(x, call.eps), call)
        x = (x[:, call.first :] if call.first else x) + (F.dropout(y, dropout) if dropout else y)
        y = mlp(between(x, call.eps))
        return x + (F.dropout(y, dropout) if dropout else y)


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
        """Action blocks [..., K, A] in [-1, 1] -> [..., D], in the dtype of the weights."""
        return self.down(F.silu(self.up(actions.flatten(-2).to(self.up.weight.dtype))))
