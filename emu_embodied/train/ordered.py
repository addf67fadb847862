"""Bins of one quantity start as neighbours.

New embeddings are random, so that bin 17 is as far from bin 18 as from bin 200, and every bin has to be learned from
its own few examples. Sinusoids of the bin's place, as in positional encodings (Vaswani et al. 2017, section 3.5), give
neighbours like vectors, of which moving by a few bins is nearly a rotation.
"""

from __future__ import annotations

import math

import torch

from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.tokens.vocabulary import Vocabulary


@torch.no_grad()
def order_bins(backbone: EmuForCausalLM, vocabulary: Vocabulary) -> None:
    """Overwrite the embeddings and head rows of state, action and reward bins by such vectors.

    Each has the length that random ones have on average. What differs between a quantity's tables is a rotation, drawn
    from torch's global generator as all initial weights are.
    """
    std = backbone.config.initializer_range
    for span in (vocabulary.state, vocabulary.action, vocabulary.reward):
        for table in (backbone.model.embed_tokens.weight, backbone.lm_head.weight):
            width = table.shape[1]
            rotation = torch.linalg.qr(torch.randn(width, width)).Q
            rows = sinusoids(span.size, width) @ rotation
            table[span.start : span.stop] = (rows * std * math.sqrt(2)).to(table)


def sinusoids(bins: int, width: int) -> torch.Tensor:
    """float32 [bins, width]: sines and cosines of the bin's number, at wavelengths from 4 to 4 x ``bins`` bins."""
    waves = torch.logspace(math.log10(4.0), math.log10(4.0 * bins), (width + 1) // 2)
    phase = 2 * math.pi * torch.arange(bins)[:, None] / waves
    return torch.cat([phase.sin(), phase.cos()], 1)[:, :width]
