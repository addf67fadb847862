"""The reward model: what a state is worth, from the numbers that say where everything is, and an instruction.

A transformer that reads reward out of its last hidden vector has to find, in one linear map, what a task asks for; on
the way it learned how rewards differ between scenes and hardly how they differ between plans of one scene (LOG.md,
2026-11-23). What the numbers of a state are worth is a smooth function of a dozen of them, and learned in a minute.

Shape letters: P proprio numbers, O object numbers, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from emu_embodied.models.told import ToldNetwork, range_buffers
from emu_embodied.records import Field


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModelConfig:
    """What a reward model reads, and of which tasks."""

    env_ids: tuple[str, ...]
    """Environments whose rewards it learned."""
    proprio: tuple[Field, ...]
    """The robot's numbers, each with the range that its training data cover."""
    objects: tuple[Field, ...]
    """Those of the things that the task is about."""
    text_length: int = 96
    """Bytes of an instruction that are read; what is longer is cut off."""
    width: int = 256
    """Channels of the inner layers."""
    words: int = 32
    """Channels D that an instruction is read into."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: naming the field.
        """
        if not self.proprio or not self.objects:
            raise ValueError("a reward model reads the robot's numbers and those of at least one thing")
        for name in ("text_length", "width", "words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it has to be at least 1")


class RewardModel(ToldNetwork):
    """Numbers of a state and an instruction -> reward in [0, 1] and the chance that the task is solved.

    Three layers, each scaled and shifted by the instruction (FiLM, Perez et al. 2018).
    """

    kind = "reward"

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__(config, config.text_length, config.words)
        self.config = config
        fields = (*config.proprio, *config.objects)
        sizes = (len(fields), config.width, config.width, config.width)
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(sizes)])
        self.modulation = nn.ModuleList([nn.Linear(config.words, 2 * config.width) for _ in self.layers])
        self.head = nn.Linear(config.width, 2)
        middle, half_range = range_buffers(fields)
        self.register_buffer("middle", middle, persistent=False)
        self.register_buffer("half_range", half_range, persistent=False)

    middle: torch.Tensor
    half_range: torch.Tensor

    def forward(self, numbers: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        """Proprio and objects [..., P + O] in their units, and ``told`` -> logits [..., 2]: reward, success."""
        seen = (numbers - self.middle) / self.half_range
        for layer, modulation in zip(self.layers, self.modulation, strict=True):
            scale, shift = modulation(told).chunk(2, -1)
            seen = F.silu(layer(seen) * (1 + scale) + shift)
        logits: torch.Tensor = self.head(seen)
        return logits

    @torch.no_grad()
    def judge(self, numbers: torch.Tensor, instruction: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Reward and chance of success float32 [...] of states [..., P + O] of which one thing is asked."""
        logits = self(numbers.to(self.device), self.told(self.text([instruction]))[0]).float()
        return torch.sigmoid(logits[..., 0]), torch.sigmoid(logits[..., 1])

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu") -> RewardModel:
        """Read what ``save_pretrained`` wrote.

        Raises:
            ValueError: naming the file that is missing, damaged, or of another model.
        """

        def build(content: dict[str, Any]) -> RewardModel:
            fields = {name: tuple(Field(**field) for field in content[name]) for name in ("proprio", "objects")}
            return cls(RewardModelConfig(**content | fields | {"env_ids": tuple(content["env_ids"])}))

        return cls._read(folder, device, build)
