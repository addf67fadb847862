"""The backbone: Emu3.5's decoder-only transformer at every size.

Shape as released (arXiv 2510.26583): pre-norm RMSNorm, grouped-query attention with per-head RMSNorm of queries and
keys before half-split RoPE, SwiGLU, no biases, an untied head. State-dict keys are those of Qwen3, so official
checkpoints load by identity.

Shape letters: B batch, T new tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from emu_embodied.models.attention import attend, attend_with_copies
from emu_embodied.models.cache import KVCache
from emu_embodied.models.masks import NoisyCopies


class EmuConfig(PretrainedConfig):
    """Shape of the backbone; the fields and names of an official ``config.json``.

    Args:
        vocab_size: token ids [tokens].
        hidden_size: width D of the residual stream.
        intermediate_size: width of the SwiGLU.
        num_hidden_layers: layers.
        num_attention_heads: query heads.
        num_key_value_heads: key-value heads, a divisor of the query heads.
        head_dim: width of one head, even.
        rms_norm_eps: added to the mean square.
        rope_theta: base of the rotary frequencies.
        rope_scaling: always None, as released.
        max_position_embeddings: longest sequence meant to be read [tokens].
        attention_dropout: in training, on attention weights, both branches of a layer and the embeddings (as released).
        initializer_range: standard deviation of new weights.
        action_dim: A, dims of one action; 0 for a model that knows no continuous actions (the official one).
        action_block: K, actions of a block; 0 as above.
        **kwargs: token ids and whatever else an official file holds; kept and written back.

    Raises:
        ValueError: for a shape that cannot be built.
    """

    model_type = "Emu3"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 282_926,
        hidden_size: int = 5120,
        intermediate_size: int = 25_600,
        num_hidden_layers: int = 64,
        num_attention_heads: int = 64,
        num_key_value_heads: int = 8,
        head_dim: int = 128,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1_000_000.0,
        rope_scaling: None = None,
        max_position_embeddings: int = 32_768,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        bos_token_id: int | None = 151_849,
        eos_token_id: int | None = 151_850,
        pad_token_id: int | None = 151_643,
        tie_word_embeddings: bool = False,
        action_dim: int = 0,
        action_block: int = 0,
        **kwargs: Any,
    ) -> None:
        if rope_scaling is not None:
            raise ValueError(f"rope_scaling {rope_scaling} is not supported: Emu3.5 has none")
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.action_dim = action_dim
        self.action_block = action_block
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"{num_attention_heads} query heads cannot share {num_key_value_heads} key-value heads evenly"
            )
        if head_dim % 2:
            raise ValueError(f"head_dim {head_dim} must be even: RoPE rotates pairs")
        if tie_word_embeddings:
            raise ValueError("Emu3.5's head is not tied to its embedding: set tie_word_embeddings to False")
        if (action_dim > 0) != (action_block > 0):
            raise ValueError(
                f"action_dim {action_dim} and action_block {action_block} must both be positive or both be 0"
            )


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., width]."""
        # A norm is one pass over x where a mean of squares is two, and this runs on every token of every candidate.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x * torch.rsqrt(norm * norm / x.shape[-1] + self.eps)).to(x.dtype) * self.weight


@dataclass(frozen=True, slots=True)
class Call:
    """What all layers share in one call of ``core``.

    Attributes:
        cos: cosines [1 or B, T, 1, head dim] of the rotary angles, the same in both halves of a head.
        sin: sines, negative in the first half.
        bias: added to the scores of own keys; or the copies that say which to compute; or None.
        prefix_bias: added to the scores of the prefix's keys, or None.
        causal: plain causal attention among new tokens, no bias needed.
        cache: where new keys and values go, or None.
        span: own keys read from the cache.
        prefix_span: keys read from its prefix.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    bias: torch.Tensor | NoisyCopies | None = None
    prefix_bias: torch.Tensor | None = None
    causal: bool = False
    cache: KVCache | None = None
    span: int = 0
    prefix_span: int = 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Call:
        """The same for a layer that lives on another device (models spread over several)."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name in ("cos", "sin", "bias", "prefix_bias")
            if isinstance(value := getattr(self, name), torch.Tensor)
        }
        return replace(self, **moved)


def _rotations(
    positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``Call.cos`` and ``Call.sin`` of positions [T] or [B, T]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.view(-1, positions.shape[-1], 1, 1).float() * (1.0 / theta**exponents)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _rotate(x: torch.Tensor, call: Call) -> torch.Tensor:
    """RoPE: the first half of a head [..., head dim] are real parts, the second half imaginary parts."""
    half = x.shape[-1] // 2
    swapped = torch.cat([x[..., half:], x[..., :half]], -1)
    return torch.addcmul(x * call.cos, swapped, call.sin)


class EmuAttention(nn.Module):
    """Grouped-query attention with per-head norm of queries and keys, then RoPE."""

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
        self.q_norm = RMSNorm(head, config.rms_norm_eps)
        self.k_norm = RMSNorm(head, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        shape = (*x.shape[:2], -1, self.head_dim)
        query = _rotate(self.q_norm(self.q_proj(x).view(shape)), call)
        key = _rotate(self.k_norm(self.k_proj(x).view(shape)), call).transpose(1, 2)
        value = self.v_proj(x).view(shape).transpose(1, 2)
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
        return self.o_proj(mixed.reshape(*x.shape[:2], -1))


class EmuMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: EmuConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class EmuLayer(nn.Module):
    """Attention, then MLP, each on a normed copy and added to the stream."""

    def __init__(self, config: EmuConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = EmuAttention(config, layer)
        self.mlp = EmuMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = config.attention_dropout

    def forward(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), call), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class EmuModel(nn.Module):
    """Embedding, layers and final norm; it only holds them, ``EmuForCausalLM.core`` runs them."""

    def __init__(self, config: EmuConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(EmuLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


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


class EmuForCausalLM(PreTrainedModel):
    """Emu3.5's transformer with its head, readable and writable as an official folder.

    Two entries: ``forward`` is the calling convention of transformers; ``core`` and ``head`` are what our decoders and
    trainer call, so that the head is paid only where logits are needed and new tokens may see each other freely.
    """

    config_class = EmuConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _no_split_modules = ("EmuLayer",)

    def __init__(self, config: EmuConfig) -> None:
        super().__init__(config)
        self.model = EmuModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.action_embedding = ActionEmbedding(config) if config.action_block else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if self.action_embedding is not None and module is self.action_embedding.down:
            nn.init.zeros_(module.weight)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [...] -> embeddings [..., D]."""
        return self.model.embed_tokens(tokens)

    def core(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | NoisyCopies | None = None,
        cache: KVCache | None = None,
        keep: int | None = None,
    ) -> torch.Tensor:
        """Run the layers over T new tokens.

        Args:
            embeds: [B, T, D].
            positions: int64 [T] or [B, T], the place of each token in its sequence (noisy copies repeat places).
            mask: bool [T, T] or [B, T, T] over the new tokens, True where a query (row) may attend; what the cache
                holds is visible to all. A last dimension of ``cache.length + T`` speaks of the cached tokens too.
                ``NoisyCopies`` is DiDA's training mask, faster than the same mask written out (without a cache only).
                None is causal.
            cache: read, and written behind its end; inference only.
            keep: how many leading new tokens stay in the cache; the others are used in this call and forgotten. None
                keeps all.

        Returns:
            Hidden states after the final norm, [B, T, D].

        Raises:
            ValueError: if the cache is full or closed, or if gradients are on while there is a cache.
        """
        tokens = embeds.shape[1]
        if cache is not None:
            if isinstance(mask, NoisyCopies):
                raise ValueError("noisy copies stand beside a whole clean stream: call without a cache")
            if torch.is_grad_enabled():
                raise ValueError("a KV cache is for inference: call under torch.no_grad(), or train without a cache")
            cache.reserve(tokens)
        call = self._call(embeds, positions, mask, cache)
        hidden = F.dropout(embeds, self.config.attention_dropout, self.training)
        for layer in self.model.layers:
            hidden = layer(hidden, call)
        if cache is not None:
            cache.advance(tokens if keep is None else keep)
        return self.model.norm(hidden)

    def _call(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | NoisyCopies | None,
        cache: KVCache | None,
    ) -> Call:
        """What every layer needs, made once: the mask becomes an additive bias over all keys that are read."""
        tokens = embeds.shape[1]
        cos, sin = _rotations(positions, self.config.head_dim, self.config.rope_theta, embeds.dtype)
        if isinstance(mask, NoisyCopies):
            return Call(cos, sin, mask)
        past = 0 if cache is None else cache.length
        prefix_span, span = (0, tokens) if cache is None else cache.spans(tokens)
        prefix_bias = None
        if cache is not None and cache.prefix is not None and prefix_span > cache.prefix.length:
            prefix_bias = embeds.new_zeros(1, prefix_span)
            prefix_bias[:, cache.prefix.length :] = -torch.inf
        causal = mask is None and tokens > 1 and span == tokens
        if mask is None and tokens > 1 and not causal:
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=embeds.device).tril()
        if mask is None:
            return Call(cos, sin, None, prefix_bias, causal, cache, span, prefix_span)
        bias = embeds.new_zeros(*mask.shape[:-1], span)
        bias[..., past + tokens :] = -torch.inf
        bias[..., past + tokens - mask.shape[-1] : past + tokens].masked_fill_(~mask, -torch.inf)
        bias = bias.unsqueeze(1) if mask.dim() == 3 else bias
        return Call(cos, sin, bias, prefix_bias, causal, cache, span, prefix_span)

    def head(self, hidden: torch.Tensor, ids: slice | None = None) -> torch.Tensor:
        """Logits float32 [..., V] of hidden states [..., D]; only those of ``ids``, where given."""
        if ids is None:
            return self.lm_head(hidden).float()
        return F.linear(hidden, self.lm_head.weight[ids]).float()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Causal logits in transformers' convention.

        Args:
            input_ids: int64 [B, T], or give ``inputs_embeds``.
            attention_mask: [B, past + T], 0 for padding; None if there is none.
            position_ids: int64 [B, T] or [T]; by default counted from what ``past_key_values`` holds.
            past_key_values: a ``KVCache`` to read and append to.
            inputs_embeds: [B, T, D] instead of ids.

        Returns:
            Output with ``logits`` float32 [B, T, V] and the cache given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embeds = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = embeds.shape[1]
        past = 0 if past_key_values is None else past_key_values.total_length
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=embeds.device)
        mask = None
        if attention_mask is not None and not attention_mask.all():
            places = torch.arange(past + tokens, device=embeds.device)
            # A padding query sees itself, so that its softmax is defined; nobody reads it.
            own = places == places[past:, None]
            mask = (places <= places[past:, None]) & attention_mask.bool()[:, None] | own
        hidden = self.core(embeds, position_ids, mask, past_key_values)
        return CausalLMOutputWithPast(logits=self.head(hidden), past_key_values=past_key_values)


AutoConfig.register("Emu3", EmuConfig)
AutoModelForCausalLM.register(EmuConfig, EmuForCausalLM)
