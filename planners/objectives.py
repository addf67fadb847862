"""What a good future is: costs float32 [S] of imagined (or simulated) futures, lower is better.

Shape letters: S candidate plans, H horizon in blocks, N frame tokens of a state, P proprio dims, D code dims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
import torch.nn.functional as F

from emu_embodied.protocols import Objective
from emu_embodied.records import Field, Imagination


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictedReward:
    """Minus the weighted mean of the rewards on the way, in [-1, 0]."""

    discount: float = 1.0
    """Weight of a block relative to the block before it."""
    last_weight: float = 1.0
    """Further factor on the last block's weight: what the plan leads to, against what it passes through."""

    def __call__(self, imagination: Imagination) -> torch.Tensor:
        """Cost float32 [S]."""
        reward_SH = imagination.reward_SH
        weights_H = self.discount ** torch.arange(reward_SH.shape[1], device=reward_SH.device, dtype=torch.float32)
        weights_H[-1] *= self.last_weight
        return -(reward_SH.float() * weights_H).sum(dim=1) / weights_H.sum()


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictedSuccess:
    """Minus the best success probability on the way, in [-1, 0]; among equal ones the sooner is cheaper."""

    discount: float = 0.98
    """Worth of a success relative to the same success one block sooner."""

    def __call__(self, imagination: Imagination) -> torch.Tensor:
        """Cost float32 [S]."""
        success_SH = imagination.success_SH.float()
        weights_H = self.discount ** torch.arange(success_SH.shape[1], device=success_SH.device, dtype=torch.float32)
        return -(success_SH * weights_H).amax(dim=1)


class GoalImage:
    """Distance to the tokens of a goal image, in the space of the tokenizer's code vectors.

    Vectors are layer-normed over their D entries before they are compared, so that no token weighs more because its
    code is long. Whether two tokens are equal says nothing about how near they are; their vectors do. The distance of a
    state is the mean over tokens of the mean squared difference, in [0, 4].

    Args:
        embed: int64 codes [..., N] -> float vectors [..., N, D] (``FrameTokenizer.embed``).
        goal_N: int64 [N], tokens of the goal image, all cameras in the order of a state.
        running_weight: weight of the running cost beside the last state's distance.
        temperature: of the soft minimum over the horizon that the running cost is [distance]: near zero it is the
            closest approach, large it is the mean distance.
    """

    def __init__(
        self,
        embed: Callable[[torch.Tensor], torch.Tensor],
        goal_N: torch.Tensor,
        *,
        running_weight: float = 0.1,
        temperature: float = 0.1,
    ):
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self._embed = embed
        self._goal_ND = self._vectors(goal_N)
        self.running_weight = running_weight
        self.temperature = temperature

    def _vectors(self, codes: torch.Tensor) -> torch.Tensor:
        vectors = self._embed(codes).float()
        return F.layer_norm(vectors, vectors.shape[-1:])

    def distance(self, codes: torch.Tensor) -> torch.Tensor:
        """Distance float32 [...] of frame tokens int64 [..., N] from the goal, in [0, 4]."""
        vectors = self._vectors(codes)
        return (vectors - self._goal_ND.to(vectors.device)).square().mean(dim=(-2, -1))

    def __call__(self, imagination: Imagination) -> torch.Tensor:
        """Cost float32 [S].

        Raises:
            ValueError: if the futures have no tokens, or not as many as the goal.
        """
        if imagination.tokens_SHN is None:
            raise ValueError("a goal image needs frame tokens: give TrueDynamics a tokenize function")
        if imagination.tokens_SHN.shape[-1] != len(self._goal_ND):
            raise ValueError(f"the goal has {len(self._goal_ND)} tokens, a state {imagination.tokens_SHN.shape[-1]}")
        distance_SH = self.distance(imagination.tokens_SHN)
        return distance_SH[:, -1] + self.running_weight * _soft_minimum(distance_SH, self.temperature)


class GoalProprio:
    """Distance of some proprio entries to goal values, in units of each entry's range.

    Args:
        goal: field name -> value in the field's unit.
        fields: the environment's ``proprio_fields``.
        running_weight: weight of the mean distance on the way beside the last state's distance.

    Raises:
        ValueError: for a name the environment does not have (the nearest one is named).
    """

    def __init__(self, goal: Mapping[str, float], fields: Sequence[Field], *, running_weight: float = 0.1):
        names = [field.name for field in fields]
        for name in goal:
            if name not in names:
                near = get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"unknown proprio field {name!r}: {hint}known are {', '.join(names)}")
        self._index = [names.index(name) for name in goal]
        self._goal = torch.tensor([float(value) for value in goal.values()])
        self._range = torch.tensor([fields[i].high - fields[i].low for i in self._index])
        self.running_weight = running_weight

    def __call__(self, imagination: Imagination) -> torch.Tensor:
        """Cost float32 [S]: root mean square over the goal's entries."""
        proprio = imagination.proprio_SHP[..., self._index].float()
        scaled = (proprio - self._goal.to(proprio.device)) / self._range.to(proprio.device)
        distance_SH = scaled.square().mean(dim=-1).sqrt()
        return distance_SH[:, -1] + self.running_weight * distance_SH.mean(dim=1)


class GoalObjects:
    """Distance of the things that the task is about to where they should be, in units of each number's range.

    Args:
        goal_O: where they should be: told, or read by the model out of a goal picture (``Belief.objects_O``).
        fields: the environment's ``object_fields``.
        running_weight: weight of the mean distance on the way beside the last state's distance.

    Raises:
        ValueError: if there are no objects, or not as many as fields.
    """

    def __init__(self, goal_O: torch.Tensor, fields: Sequence[Field], *, running_weight: float = 0.1):
        if not fields or goal_O.shape != (len(fields),):
            raise ValueError(f"the goal names {goal_O.numel()} numbers of objects, the environment {len(fields)}")
        self._goal_O = goal_O.float()
        self._range_O = torch.tensor([field.high - field.low for field in fields])
        self.running_weight = running_weight

    def __call__(self, imagination: Imagination) -> torch.Tensor:
        """Cost float32 [S]: root mean square over the goal's entries.

        Raises:
            ValueError: if nothing is known of objects in these futures.
        """
        if imagination.objects_SHO is None:
            raise ValueError("the model knows of no objects: train one on a dataset that tells them")
        device = imagination.objects_SHO.device
        away = (imagination.objects_SHO.float() - self._goal_O.to(device)) / self._range_O.to(device)
        distance_SH = away.square().mean(dim=-1).sqrt()
        return distance_SH[:, -1] + self.running_weight * distance_SH.mean(dim=1)


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """Several objectives at once."""

    terms: tuple[tuple[float, Objective], ...]
    """Pairs of weight and objective."""

    def __call__(self, imagination: Imagination) -> torch.Tensor:
        """Cost float32 [S]."""
        costs = [weight * objective(imagination) for weight, objective in self.terms]
        return torch.stack(costs).sum(dim=0)


def _soft_minimum(distance_SH: torch.Tensor, temperature: float) -> torch.Tensor:
    """Soft minimum [S] over H: between the minimum (temperature to 0) and the mean (to infinity)."""
    log_mean = torch.logsumexp(-distance_SH / temperature, dim=1) - math.log(distance_SH.shape[1])
    return -temperature * log_mean
