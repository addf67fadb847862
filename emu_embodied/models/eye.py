"""The eye: where the things are that an instruction is about, read off one state's pictures by a small convolution.

A transformer over codes learns this slowly: a code says what a patch looks like, in 512 words, and where a thing is
stands in which patches say so. Convolutions over pixels find a block and its angle in minutes of one CPU core
(LOG.md, 2026-11-23).

Shape letters: B batch, C cameras, H/W pixels, O numbers, L bytes, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from emu_embodied.models.ibq import to_pixels
from emu_embodied.models.told import ToldNetwork, range_buffers
from emu_embodied.records import Field, Observation


@dataclass(frozen=True, kw_only=True, slots=True)
class EyeConfig:
    """What an eye reads and says."""

    cameras: tuple[str, ...]
    """Cameras whose frames it reads together."""
    image_size: int
    """Side of a frame [pixels]."""
    objects: tuple[Field, ...]
    """The numbers it says, each with the range that its training data cover."""
    text_length: int = 96
    """Bytes of an instruction that are read; what is longer is cut off."""
    width: int = 64
    """Channels D of the inner layers, a multiple of 8."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: naming the field.
        """
        if not self.cameras or not self.objects:
            raise ValueError("an eye reads at least one camera and says at least one number")
        if self.image_size < 1 or self.text_length < 1 or self.width < 8 or self.width % 8:
            raise ValueError(
                f"image_size {self.image_size} and text_length {self.text_length} have to be at least 1, width "
                f"{self.width} a multiple of 8"
            )


class Eye(ToldNetwork):
    """Pictures of one state and an instruction -> numbers.

    Three halvings of the picture, after which every place has its own weights (where a thing is matters, not only that
    it is there); the instruction scales and shifts the channels of each layer (FiLM, Perez et al. 2018), which is how
    it says what to look for.
    """

    kind = "eye"

    def __init__(self, config: EyeConfig) -> None:
        super().__init__(config, config.text_length, config.width)
        self.config = config
        width, half = config.width, config.width // 2
        self.stem = nn.Conv2d(3 * len(config.cameras), half, 5, stride=2, padding=2)
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(half, half, 3, stride=2, padding=1),
                nn.Conv2d(half, width, 3, padding=1),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
                nn.Conv2d(width, width, 3, padding=1),
            ]
        )
        channels = (half, width, width, width)
        self.norms = nn.ModuleList([nn.GroupNorm(max(1, c // 8), c) for c in channels])
        self.narrow = nn.Conv2d(width, half, 1)
        self.modulation = nn.ModuleList([nn.Linear(width, 2 * c) for c in channels])
        cells = (-(-config.image_size // 8)) ** 2
        self.head = nn.Sequential(
            nn.Linear(half * cells + width, 256),
            nn.SiLU(),
            nn.Linear(256, 256),
            nn.SiLU(),
            nn.Linear(256, len(config.objects)),
        )
        middle, half_range = range_buffers(config.objects)
        self.register_buffer("middle", middle, persistent=False)
        self.register_buffer("half_range", half_range, persistent=False)

    middle: torch.Tensor
    half_range: torch.Tensor

    def forward(self, pixels: torch.Tensor, text_BL: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3 C, H, W] in [-1, 1] and bytes int64 [B, L] -> [B, O], each number's range mapped to [-1, 1]."""
        told_BD = self.told(text_BL)
        seen = F.silu(self.stem(pixels))
        for layer, norm, modulation in zip(self.layers, self.norms, self.modulation, strict=True):
            scale, shift = modulation(told_BD)[:, :, None, None].chunk(2, 1)
            seen = F.silu(norm(layer(seen)) * (1 + scale) + shift)
        numbers: torch.Tensor = self.head(torch.cat([F.silu(self.narrow(seen)).flatten(1), told_BD], 1))
        return numbers

    @torch.no_grad()
    def see(self, observations: Sequence[Observation]) -> torch.Tensor:
        """Where the things are: float32 [B, O], in the fields' units.

        Raises:
            ValueError: if a camera is missing, or its frames have another size.
        """
        config = self.config
        frames = [_frames(observation, config) for observation in observations]
        pixels = to_pixels(torch.from_numpy(np.stack(frames)).flatten(0, 1).to(self.device))
        text_BL = self.text([observation.instruction for observation in observations])
        found: torch.Tensor = self(pixels.unflatten(0, (len(frames), -1)).flatten(1, 2), text_BL)
        return found.float() * self.half_range + self.middle

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu") -> Eye:
        """Read what ``save_pretrained`` wrote.

        Raises:
            ValueError: naming the file that is missing, damaged, or of another model.
        """

        def build(content: dict[str, Any]) -> Eye:
            objects = tuple(Field(**field) for field in content.pop("objects"))
            return cls(EyeConfig(**content | {"cameras": tuple(content["cameras"]), "objects": objects}))

        return cls._read(folder, device, build)


def _frames(observation: Observation, config: EyeConfig) -> np.ndarray:
    """uint8 [C, H, W, 3] of one observation."""
    if missing := [camera for camera in config.cameras if camera not in observation.frames]:
        raise ValueError(f"the model reads cameras {config.cameras}; the observation lacks {', '.join(missing)}")
    frames = np.stack([observation.frames[camera] for camera in config.cameras])
    size = config.image_size
    if frames.shape[1:] != (size, size, 3) or frames.dtype != np.uint8:
        raise ValueError(
            f"frames are {frames.dtype} {frames.shape[1:]}: this model's eye reads uint8 {(size, size, 3)}"
        )
    return frames
