"""Real frames above imagined ones, block by block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from emu_embodied.files import write_atomically
from emu_embodied.metrics.horizons import HorizonScores

SCALE = 2
"""Enlargement of a frame."""
SHOWN = 6
"""Episodes drawn."""


def draw_horizons(scores: HorizonScores, path: Path) -> Path:
    """Write a PNG: two rows an episode (real, imagined), one column a block, the first column the observed state."""
    gap = 4
    rows = []
    for real, imagined in list(zip(scores.real, scores.imagined, strict=True))[:SHOWN]:
        pair = np.concatenate([np.concatenate(list(real), 1), np.concatenate(list(imagined), 1)], 0)
        rows.append(
            np.pad(pair.repeat(SCALE, 0).repeat(SCALE, 1), ((gap, gap), (gap, gap), (0, 0)), constant_values=255)
        )
    picture = Image.fromarray(np.concatenate(rows))
    write_atomically(path, picture.save)
    return path
