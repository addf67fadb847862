"""DiDA: a whole state in a few parallel passes (Emu3.5, section 3.3; the sampler is discrete flow matching's)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from emu_embodied.decode.grammar import StateLogits, state_logits
from emu_embodied.decode.paths import StatePath
from emu_embodied.decode.sampling import sample
from emu_embodied.models.cache import KVCache
from emu_embodied.models.masks import causal_then_parallel
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.tokens.sequence import SequenceLayout, StateTokens


@dataclass(frozen=True, slots=True)
class DecodedState:
    """S decoded states.

    Attributes:
        codes_SN: int64 [S, N].
        proprio_SP: int64 bins [S, P].
        logits: what they were read from (last pass).
        pending_SLD: embeddings of those tokens of the state that are not in the cache yet; they go in with the next
            call.
    """

    codes_SN: torch.Tensor
    proprio_SP: torch.Tensor
    logits: StateLogits
    pending_SLD: torch.Tensor


class StateDecoder(Protocol):
    """Decodes the next state behind a cache."""

    def decode(
        self,
        cache: KVCache,
        pending_SLD: torch.Tensor,
        condition_SD: torch.Tensor,
        current: StateTokens,
        generator: torch.Generator | None,
    ) -> DecodedState:
        """Predict the next state.

        Args:
            cache: everything before ``pending_SLD``; grows by it.
            pending_SLD: embeddings [S, L, D] that come first: the last state, if it is not cached, and the action's.
            condition_SD: the action block's continuous embedding, added to every token of the state.
            current: the state before, [S, N] codes and [S, P] bins.
            generator: for noise and sampling.
        """
        ...


@dataclass(frozen=True, slots=True)
class ParallelDecoder:
    """All tokens of a state at once, refined over ``passes``.

    The first pass also writes the pending clean tokens into the cache, so that finishing one state and starting the
    next cost one forward between them.
    """

    backbone: EmuForCausalLM
    layout: SequenceLayout
    path: StatePath
    passes: int = 1
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise ValueError(f"passes must be >= 1, got {self.passes}")

    def decode(
        self,
        cache: KVCache,
        pending_SLD: torch.Tensor,
        condition_SD: torch.Tensor,
        current: StateTokens,
        generator: torch.Generator | None,
    ) -> DecodedState:
        """See ``StateDecoder.decode``."""
        layout, device = self.layout, condition_SD.device
        # Common random numbers: all candidates start from one draw of noise, their costs differ by actions alone.
        tokens = self.path.source(current, generator)
        for i in range(self.passes):
            t, t_next = i / self.passes, (i + 1) / self.passes
            state = self._embed(tokens, condition_SD)
            clean = pending_SLD.shape[1] if i == 0 else 0
            embeds = torch.cat([pending_SLD, state], 1) if clean else state
            start = cache.total_length
            hidden = self.backbone.core(
                embeds,
                torch.arange(start, start + embeds.shape[1], device=device),
                mask=causal_then_parallel(clean, layout.state_tokens).to(device),
                cache=cache,
                keep=clean,
                first=clean,
            )
            logits = state_logits(self.backbone, layout, hidden)
            predicted = StateTokens(
                sample(logits.frame, self.temperature, generator), sample(logits.proprio, self.temperature, generator)
            )
            tokens = self.path.step(tokens, predicted, t, t_next, generator)
        return DecodedState(tokens.codes, tokens.proprio, logits, self._embed(tokens, condition_SD))

    def _embed(self, tokens: StateTokens, condition_SD: torch.Tensor) -> torch.Tensor:
        ids = self.layout.state_ids(tokens.codes, tokens.proprio)
        embeds: torch.Tensor = self.backbone.embed(ids) + condition_SD[:, None]
        return embeds
