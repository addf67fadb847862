"""DiDA: a whole state in a few parallel passes (Emu3.5, section 3.3; the sampler is discrete flow matching's)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from emu_embodied.decode.grammar import StateLogits, state_logits
from emu_embodied.decode.paths import Path
from emu_embodied.decode.sampling import sample
from emu_embodied.models.cache import KVCache
from emu_embodied.models.masks import causal_then_parallel
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.tokens.sequence import SequenceLayout


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
        self, cache: KVCache, pending_SLD: torch.Tensor, condition_SD: torch.Tensor, generator: torch.Generator | None
    ) -> DecodedState:
        """Predict the next state.

        Args:
            cache: everything before ``pending_SLD``; grows by it.
            pending_SLD: embeddings [S, L, D] that come first: the last state, if it is not cached, and the action's.
            condition_SD: the action block's continuous embedding, added to every token of the state.
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
    path: Path
    passes: int = 1
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise ValueError(f"passes must be >= 1, got {self.passes}")

    def decode(
        self, cache: KVCache, pending_SLD: torch.Tensor, condition_SD: torch.Tensor, generator: torch.Generator | None
    ) -> DecodedState:
        """See ``StateDecoder.decode``."""
        layout, path, v = self.layout, self.path, self.layout.vocabulary
        num_plans, device = condition_SD.shape[0], condition_SD.device
        # Common random numbers: all candidates start from one draw of noise, their costs differ by actions alone.
        codes = path.source((1, len(layout.frame_slots)), v.vision.size, generator).to(device).expand(num_plans, -1)
        proprio = path.source((1, layout.num_proprio), v.state.size, generator).to(device).expand(num_plans, -1)
        for i in range(self.passes):
            t, t_next = i / self.passes, (i + 1) / self.passes
            state = self._embed(codes, proprio, condition_SD)
            clean = pending_SLD.shape[1] if i == 0 else 0
            tokens = torch.cat([pending_SLD, state], 1) if clean else state
            start = cache.total_length
            hidden = self.backbone.core(
                tokens,
                torch.arange(start, start + tokens.shape[1], device=device),
                mask=causal_then_parallel(clean, layout.state_tokens).to(device),
                cache=cache,
                keep=clean,
            )
            logits = state_logits(self.backbone, layout, hidden[:, clean:])
            codes = path.step(
                codes, sample(logits.frame, self.temperature, generator), v.vision.size, t, t_next, generator
            )
            proprio = path.step(
                proprio, sample(logits.proprio, self.temperature, generator), v.state.size, t, t_next, generator
            )
        return DecodedState(codes, proprio, logits, self._embed(codes, proprio, condition_SD))

    def _embed(self, codes: torch.Tensor, proprio: torch.Tensor, condition_SD: torch.Tensor) -> torch.Tensor:
        ids = self.layout.state_ids(codes, proprio)
        embeds: torch.Tensor = self.backbone.embed(ids) + condition_SD[:, None]
        return embeds
