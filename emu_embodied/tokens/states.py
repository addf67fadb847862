"""Proprio, reward and success as binned tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from emu_embodied.records import Field


@dataclass(frozen=True, slots=True)
class ProprioTokenizer:
    """Uniform bins over each field's range; the round trip is within half a bin inside the range.

    Attributes:
        fields: names, units and ranges, in the order of the proprio vector.
        bins: bins for each field.
    """

    fields: tuple[Field, ...]
    bins: int

    def __post_init__(self) -> None:
        for field in self.fields:
            if not field.high > field.low:
                raise ValueError(f"proprio field {field.name!r} has an empty range [{field.low}, {field.high}]")

    def _range(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low = torch.tensor([f.low for f in self.fields], device=like.device)
        high = torch.tensor([f.high for f in self.fields], device=like.device)
        return low, high

    def encode(self, proprio_P: torch.Tensor) -> torch.Tensor:
        """Float [..., P] in the fields' units -> int64 bins [..., P]; values outside the range are clipped."""
        low, high = self._range(proprio_P)
        return ((proprio_P - low) / (high - low) * self.bins).floor().clamp(0, self.bins - 1).long()

    def decode(self, bins_P: torch.Tensor) -> torch.Tensor:
        """Bins [..., P] (int64, or float expectations over bins) -> float32 [..., P], the bins' centres."""
        low, high = self._range(bins_P)
        return low + (bins_P.float() + 0.5) / self.bins * (high - low)

    @classmethod
    def fit(cls, fields: Sequence[Field], low: Sequence[float], high: Sequence[float], bins: int) -> ProprioTokenizer:
        """Bins over the range that the data covers, widened by 5 %: the environment's declared range wastes bins."""
        fitted = []
        for field, lo, hi in zip(fields, low, high, strict=True):
            margin = max(0.05 * (hi - lo), 1e-4)
            fitted.append(Field(field.name, field.unit, float(lo - margin), float(hi + margin)))
        return cls(tuple(fitted), bins)


@dataclass(frozen=True, slots=True)
class RewardTokenizer:
    """Uniform bins over rewards in [0, 1]."""

    bins: int

    def encode(self, reward: torch.Tensor) -> torch.Tensor:
        """Float [...] in [0, 1] -> int64 bins [...]; values outside are clipped."""
        return (reward * self.bins).floor().clamp(0, self.bins - 1).long()

    def decode(self, bins: torch.Tensor) -> torch.Tensor:
        """Bins [...] (int64, or float expectations over bins) -> float32 reward [...]."""
        return (bins.float() + 0.5) / self.bins
