"""An action block token by token: what the policy role emits after a state.

Token by token, not all at once: given a frame the dimensions of an action depend on each other (left or right of the
cube decides x and y together), a parallel read-out would draw each by itself, and after a prefix of some 130 tokens the
few more passes cost little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from emu_embodied.models.cache import KVCache
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.tokens.sequence import SequenceLayout

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for a batch, or one for each row, whose draws then do not depend on what else is in the batch."""


@dataclass(frozen=True, slots=True)
class ActionDecoder:
    """Reads action bins out of a backbone, behind any past that ends with a state."""

    backbone: EmuForCausalLM
    layout: SequenceLayout

    def logits(self, past_BLD: torch.Tensor, bins_BA: torch.Tensor) -> torch.Tensor:
        """Logits of every bin given the bins before it, with gradient.

        Args:
            past_BLD: embeddings of what was seen, its last token the end of a state.
            bins_BA: int64, the block at hand.

        Returns:
            float32 [B, A, bins].
        """
        dims = bins_BA.shape[-1]
        embeds = torch.cat([past_BLD, self.backbone.embed(self.layout.action_ids(bins_BA)[:, :-1])], 1)
        positions = torch.arange(embeds.shape[1], device=embeds.device)
        return self._head(self.backbone.core(embeds, positions)[:, -dims:])

    @torch.no_grad()
    def sample(
        self, past_BLD: torch.Tensor, temperature: float, generators: Generators | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a block.

        Args:
            past_BLD: as ``logits`` takes it.
            temperature: of the draw; 0 takes the most likely bin.
            generators: where it comes from; not needed at temperature 0.

        Returns:
            bins int64 [B, A] and their log-probabilities float32 [B, A] at that temperature (at 0, those at 1).

        Raises:
            ValueError: if the temperature is negative or there is no generator where one is needed.
        """
        batch, tokens = past_BLD.shape[:2]
        dims, device = self.layout.action_dim, past_BLD.device
        race_BAV = self._race(batch, temperature, generators)
        cache = KVCache(self.backbone.config, batch, tokens + dims, device=self.backbone.devices, dtype=past_BLD.dtype)
        ids = torch.full((batch, 1), self.layout.vocabulary.special["boa"], device=device)
        new_BLD, first = torch.cat([past_BLD, self.backbone.embed(ids)], 1), tokens
        bins, log_probs = [], []
        for a in range(dims):
            positions = torch.arange(cache.length, cache.length + new_BLD.shape[1], device=device)
            hidden = self.backbone.core(new_BLD, positions, cache=cache, first=first)
            found_BV = torch.log_softmax(self._head(hidden[:, -1]) / (temperature or 1.0), -1)
            chosen = found_BV if race_BAV is None else found_BV.exp() / race_BAV[:, a].to(found_BV.device)
            bins.append(chosen.argmax(-1))
            log_probs.append(found_BV.gather(-1, bins[-1][:, None])[:, 0])
            new_BLD, first = self.backbone.embed(self.layout.vocabulary.action.ids(bins[-1][:, None])), 0
        return torch.stack(bins, 1), torch.stack(log_probs, 1)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        ids = self.layout.vocabulary.action
        return self.backbone.head(hidden, slice(ids.start, ids.stop))

    def _race(self, batch: int, temperature: float, generators: Generators | None) -> torch.Tensor | None:
        """Exponential variables [B, A, bins]: the largest p / Exp(1) is a draw from p. None where nothing is drawn."""
        if temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}")
        if temperature == 0:
            return None
        if generators is None:
            raise ValueError("sampling at temperature > 0 needs a seeded generator")
        shape = (self.layout.action_dim, self.layout.vocabulary.action.size)
        if isinstance(generators, torch.Generator):
            race = torch.empty(batch, *shape, device=generators.device)
            return race.exponential_(generator=generators)
        if len(generators) != batch:
            raise ValueError(f"{len(generators)} generators for {batch} rows: give one for each, or one for all")
        rows = [torch.empty(shape, device=g.device).exponential_(generator=g) for g in generators]
        return torch.stack(rows)
