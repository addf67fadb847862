"""Where the things are that a task is about, read off one picture in one pass."""

from __future__ import annotations

import torch

from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.tokens.sequence import MASKED, SequenceLayout


def glance(
    backbone: EmuForCausalLM,
    layout: SequenceLayout,
    text_BL: torch.Tensor,
    codes_BN: torch.Tensor,
    bins_BP: torch.Tensor,
) -> torch.Tensor:
    """Logits [B, O, state bins] of the objects' numbers, all at once, from the instruction and one state without them.

    Args:
        backbone: the transformer; gradients flow if they are on.
        layout: order of tokens.
        text_BL: text segments, ids.
        codes_BN: frame codes.
        bins_BP: proprio bins, without those of objects; O is what the layout has room for behind them.
    """
    known = bins_BP.shape[1]
    slots = layout.proprio_slots[known:]
    unseen = bins_BP.new_full((len(bins_BP), len(slots)), MASKED)
    state = layout.state_ids(codes_BN, torch.cat([bins_BP, unseen], 1))
    ids = torch.cat([text_BL, state[:, : int(slots[-1])]], 1)
    hidden = backbone.core(backbone.embed(ids), torch.arange(ids.shape[1], device=ids.device), mask=None)
    span = layout.vocabulary.state
    found: torch.Tensor = backbone.head(hidden[:, text_BL.shape[1] + slots - 1], slice(span.start, span.stop))
    return found
