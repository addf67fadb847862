"""Group relative policy optimisation: the loss, and nothing of where rollouts come from (Shao et al. 2024).

Shape letters: Q groups, G rollouts in a group, R rows (one decision, or one imagined state), T tokens of a row.

Emu3.5 (section 3.2) says GRPO with groups of 8 and leaves clip, KL and the kind of advantage open. Taken here: clipping
that leaves more room upwards (DAPO, Yu et al. 2025; SimpleVLA-RL), the k3 estimator of the KL to a frozen reference,
and one switch, ``variant``, for how advantages and tokens are weighed. The names are those of trl, which
``tests/train/test_grpo.py`` compares with.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Variant = Literal["grpo", "dapo", "dr_grpo"]
"""``grpo``: advantage over the group's standard deviation, every rollout counts alike. ``dapo``: the same advantage,
every token counts alike. ``dr_grpo`` (Liu et al. 2025): no standard deviation, which favours groups that are nearly
decided, and a constant divisor, so that no rollout counts more for being short."""

_EPSILON = 1e-4
"""Added to the standard deviation, as in trl."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPOConfig:
    """The objective."""

    group: int = 8
    """G, rollouts from one restored state (Emu3.5: 8) [rollouts]."""
    variant: Variant = "dapo"
    """How advantages and tokens are weighed, see ``Variant``."""
    clip_low: float = 0.2
    """A ratio of new to old probability below 1 - this gets no gradient where the token was bad."""
    clip_high: float = 0.28
    """A ratio above 1 + this gets none where it was good; more room than below keeps rare good tokens alive."""
    discount: float | None = None
    """Credit: None gives every token of a rollout the advantage of its end; a number in [0, 1] gives each block what
    came of it and after it, later gains discounted (see ``block_advantages``)."""
    kl_weight: float = 0.01
    """Weight of the KL to the reference [1/nat]; 0 does without one, and without its memory."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: naming the field and its range.
        """
        if self.group < 2:
            raise ValueError(f"groups of {self.group}: an advantage is relative to a group, so give --group 2 or more")
        known = get_args(Variant)
        if self.variant not in known:
            near = difflib.get_close_matches(self.variant, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown variant {self.variant!r}: did you mean {near!r}? Known: {', '.join(known)}")
        if not 0 < self.clip_low < 1 or not self.clip_high > 0:
            raise ValueError(f"clip bounds {self.clip_low}, {self.clip_high}: give 0 < low < 1 and high > 0")
        if self.discount is not None and not 0 <= self.discount <= 1:
            raise ValueError(f"discount is {self.discount}, it has to lie in [0, 1] (or be left out)")
        if not self.kl_weight >= 0:
            raise ValueError(f"kl_weight is {self.kl_weight}, it has to be at least 0")


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """What tells a healthy update from one that is running away; means over the tokens that count.

    Attributes:
        kl: k3 estimate of KL(policy, reference) [nat]; 0 without a reference.
        entropy: of the distributions the tokens were drawn from [nat].
        ratio: new over old probability.
        ratio_max: the largest of them.
        clipped_low: share of tokens held by the lower bound.
        clipped_high: share held by the upper one.
    """

    kl: float
    entropy: float
    ratio: float
    ratio_max: float
    clipped_low: float
    clipped_high: float


def group_advantages(rewards_QG: torch.Tensor, variant: Variant) -> torch.Tensor:
    """Advantage [Q, G] of every rollout over its own group."""
    centred = rewards_QG - rewards_QG.mean(1, keepdim=True)
    return centred if variant == "dr_grpo" else centred / (rewards_QG.std(1, keepdim=True) + _EPSILON)


def block_advantages(gains: Sequence[torch.Tensor], group: int, variant: Variant, discount: float) -> torch.Tensor:
    """Advantage of every block: what came of it and after it, over the rest of its group at the same block.

    Process supervision (Shao et al. 2024, section 4.1.3), with a discount. A block is not praised for what was gained
    before it, nor much for what others did long after it, so that far fewer rollouts tell a good one from a bad one.

    Args:
        gains: of every rollout, group by group: float [T], what each of its blocks added to its reward.
        group: G.
        variant: see ``Variant``.
        discount: of later gains, in [0, 1].

    Returns:
        float [sum of all T], rollout by rollout.
    """
    longest = max(len(gain) for gain in gains)
    to_go_RT = torch.full((len(gains), longest), torch.nan, dtype=torch.float64)
    for row, gain in enumerate(gains):
        rest = 0.0
        for t in reversed(range(len(gain))):
            rest = float(gain[t]) + discount * rest
            to_go_RT[row, t] = rest
    to_go_QGT = to_go_RT.unflatten(0, (-1, group))
    centred = to_go_QGT - to_go_QGT.nanmean(1, keepdim=True)
    if variant != "dr_grpo":
        spread_Q = centred.square().flatten(1).nanmean(1).sqrt()
        centred = centred / (spread_Q[:, None, None] + _EPSILON)
    flat = centred.flatten(0, 1)
    return torch.cat([flat[row, : len(gain)] for row, gain in enumerate(gains)])


def has_signal(rewards_QG: torch.Tensor, least: float) -> torch.Tensor:
    """Bool [Q]: whether the rewards of a group differ by more than ``least``, so that something can be learned."""
    return rewards_QG.amax(1) - rewards_QG.amin(1) > least


def token_weights(
    mask_RT: torch.Tensor, rollout_R: torch.Tensor, variant: Variant, longest: int | None = None
) -> torch.Tensor:
    """What every token counts in the loss of a whole batch, float32 [R, T]; 0 where masked.

    Args:
        mask_RT: bool, tokens that count.
        rollout_R: int64, number of the rollout that a row belongs to, from 0 on.
        variant: see ``Variant``.
        longest: tokens of the longest rollout there could be, for ``dr_grpo``; the longest here if left out.
    """
    mask = mask_RT.float()
    num_rollouts = int(rollout_R.max()) + 1
    length = torch.zeros(num_rollouts, device=mask.device).index_add_(0, rollout_R, mask.sum(1)).clamp(min=1)
    if variant == "grpo":
        return mask / length[rollout_R, None] / num_rollouts
    if variant == "dapo":
        return mask / mask.sum().clamp(min=1)
    return mask / (num_rollouts * (float(length.max()) if longest is None else longest))


def grpo_loss(
    new_RT: torch.Tensor,
    old_RT: torch.Tensor,
    reference_RT: torch.Tensor | None,
    advantage_R: torch.Tensor,
    weight_RT: torch.Tensor,
    config: GRPOConfig,
    entropy_RT: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Diagnostics]:
    """The loss of some rows; the sum over the rows of a batch is the loss of the batch.

    Args:
        new_RT: log-probabilities of the sampled tokens under the policy, with gradient.
        old_RT: the same under the policy that sampled them.
        reference_RT: the same under the frozen reference; None for no KL.
        advantage_R: of each row's rollout.
        weight_RT: see ``token_weights``.
        config: clip bounds and weight of the KL.
        entropy_RT: of the distributions, for the diagnostics.
    """
    ratio = torch.exp(new_RT - old_RT)
    advantage_R1 = advantage_R[:, None]
    bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    token_loss = -torch.minimum(ratio * advantage_R1, bounded * advantage_R1)
    kl = torch.zeros_like(ratio)
    if reference_RT is not None:
        away = reference_RT - new_RT
        kl = torch.exp(away) - away - 1
        token_loss = token_loss + config.kl_weight * kl
    # Not a product: a masked token's ratio may be anything, and infinity times 0 is NaN.
    loss = torch.where(weight_RT > 0, token_loss * weight_RT, 0.0).sum()
    with torch.no_grad():
        counted = weight_RT > 0
        low = (ratio < 1 - config.clip_low) & (advantage_R1 < 0)
        high = (ratio > 1 + config.clip_high) & (advantage_R1 > 0)
        entropy = torch.zeros_like(ratio) if entropy_RT is None else entropy_RT
        kl_mean, entropy_mean, ratio_mean, low_share, high_share = (
            float(value[counted].float().mean()) for value in (kl, entropy, ratio, low, high)
        )
        largest = float(ratio[counted].max())
    return loss, Diagnostics(kl_mean, entropy_mean, ratio_mean, largest, low_share, high_share)


def imitation_loss(new_RT: torch.Tensor, weight_RT: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of tokens known to be good: what expert iteration takes instead of ``grpo_loss``."""
    return -torch.where(weight_RT > 0, new_RT * weight_RT, 0.0).sum()
