"""Noise processes of discrete flow matching: how a clean token (t = 1) becomes noise (t = 0) and back."""

from __future__ import annotations

from typing import Protocol

import torch

from emu_embodied.decode.sampling import uniform


class Path(Protocol):
    """A probability path p_t(x | x_1) over the ids 0 .. size - 1 of one kind of token.

    Random numbers are drawn where the generator lives and results come back on the tokens' device, so that one CPU
    generator gives the same draws on every device.
    """

    name: str

    def source(self, shape: tuple[int, ...], size: int, generator: torch.Generator | None) -> torch.Tensor:
        """x_0: int64 noise of the given shape, on the generator's device."""
        ...

    def noise(self, x1: torch.Tensor, size: int, t: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """x_t ~ p_t(. | x_1); ``t`` in [0, 1] broadcasts against ``x1``."""
        ...

    def step(
        self, x_t: torch.Tensor, x1: torch.Tensor, size: int, t: float, t_next: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        """x_{t_next} given x_t [S, ...] and a predicted x_1; at ``t_next`` = 1 this is the prediction itself.

        Random numbers are common to all S, as candidate futures are compared with each other.
        """
        ...


class UniformPath:
    """Mixture path with a uniform source: p_t(x | x_1) = t [x = x_1] + (1 - t) / size.

    Discrete Flow Matching (Gat et al. 2024, eq. 8); Emu3.5 names it as what DiDA extends and gives no details.
    """

    name = "uniform"

    def source(self, shape: tuple[int, ...], size: int, generator: torch.Generator | None) -> torch.Tensor:
        """Uniform ids."""
        device = generator.device if generator is not None else None
        return torch.randint(size, shape, generator=generator, device=device)

    def noise(self, x1: torch.Tensor, size: int, t: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Each token is kept with probability t, otherwise drawn uniformly."""
        keep = uniform(x1, generator) < t
        return torch.where(keep, x1, self.source(tuple(x1.shape), size, generator).to(x1.device))

    def step(
        self, x_t: torch.Tensor, x1: torch.Tensor, size: int, t: float, t_next: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Euler step of the mixture path's velocity: jump to x_1 with probability (t_next - t) / (1 - t)."""
        if t_next >= 1:
            return x1
        jump = uniform(x_t[:1], generator) < (t_next - t) / (1 - t)
        return torch.where(jump, x1, x_t)


PATHS: dict[str, Path] = {path.name: path for path in (UniformPath(),)}
"""Name -> path; a checkpoint records the path that it was adapted with."""
