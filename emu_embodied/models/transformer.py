"""The backbone: Emu3.5's decoder-only transformer at every size.

Shape as released (arXiv 2510.26583): pre-norm RMSNorm, grouped-query attention with per-head RMSNorm of queries and
keys before half-split RoPE, SwiGLU, no biases, an untied head. State-dict keys are those of Qwen3, so official
checkpoints load by identity.

Shape letters: B batch, T new tokens, D width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from emu_embodied.files import publish, write_json
from emu_embodied.models.cache import BorrowedCache, KVCache
from emu_embodied.models.checkpoints import compare_shapes, read_config, read_folder_shapes
from emu_embodied.models.config import EmuConfig
from emu_embodied.models.joint import JointLinear, cheapest
from emu_embodied.models.layers import ActionEmbedding, Call, EmuLayer, RMSNorm, rotations
from emu_embodied.models.masks import NoisyCopies
from emu_embodied.require import require

CPU_TOKENS = 1024
"""Tokens that go through all layers together on a CPU, for each thread: activations of many more leave the caches, and
memory for them is fetched from the system anew for every operator, which halves the speed of matrix products."""


class EmuModel(nn.Module):
    """Embedding, layers and final norm; it only holds them, ``EmuForCausalLM.core`` runs them."""

    def __init__(self, config: EmuConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(EmuLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)


class EmuForCausalLM(PreTrainedModel, GenerationMixin):
    """Emu3.5's transformer with its head, readable and writable as an official folder.

    Two entries: ``forward`` is the calling convention of transformers; ``core`` and ``head`` are what our decoders and
    trainer call, so that the head is paid only where logits are needed and new tokens may see each other freely.
    """

    config_class = EmuConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("EmuLayer",)
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.inv_freq",)

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

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, **kwargs: Any) -> EmuForCausalLM:
        """Read an official folder, or one of ours, as it is.

        Args:
            folder: holds ``config.json`` and ``model.safetensors`` or its shards.
            *args: as transformers' ``from_pretrained``.
            **kwargs: likewise (``dtype``, ``device_map``, ``quantization_config``: see ``models.loading``).
                ``action_dim`` and ``action_block`` give a model without an action embedding a new one, which at first
                changes nothing.

        Raises:
            ValueError: naming the file that is missing, damaged, or of another model, before memory is spent.
            ImportError: with the pip line, if spreading or quantising the weights needs a package that is missing.
        """
        if kwargs.get("device_map") is not None or kwargs.get("quantization_config") is not None:
            require("accelerate", extra="large")
        folder = Path(folder)
        content = read_config(folder)
        if content.get("model_type") != EmuConfig.model_type:
            raise ValueError(
                f"{folder / 'config.json'} describes a {content.get('model_type')!r} model, "
                f"not a {EmuConfig.model_type!r} (Emu3.5) backbone"
            )
        try:
            with torch.device("meta"):
                model = cls(EmuConfig(**content))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{folder / 'config.json'} describes no model that can be built: {error}") from error
        if "quantization_config" not in content:
            stored = read_folder_shapes(folder)
            rotary = [name for name in stored if name.endswith("rotary_emb.inv_freq")]
            compare_shapes(model, {name: stored[name] for name in stored.keys() - rotary}, folder)
        loaded = super().from_pretrained(folder, *args, **kwargs)
        for module in (loaded[0] if isinstance(loaded, tuple) else loaded).modules():
            if isinstance(module, JointLinear):
                module.join()
        return loaded

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write a folder that the official code can read too; every file is whole or absent.

        Args:
            save_directory: where; weights already there are replaced.
            **kwargs: as transformers' ``save_pretrained`` (``max_shard_size`` ...).
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".saving-", suffix=".tmp") as aside:
            super().save_pretrained(aside, **kwargs)
            config = read_config(Path(aside))
            # The names that the official code and its serving patches look for.
            config |= {"architectures": ["Emu3ForCausalLM"], "torch_dtype": config.get("dtype", "float32")}
            write_json(Path(aside) / "config.json", config)
            written = sorted(Path(aside).iterdir(), key=lambda path: path.name == "config.json")
            stale = {*folder.glob("model*.safetensors"), *folder.glob("model*.safetensors.index.json")}
            for path in written:
                publish(path, folder / path.name)
            for path in stale - {folder / path.name for path in written}:
                path.unlink()

    @property
    def devices(self) -> list[torch.device]:
        """Where each layer computes: where its weights are, or where they are brought to (``device_map``)."""
        return [_computes_on(layer, next(layer.parameters())) for layer in self.model.layers]

    @property
    def entry(self) -> torch.device:
        """Where token ids and positions are expected."""
        return _computes_on(self.model.embed_tokens, self.model.embed_tokens.weight)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [...] -> embeddings [..., D]."""
        embedded: torch.Tensor = cheapest(self.model.embed_tokens)(tokens)
        return embedded

    def core(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | NoisyCopies | None = None,
        cache: KVCache | BorrowedCache | None = None,
        keep: int | None = None,
        first: int = 0,
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
            first: tokens before it are seen by others but nothing is read out of them (the clean tokens that a cache
                takes in), which spares them most of the last layer. With a cache only.

        Returns:
            Hidden states after the final norm, [B, T - first, D].

        Raises:
            ValueError: if the cache is full or closed, if gradients are on while there is a cache, or if ``first`` is
                given without one.
        """
        tokens = embeds.shape[1]
        if cache is not None:
            if isinstance(mask, NoisyCopies):
                raise ValueError("noisy copies stand beside a whole clean stream: call without a cache")
            if torch.is_grad_enabled() and isinstance(cache, KVCache):
                raise ValueError("a KV cache is for inference: call under torch.no_grad(), or train without a cache")
            cache.reserve(tokens)
        elif first:
            raise ValueError("tokens that are only seen belong into a cache: first needs one")
        if cache is None or cache.length == 0:
            for layer in self.model.layers:
                cast(EmuLayer, layer).bind()
        call = self._call(embeds, positions, mask, cache, first)
        dropout = self.config.attention_dropout if self.training else 0.0
        hidden = F.dropout(embeds, dropout) if dropout else embeds
        hidden = self._layers(hidden, call, first)
        if cache is not None:
            cache.advance(tokens if keep is None else keep)
        return cheapest(self.model.norm)(hidden, call.eps.to(hidden.device))

    def _layers(self, hidden: torch.Tensor, call: Call, first: int) -> torch.Tensor:
        """All layers, [B, T, D] -> [B, T - first, D]; on a CPU over as many sequences at a time as fit its caches."""
        batch, tokens = hidden.shape[:2]
        rows = max(1, CPU_TOKENS * torch.get_num_threads() // tokens)
        if hidden.device.type == "cpu" and rows < batch and isinstance(call.cache, KVCache):
            parts = range(0, batch, rows)
            return torch.cat(
                [self._layers(hidden[i : i + rows], call.rows(i, min(i + rows, batch)), first) for i in parts]
            )
        *layers, last = self.model.layers
        for layer in layers:
            hidden = cheapest(layer)(hidden, call)
        return cheapest(last)(hidden, call.reading_from(first) if first else call)

    def _call(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | NoisyCopies | None,
        cache: KVCache | BorrowedCache | None,
        first: int,
    ) -> Call:
        """What every layer needs, made once: the mask becomes an additive bias over all keys that are read."""
        tokens = embeds.shape[1]
        eps = embeds.new_full((), self.config.rms_norm_eps, dtype=torch.float32)
        cos, sin = rotations(positions, self.config.head_dim, self.config.rope_theta, embeds.dtype)
        if isinstance(mask, NoisyCopies):
            return Call(eps, cos, sin, mask)
        past = 0 if cache is None else cache.length
        prefix_span, span = (0, tokens) if cache is None else cache.spans(tokens)
        prefix_bias = None
        if cache is not None and cache.prefix is not None and prefix_span > cache.prefix.length:
            prefix_bias = embeds.new_zeros(1, prefix_span)
            prefix_bias[:, cache.prefix.length :] = -torch.inf
        causal = mask is None and tokens > 1 and past == 0 and first == 0
        if causal:
            span = tokens  # no bias at all: a prompt's would have the square of its length
        elif mask is None and tokens > 1:
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=embeds.device).tril()
        if mask is None:
            return Call(eps, cos, sin, None, prefix_bias, causal, cache, span, prefix_span)
        bias = embeds.new_zeros(*mask.shape[:-1], span)
        bias[..., past + tokens :] = -torch.inf
        bias[..., past + tokens - mask.shape[-1] : past + tokens].masked_fill_(~mask, -torch.inf)
        bias = bias.unsqueeze(1) if mask.dim() == 3 else bias
        return Call(eps, cos, sin, bias, prefix_bias, causal, cache, span, prefix_span)

    def head(self, hidden: torch.Tensor, ids: slice | None = None) -> torch.Tensor:
        """Logits float32 [..., V] of hidden states [..., D]; only those of ``ids``, where given."""
        if ids is None:
            logits = cheapest(self._modules["lm_head"])(hidden)
            return logits if logits.dtype == torch.float32 else logits.float()
        if self.lm_head.weight.is_meta:  # kept on disk: only calling the module fetches it
            return self.lm_head(hidden)[..., ids].float()
        weight = self.lm_head.weight[ids]
        return F.linear(hidden.to(weight.device), weight).float()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Causal logits in transformers' convention.

        Args:
            input_ids: int64 [B, T], or give ``inputs_embeds``.
            attention_mask: [B, past + T], 0 for padding; None if there is none. Or ready made, [B, 1, T, past + T]:
                bool, or float added to the scores.
            position_ids: int64 [B, T] or [T]; by default counted from what ``past_key_values`` holds.
            past_key_values: a ``KVCache`` or a transformers cache, read and appended to.
            inputs_embeds: [B, T, D] instead of ids.
            labels: int64 [B, T], next-token targets (shifted here), -100 for none.
            logits_to_keep: only the last so many logits are computed; 0 for all.

        Returns:
            Output with ``logits`` float32 [B, T or logits_to_keep, V], the cache given and, with labels, ``loss``.

        Raises:
            ValueError: if not exactly one of ids and embeddings is given.
        """
        if input_ids is not None and inputs_embeds is None:
            embeds = self.embed(input_ids)
        elif inputs_embeds is not None and input_ids is None:
            embeds = inputs_embeds
        else:
            raise ValueError("give either input_ids or inputs_embeds")
        tokens = embeds.shape[1]
        borrowed = past_key_values is not None and not isinstance(past_key_values, KVCache)
        cache = BorrowedCache(past_key_values) if borrowed else past_key_values
        past = 0 if cache is None else cache.total_length
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=embeds.device)
        mask = None
        if attention_mask is not None and attention_mask.dim() == 4:
            mask = attention_mask[:, 0, :, : past + tokens]
            mask = mask if mask.dtype == torch.bool else mask == 0
        elif attention_mask is not None and not attention_mask.all():
            places = torch.arange(past + tokens, device=embeds.device)
            # A padding query sees itself, so that its softmax is defined; nobody reads it.
            own = places == places[past:, None]
            mask = (places <= places[past:, None]) & attention_mask.bool()[:, None] | own
        hidden = self.core(embeds, position_ids, mask, cache)
        logits = self.head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


def _computes_on(module: nn.Module, weight: torch.Tensor) -> torch.device:
    """The device that accelerate runs a module on, else that of its weight."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return weight.device if device is None else torch.device(device)


AutoConfig.register("Emu3", EmuConfig)
AutoModelForCausalLM.register(EmuConfig, EmuForCausalLM)
