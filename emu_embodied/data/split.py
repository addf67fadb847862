"""Which episodes of a dataset are kept for judging; the same for every stage, so no stage learns another's test."""

from __future__ import annotations

import numpy as np


def held_out_episodes(count: int, share: float) -> np.ndarray:
    """Choose about ``share`` of the episodes, at least one, spread over the dataset.

    They follow an irrational stride: datasets of several environments alternate between them, and an even stride would
    hold out one environment only.

    Args:
        count: number of episodes.
        share: in (0, 1).

    Returns:
        bool [count].

    Raises:
        ValueError: if there are fewer than two episodes.
    """
    if count < 2:
        raise ValueError(f"{count} episodes are too few: one is held out for judging, so at least 2 are needed")
    held = np.zeros(count, bool)
    order = np.argsort((np.arange(count) * 2**0.5 + 0.5) % 1.0, kind="stable")
    held[order[: min(count - 1, max(1, round(share * count)))]] = True
    return held
