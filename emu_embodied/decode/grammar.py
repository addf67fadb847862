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


def state_logits(
    backbone: EmuForCausalLM, layout: SequenceLayout, hidden_SLD: torch.Tensor, before_SP: torch.Tensor
) -> StateLogits:
    """Read a state out of the hidden vectors [S, state_tokens, D] of its segment.

    The head is applied to each position for the ids that may stand there and no others.

    Args:
        backbone: whose head is used.
        layout: where everything stands.
        hidden_SLD: of the state's segment.
        before_SP: int64 proprio bins of the state before, which a layout with ``changes`` counts from.
    """
    parts = {
        kind: backbone.head(hidden_SLD[:, positions], slice(ids.start, ids.stop))
        for kind, positions, ids in layout.readouts()
    }
    proprio = from_changes(parts["proprio"], before_SP) if layout.changes else parts["proprio"]
    return StateLogits(parts["frame"], proprio, parts["reward"][:, 0], parts["success"][:, 0])


def from_changes(logits: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Logits [..., bins] of how far a number moves -> logits of the bins it may come to, from bins [...] before.

    The middle entry says that it stays. Counting goes round the end, so that every bin can be come to from every other.
    """
    bins = logits.shape[-1]
    moved = torch.arange(bins, device=logits.device) - before[..., None]
    return logits.gather(-1, (moved + bins // 2) % bins)


def expected_bin(logits: torch.Tensor) -> torch.Tensor:
    """Mean of the bin index under softmax(logits), [..., bins] -> float32 [...]: finer than the most likely bin."""
    return torch.softmax(logits, -1) @ torch.arange(logits.shape[-1], device=logits.device).float()


def check_finite(fine_HS: torch.Tensor) -> None:
    """Name the first block, and its first candidate, of which anything is NaN or infinite.

    This is where a rollout waits for its device for the first time.

    Raises:
        ValueError: if there is one.
    """
    if not bool(fine_HS.all()):
        block, candidate = (~fine_HS).nonzero()[0].tolist()
        raise ValueError(f"the model produced NaN for candidate {candidate} at block {block}: its weights are damaged")
