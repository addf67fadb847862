"""Frames to codes and back: the IBQ behind the ``FrameTokenizer`` seam."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from emu_embodied.models.ibq import IBQ, to_frames, to_pixels


class IBQFrameTokenizer:
    """uint8 frames <-> codes, row by row over the code grid.

    Args:
        ibq: a trained vision tokenizer; put into evaluation mode.

    Attributes:
        ibq: the network.
        codebook_size: number of codes.
        image_size: side of the square frames it reads and writes [pixels].
        grid: (rows, columns) of codes of one frame; N = rows * columns.
    """

    def __init__(self, ibq: IBQ) -> None:
        self.ibq = ibq.eval().requires_grad_(False)
        self.codebook_size = ibq.config.n_embed
        self.image_size = ibq.config.resolution
        side = self.image_size // ibq.config.cell
        self.grid = (side, side)

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.ibq.codebook.device

    @torch.no_grad()
    def encode(self, frames: np.ndarray | torch.Tensor) -> torch.Tensor:
        """uint8 [B, height, width, 3] -> int64 codes [B, N] on the network's device, in bounded memory.

        Raises:
            ValueError: if the frames are not uint8 or not of ``image_size`` (nothing is resized silently).
        """
        return self.ibq.encode(self._pixels(frames)).flatten(1)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> np.ndarray:
        """int64 codes [B, N] -> uint8 [B, height, width, 3], in bounded memory.

        Raises:
            ValueError: if N is not that of ``grid`` or a code is outside the codebook.
        """
        rows, columns = self.grid
        if codes.dim() != 2 or codes.shape[1] != rows * columns:
            raise ValueError(
                f"codes of shape {tuple(codes.shape)}: expected [B, {rows * columns}] for a {self.grid} grid"
            )
        return to_frames(self.ibq.decode(codes.to(self.device).unflatten(1, self.grid))).cpu().numpy()

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """int64 codes [..., N] -> float32 code vectors [..., N, D] on the codes' device."""
        return torch.nn.functional.embedding(codes.to(self.device), self.ibq.codebook).float().to(codes.device)

    def idempotence(self, codes: torch.Tensor) -> float:
        """Share of codes [B, N] that survive decoding and encoding again, in [0, 1]."""
        return (self.encode(self.decode(codes)) == codes.to(self.device)).float().mean().item()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into ``folder``."""
        self.ibq.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> IBQFrameTokenizer:
        """Load what ``save_pretrained`` wrote.

        Raises:
            ValueError: if a file is missing, truncated or foreign; names it.
        """
        return cls(IBQ.from_pretrained(folder))

    def _pixels(self, frames: np.ndarray | torch.Tensor) -> torch.Tensor:
        frames = torch.as_tensor(frames)
        size = (self.image_size, self.image_size, 3)
        if frames.dtype != torch.uint8:
            raise ValueError(f"frames are {frames.dtype}: expected uint8 in [0, 255]")
        if frames.dim() != 4 or tuple(frames.shape[1:]) != size:
            raise ValueError(
                f"frames of shape {tuple(frames.shape)}, but this tokenizer reads "
                f"[B, {self.image_size}, {self.image_size}, 3]: render at {self.image_size} x {self.image_size} pixels"
            )
        return to_pixels(frames.to(self.device))
