"""What a predicted state is scored by: shared by next-token training and DiDA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from emu_embodied.decode.grammar import StateLogits


@dataclass(frozen=True, kw_only=True, slots=True)
class LossWeights:
    """Weights of the mean cross-entropy of each kind of token."""

    frame: float = 0.5
    """Frame codes (Emu3.5 weighs vision 0.5 against text 1, section 3.2)."""
    changed: float = 4.0
    """A code that differs from the one at its place in the state before counts this many times."""
    proprio: float = 1.0
    """Proprio bins."""
    reward: float = 1.5
    """Reward bin: one token among some seventy, and the one that plans are judged by."""
    success: float = 0.25
    """Success."""
    text: float = 1.0
    """Bytes of a subtask's sentence, up to its end."""
    follow: float = 0.25
    """Whether a subtask follows a state, or nothing is left to do."""
    action: float = 0.1
    """Action bins of the behaviours worth imitating."""
    smoothing: float = 1.0
    """Proprio and reward targets are Gaussians over neighbouring bins of this width [bins], as bins are ordered."""


@dataclass(frozen=True, slots=True)
class StateTargets:
    """What M states should be read as.

    Attributes:
        codes_MN: int64.
        proprio_MP: int64 bins.
        reward_M: int64 bins.
        success_M: int64.
        changed_MN: bool, codes that differ from the state before.
    """

    codes_MN: torch.Tensor
    proprio_MP: torch.Tensor
    reward_M: torch.Tensor
    success_M: torch.Tensor
    changed_MN: torch.Tensor

    def at(self, rows_M: torch.Tensor | slice) -> StateTargets:
        """Those of some states."""
        return StateTargets(*(getattr(self, name)[rows_M] for name in self.__slots__))


def ordinal_cross_entropy(logits: torch.Tensor, target: torch.Tensor, width: float) -> torch.Tensor:
    """Mean cross-entropy of ordered bins against Gaussian targets (HL-Gauss, Farebrother et al. 2024).

    Args:
        logits: [..., bins].
        target: int64 [...].
        width: standard deviation of the target [bins]; 0 is plain cross-entropy.
    """
    if width == 0:
        return F.cross_entropy(logits.flatten(0, -2), target.flatten())
    bins = torch.arange(logits.shape[-1], device=logits.device)
    soft = torch.softmax(-0.5 * ((bins - target[..., None]) / width) ** 2, -1)
    return -(soft * torch.log_softmax(logits, -1)).sum(-1).mean()


def state_loss(
    logits: StateLogits, targets: StateTargets, weights: LossWeights
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted loss of M predicted states, and its parts with the accuracies people look at."""
    nll_MN = F.cross_entropy(logits.frame.movedim(-1, 1), targets.codes_MN, reduction="none")
    emphasis_MN = torch.where(targets.changed_MN, weights.changed, 1.0)
    frame = (nll_MN * emphasis_MN).sum() / emphasis_MN.sum().clamp(min=1)
    proprio = ordinal_cross_entropy(logits.proprio, targets.proprio_MP, weights.smoothing)
    reward = ordinal_cross_entropy(logits.reward, targets.reward_M, weights.smoothing)
    success = F.cross_entropy(logits.success, targets.success_M)
    loss = weights.frame * frame + weights.proprio * proprio + weights.reward * reward + weights.success * success
    right_MN = (logits.frame.argmax(-1) == targets.codes_MN).float()
    changed = targets.changed_MN
    logs = {"proprio": proprio.detach(), "reward": reward.detach(), "success": success.detach()}
    if targets.codes_MN.shape[-1]:
        logs["frame"] = frame.detach()
        logs["token_accuracy"] = right_MN.mean()
        logs["changed_token_accuracy"] = (right_MN * changed).sum() / changed.sum().clamp(min=1)
    return loss, logs
