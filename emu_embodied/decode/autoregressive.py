"""One token after another: Emu3.5's own decoding, and the reference that parallel decoding is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from emu_embodied.decode.dida import DecodedState
from emu_embodied.decode.grammar import StateLogits, from_changes
from emu_embodied.decode.sampling import sample
from emu_embodied.models.cache import KVCache
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.tokens.sequence import SequenceLayout, StateTokens


@dataclass(frozen=True, slots=True)
class SequentialDecoder:
    """A state token by token; every token goes into the cache as it comes."""

    backbone: EmuForCausalLM
    layout: SequenceLayout
    temperature: float = 0.0

    def decode(
        self,
        cache: KVCache,
        pending_SLD: torch.Tensor,
        condition_SD: torch.Tensor,
        current: StateTokens,
        generator: torch.Generator | None,
    ) -> DecodedState:
        """See ``StateDecoder.decode``."""
        layout = self.layout
        num_plans, device = condition_SD.shape[0], condition_SD.device
        ids = layout.state_ids(
            torch.zeros(num_plans, len(layout.frame_slots), dtype=torch.long, device=device),
            torch.zeros(num_plans, layout.num_proprio, dtype=torch.long, device=device),
        )
        allowed = {int(p): (kind, span) for kind, positions, span in layout.readouts() for p in positions}
        logits: dict[str, list[torch.Tensor]] = {kind: [] for kind, _, _ in layout.readouts()}
        tokens = pending_SLD
        for slot in range(layout.state_tokens):
            tokens = torch.cat([tokens, self.backbone.embed(ids[:, slot : slot + 1]) + condition_SD[:, None]], 1)
            start = cache.total_length
            positions = torch.arange(start, start + tokens.shape[1], device=device)
            hidden = self.backbone.core(tokens, positions, mask=None, cache=cache)
            tokens = tokens[:, :0]
            if slot not in allowed:
                continue
            kind, span = allowed[slot]
            here = self.backbone.head(hidden[:, -1], slice(span.start, span.stop))
            if kind == "proprio" and layout.changes:
                here = from_changes(here, current.proprio[:, len(logits[kind])])
            logits[kind].append(here)
            if kind in ("frame", "proprio"):
                ids[:, slot + 1] = span.ids(sample(here, self.temperature, generator))
        codes, proprio = layout.parse_state(ids)
        frame = logits["frame"] or [condition_SD.new_empty(num_plans, layout.vocabulary.vision.size)]
        stacked = StateLogits(
            torch.stack(frame, 1)[:, : len(layout.frame_slots)],
            torch.stack(logits["proprio"], 1),
            logits["reward"][0],
            logits["success"][0],
        )
        return DecodedState(codes, proprio, stacked, tokens)
