"""A scripted expert for goal-conditioned arms: reach, push, pick and place, stack, or strike a puck that slides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Kind = Literal["reach", "push", "pick", "strike"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Handled:
    """The present state as the expert sees it; all places float64 [3] in [m]."""

    tool: np.ndarray
    """Between the fingers."""
    item: np.ndarray
    """Middle of what is to be moved; the tool itself where there is nothing."""
    goal: np.ndarray
    """Where ``item`` should be."""
    gain: float
    """[1/m] action for a distance of 1 m."""
    half: float
    """Half the item's size [m]."""
    top: float
    """Height at which nothing is touched [m]."""
    shut: float = -1.0
    """Gripper action that closes."""


class Handler:
    """An oracle that steers the tool to one waypoint after another, looking at every env step.

    Args:
        look: tells the present state; for ``pick`` the first item that is not yet where it should be.
        kind: what to do.
        dims: A; the first three actions move the tool, the last is the gripper where there are more than three.
        world: simulator that ``strike`` tries its blows in (has ``save``, ``load`` and ``advance``).
        release: let go of what has been placed, so that another item can be picked.
    """

    def __init__(
        self, look: Callable[[], Handled], kind: Kind, dims: int, world: Any = None, *, release: bool = False
    ) -> None:
        self._look, self._dims, self._world, self._release = look, dims, world, release
        self._next = {"reach": self._reach, "push": self._push, "pick": self._pick, "strike": self._strike}[kind]
        self._blow: Iterator[np.ndarray] | None = None
        self._waited = 0
        self.phase = "start"

    def act(self) -> np.ndarray:
        """See ``Oracle``."""
        return self._next(self._look())

    def _to(self, phase: str, now: Handled, place: np.ndarray, grip: float, speed: float = 1.0) -> np.ndarray:
        self.phase = phase
        action = np.zeros(self._dims)
        move = now.gain * (np.asarray(place) - now.tool)
        action[:3] = speed * move / max(1.0, float(np.abs(move).max()))
        if self._dims > 3:
            action[3] = grip
        return action

    def _reach(self, now: Handled) -> np.ndarray:
        return self._to("approach", now, now.goal, now.shut)

    def _push(self, now: Handled) -> np.ndarray:
        away = now.goal[:2] - now.item[:2]
        far = float(np.linalg.norm(away))
        if far < 0.012 or (self.phase == "done" and far < 0.03):
            return self._to("done", now, np.array([*now.tool[:2], now.top]), now.shut)
        way = away / far
        offset = now.item[:2] - now.tool[:2]
        along, aside = float(offset @ way), float(offset[1] * way[0] - offset[0] * way[1])
        contact = now.half + 0.015
        behind = now.item[:2] - (contact + 0.035) * way
        low = now.item[2]
        if now.tool[2] < low + 0.03 and along > 0.01 and abs(aside) < 0.022:
            # A part of the offset is taken back on the way, so that the item stays in front.
            back = 0.7 * aside * np.array([-way[1], way[0]])
            place = now.item[:2] + (min(0.05, far) - contact) * way + back
            return self._to("push", now, np.array([*place, low]), now.shut, speed=0.5 if far < 0.05 else 0.8)
        if np.linalg.norm(behind - now.tool[:2]) < 0.015:
            return self._to("descend", now, np.array([*behind, low]), now.shut)
        if now.tool[2] < now.top - 0.02 and np.linalg.norm(offset) < 0.12:
            return self._to("retreat", now, np.array([*now.tool[:2], now.top]), now.shut)
        return self._to("approach", now, np.array([*behind, now.top]), now.shut)

    def _pick(self, now: Handled) -> np.ndarray:
        opened = -now.shut
        aside = float(np.linalg.norm(now.tool[:2] - now.item[:2]))
        above = float(now.tool[2] - now.item[2])
        grasping = self.phase in ("grasp", "lift", "carry", "lower") and aside < 0.03 and abs(above) < 0.03
        if grasping:
            self._waited += 1
            if self._waited < 6:
                return self._to("grasp", now, now.item, now.shut)
            level = max(float(now.goal[2]), now.top - 0.02)
            offset = now.goal - now.item
            # Once it goes down it may drift a little, or it would be lifted again and again.
            there = float(np.linalg.norm(offset[:2])) < (0.035 if self.phase == "lower" else 0.012)
            if not there and now.item[2] < level - 0.03:
                return self._to("lift", now, np.array([*now.tool[:2], now.tool[2] + level - now.item[2]]), now.shut)
            if not there:
                place = now.tool + np.array([*offset[:2], level - now.item[2]])
                return self._to("carry", now, place, now.shut)
            if self._release and np.linalg.norm(offset) < 0.012:
                return self._to("release", now, now.tool, opened)
            return self._to("lower", now, now.tool + offset, now.shut, speed=0.5)
        self._waited = 0
        if aside < 0.012 and above < 0.012:
            return self._to("grasp", now, now.item, now.shut)
        if aside < 0.02:
            return self._to("descend", now, now.item, opened)
        if now.tool[2] < now.item[2] + 0.05:
            return self._to("retreat", now, np.array([*now.tool[:2], now.top]), opened)
        return self._to("approach", now, np.array([*now.item[:2], now.top]), opened)

    def _strike(self, now: Handled) -> np.ndarray:
        if self._blow is None:
            away = now.goal[:2] - now.item[:2]
            way = away / max(float(np.linalg.norm(away)), 1e-6)
            behind = np.array([*(now.item[:2] - (now.half + 0.07) * way), now.item[2]])
            if np.linalg.norm(behind - now.tool) < 0.01:
                self._blow = self._blows(self._best_blow(now, way))
            elif np.linalg.norm(behind[:2] - now.tool[:2]) < 0.015:
                return self._to("descend", now, behind, now.shut)
            else:
                return self._to("approach", now, np.array([*behind[:2], now.top]), now.shut)
        assert self._blow is not None
        for action in self._blow:
            self.phase = "strike"
            return action
        self.phase = "done"
        return np.zeros(self._dims)

    def _blows(self, blow: tuple[float, float, int]) -> Iterator[np.ndarray]:
        speed, angle, steps = blow
        for _ in range(steps):
            action = np.zeros(self._dims)
            action[:2] = speed * math.cos(angle), speed * math.sin(angle)
            yield action

    def _best_blow(self, now: Handled, way: np.ndarray) -> tuple[float, float, int]:
        """How fast, which way and for how many env steps: tried in the simulator, which is put back."""
        before = self._world.save()
        straight = math.atan2(way[1], way[0])
        best, least = (0.5, straight, 4), math.inf
        try:
            for steps in (3, 4, 5):
                for speed in np.linspace(0.3, 1.0, 8):
                    for turn in (0.0, -0.05, 0.05):
                        self._world.load(before)
                        blow = (float(speed), straight + turn, steps)
                        for action in self._blows(blow):
                            self._world.advance(action)
                        nearest = math.inf
                        for _ in range(25):
                            self._world.advance(np.zeros(self._dims))
                            seen = self._look()
                            nearest = min(nearest, float(np.linalg.norm(seen.goal - seen.item)))
                        if nearest < least:
                            best, least = blow, nearest
        finally:
            self._world.load(before)
        return best
