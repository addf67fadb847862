"""What may follow what: which ids each slot of a state may take, and the logits restricted to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.tokens.sequence import SequenceLayout


@dataclass(frozen=True, slots=True)
class StateLogits:
    """Logits of one state, each over its own id range only (local indices).

    Attributes:
        frame: [S, N, codebook].
        proprio: [S, P, state bins].
        reward: [S, reward bins].
        success: [S, 2].
    """

    frame: torch.Tensor
    proprio: torch.Tensor
    reward: torch.Tensor
    success: torch.Tensor

    def at(self, rows_S: torch.Tensor | slice) -> StateLogits:
        """Those of some states."""
        return StateLogits(self.frame[rows_S], self.proprio[rows_S], self.reward[rows_S], self.success[rows_S])

    def finite(self) -> torch.Tensor:
        """Bool [S]: whether everything of a candidate is finite."""
        parts = (self.frame, self.proprio, self.reward, self.success)
        return torch.stack([part.flatten(1).sum(1) for part in parts]).isfinite().all(0)


def state_logits(backbone: EmuForCausalLM, layout: SequenceLayout, hidden_SLD: torch.Tensor) -> StateLogits:
    """Read a state out of the hidden vectors [S, state_tokens, D] of its segment.

    The head is applied to each position for the ids that may stand there and no others.
    """
    parts = {
        kind: backbone.head(hidden_SLD[:, positions], slice(ids.start, ids.stop))
        for kind, positions, ids in layout.readouts()
    }
    return StateLogits(parts["frame"], parts["proprio"], parts["reward"][:, 0], parts["success"][:, 0])


def expected_bin(logits: torch.Tensor) -> torch.Tensor:
    """Mean of the bin index under softmax(logits), [..., bins] -> float32 [...]: finer than the most likely bin."""
    return torch.softmax(logits, -1) @ torch.arange(logits.shape[-1], device=logits.device).float()
