"""Uniform random action blocks: the floor of every table."""

from __future__ import annotations

import numpy as np

from emu_embodied.records import Observation


class RandomPolicy:
    """Draws one action per block and holds it for the block's K env steps.

    Args:
        block: K [env steps].
        action_dim: A.
        rng: where the actions come from.
    """

    phase = "random"

    def __init__(self, block: int, action_dim: int, rng: np.random.Generator) -> None:
        self._block = block
        self._action_dim = action_dim
        self._rng = rng

    def reset(self, observation: Observation) -> None:
        """Nothing to remember."""

    def act(self, observation: Observation) -> np.ndarray:
        """float32 [K, A], K equal rows in [-1, 1]."""
        action = self._rng.uniform(-1.0, 1.0, self._action_dim).astype(np.float32)
        return np.repeat(action[None], self._block, axis=0)
