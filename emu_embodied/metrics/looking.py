"""A probe that looks: can one glance, told by the instruction's words, find a thing among the cells of a picture?

A linear probe of a whole picture has to learn anew for every cell what a thing looks like there, so it says little of
where small things are, for pixels and codes alike. This one scores every cell by the same direction, which the words
choose, takes the weighted mean of the cells' places and vectors, and reads the position linearly from that: one head of
attention and no more. It wants several hundred episodes, as a thing's place is often the same all through one.

Shape letters: M states, N cells, D width of a cell's vector, W words, O numbers that are read.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from emu_embodied.metrics.intervals import bootstrap_mean
from emu_embodied.metrics.probes import FOLDS, Place, ProbeScore, Split

STARTS = 4
"""Directions that are started from: one that begins between two things may never choose."""
STEPS, EVERY = 200, 25
"""Steps of training from each, and between looks at the states that say when to stop."""


class Glance(nn.Module):
    """Words and cells to a position.

    Args:
        words: W.
        width: D.
        numbers: O.
        grid: rows and columns of a picture's cells.
        pictures: cameras; their cells follow each other.
        generator: of the first weights.
    """

    places_N2: torch.Tensor

    def __init__(
        self, words: int, width: int, numbers: int, grid: tuple[int, int], pictures: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        rows, columns = (torch.linspace(-1, 1, side) for side in grid)
        places = torch.stack([part.flatten() for part in torch.meshgrid(rows, columns, indexing="ij")], 1)
        self.register_buffer("places_N2", places.repeat(pictures, 1))
        self.query = nn.Parameter(torch.randn(words, width, generator=generator) * width**-0.5)
        self.read = nn.Linear(width + 2, numbers)
        nn.init.normal_(self.read.weight, std=0.05, generator=generator)
        nn.init.zeros_(self.read.bias)

    def forward(self, cells_MND: torch.Tensor, words_MW: torch.Tensor) -> torch.Tensor:
        """Numbers [M, O]."""
        weight_MN = torch.softmax(torch.einsum("md,mnd->mn", words_MW @ self.query, cells_MND), -1)
        places = self.places_N2.expand(len(cells_MND), -1, -1)
        read: torch.Tensor = self.read(torch.einsum("mn,mnf->mf", weight_MN, torch.cat([cells_MND, places], -1)))
        return read


def look(
    cells_MND: torch.Tensor,
    words_MW: torch.Tensor,
    targets_MO: np.ndarray,
    place: Place,
    split: Split,
    grid: tuple[int, int],
    *,
    seed: int = 0,
) -> ProbeScore:
    """Train a ``Glance`` on the fitted states, stopped by a quarter of them, and measure it on the held-out ones.

    Args:
        cells_MND: vectors of the cells, row by row, the pictures of a state one after another.
        words_MW: ``words`` of each state's instruction.
        targets_MO: the vectors that hold the position.
        place: which position.
        split: who is fitted.
        grid: rows and columns of a picture's cells.
        seed: of weights and of the bootstrap.
    """
    fit = np.flatnonzero(~split.held_M)
    judges = np.unique(split.episode_M[fit], return_inverse=True)[1] % FOLDS == 0
    inside, judge, held = fit[~judges], fit[judges], np.flatnonzero(split.held_M)
    true = torch.from_numpy(np.asarray(targets_MO, np.float32))[:, list(place.axes)]
    middle, spread = true[fit].mean(0), true[fit].std(0).clamp_min(1e-6)
    cells = cells_MND.float()
    cells = (cells - cells[fit].mean((0, 1))) / cells[fit].std((0, 1)).clamp_min(1e-6)
    words = words_MW * math.sqrt(words_MW.shape[1])
    generator = torch.Generator().manual_seed(seed)
    best, kept = math.inf, true.new_zeros(len(held), true.shape[1])
    for _ in range(STARTS):
        pictures = cells.shape[1] // math.prod(grid)
        model = Glance(words.shape[1], cells.shape[2], true.shape[1], grid, pictures, generator)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
        for step in range(STEPS):
            optimizer.zero_grad()
            read = model(cells[inside], words[inside])
            nn.functional.mse_loss(read, (true[inside] - middle) / spread).backward()
            optimizer.step()
            if (step + 1) % EVERY == 0:
                with torch.no_grad():
                    missed = model(cells[judge], words[judge]) * spread + middle - true[judge]
                    if (loss := float(missed.square().sum(1).mean())) < best:
                        best, kept = loss, model(cells[held], words[held]) * spread + middle
    axes = Place(place.name, tuple(range(len(place.axes))), place.unit, place.scale)
    errors = axes.error(kept.numpy(), true[held].numpy())
    per_episode = [errors[split.episode_M[held] == number].mean() for number in np.unique(split.episode_M[held])]
    guess = axes.error(middle.expand(len(held), -1).numpy(), true[held].numpy())
    return ProbeScore(
        place=place.name,
        unit=place.unit,
        error=float(errors.mean()),
        ci95=bootstrap_mean(np.array(per_episode), np.random.default_rng(seed)),
        guess=float(guess.mean()),
        error_of_half=None,
    )
