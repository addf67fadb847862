"""Play for robot arms: contact from all sides, without a goal. A world model learns from it what actions do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Ground:
    """What play needs to know of the present state."""

    tool: np.ndarray
    """float64 [3], [m] where the tool is."""
    items: np.ndarray
    """float64 [N, 3], [m] what can be touched; at least one."""
    low: np.ndarray
    """float64 [3], [m] lowest place of the tool that play goes to."""
    high: np.ndarray
    """float64 [3], [m] highest."""
    gain: float
    """[1/m] action for a distance of 1 m: the first three actions are moves of the tool along its axes."""
    gap: float
    """[m] from an item's middle to a tool that is beside it."""
    gripper: tuple[float, float] | None = None
    """Last action when shut and open; None without a gripper."""


class Play:
    """An oracle for arms without a goal: pushes from all sides, grasps, drops, and wandering near what matters.

    Args:
        look: tells the present state.
        dims: A.
        rng: where every choice comes from.
    """

    def __init__(self, look: Callable[[], Ground], dims: int, rng: np.random.Generator) -> None:
        self._look, self._dims, self._rng = look, dims, rng
        self._script: Iterator[np.ndarray] = iter(())
        self._grip = 0.0
        self.phase = "start"

    def act(self) -> np.ndarray:
        """See ``Oracle``."""
        while True:
            for action in self._script:
                return action
            self._script = self._choose()

    def _choose(self) -> Iterator[np.ndarray]:
        draw, ground = self._rng.random(), self._look()
        item = ground.items[int(self._rng.integers(len(ground.items)))]
        if ground.gripper is not None:
            self._grip = float(self._rng.choice(ground.gripper))
        if draw < 0.4:
            return self._push(ground, item)
        if draw < 0.7 and ground.gripper is not None:
            return self._grasp(ground, ground.gripper, item)
        if draw < 0.85:
            return self._go("visit", item + self._rng.normal(0.0, 0.5 * ground.gap, 3), 15)
        return self._go("wander", self._rng.uniform(ground.low, ground.high), 25)

    def _push(self, ground: Ground, item: np.ndarray) -> Iterator[np.ndarray]:
        angle = self._rng.uniform(-math.pi, math.pi)
        way = np.array([math.cos(angle), math.sin(angle), 0.0])
        start = item - self._rng.uniform(1.0, 1.6) * ground.gap * way
        hover = np.array([0.0, 0.0, 1.5 * ground.gap])
        yield from self._go("approach", start + hover, 20)
        yield from self._go("descend", start, 12)
        yield from self._go("push", item + self._rng.uniform(0.5, 3.0) * ground.gap * way, 20)
        if self._rng.random() < 0.6:
            yield from self._go("retreat", self._look().tool + hover, 8)

    def _grasp(self, ground: Ground, gripper: tuple[float, float], item: np.ndarray) -> Iterator[np.ndarray]:
        shut, opened = gripper
        place = item + self._rng.normal(0.0, 0.12 * ground.gap, 3)
        hover = np.array([0.0, 0.0, 1.5 * ground.gap])
        self._grip = opened
        yield from self._go("approach", place + hover, 20)
        yield from self._go("descend", place, 15)
        self._grip = shut
        for _ in range(8):
            self.phase = "grasp"
            yield self._towards(place)
        yield from self._go("carry", self._rng.uniform(ground.low, ground.high), 25)
        self._grip = opened
        for _ in range(5):
            self.phase = "release"
            yield self._towards(self._look().tool)

    def _go(self, phase: str, place: np.ndarray, most: int) -> Iterator[np.ndarray]:
        for _ in range(most):
            ground = self._look()
            if float(np.linalg.norm(np.clip(place, ground.low, ground.high) - ground.tool)) < 0.25 * ground.gap:
                return
            self.phase = phase
            yield self._towards(place)

    def _towards(self, place: np.ndarray) -> np.ndarray:
        ground = self._look()
        action = np.zeros(self._dims)
        move = ground.gain * (np.clip(place, ground.low, ground.high) - ground.tool)
        action[:3] = move / max(1.0, float(np.abs(move).max()))
        if ground.gripper is not None:
            action[-1] = self._grip
        return action
