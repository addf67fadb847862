"""Scripted experts: one small state machine per task, reading the true state.

Every action is held for a block, as it is everywhere in the data, so an expert steers once in K env steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from emu_embodied.envs.panda import MAX_MOVE, PandaEnv
from emu_embodied.envs.tasks import Scene, WorldState
from emu_embodied.records import Observation

HOVER = 0.10
"""[m] tool height at which nothing on the table is touched."""
PUSH_HEIGHT = 0.03
"""[m] tool height for pushing: the middle of a 6 cm cube."""
CONTACT = 0.046
"""[m] from the tool to the centre of the cube that it pushes."""
OPEN, SHUT = 1.0, -1.0


@dataclass(frozen=True, slots=True)
class Waypoint:
    """Where to be at the end of the block."""

    phase: str
    xyz: tuple[float, float, float]
    gripper: float = OPEN
    """Gripper action in [-1, 1]."""


def held_action(simulator: PandaEnv, xyz: tuple[float, float, float], gripper: float) -> np.ndarray:
    """The action block [K, A] that brings the controller's target to ``xyz`` [m], or as near as one block can."""
    move = (np.asarray(xyz) - simulator.target_xyz) / (MAX_MOVE * simulator.block)
    # One factor for all axes keeps the path straight.
    move /= max(1.0, float(np.abs(move).max()))
    action = np.array([*move, gripper], np.float32)
    return np.repeat(action[None], simulator.block, axis=0)


class ScriptedPolicy:
    """The expert of the simulator's task.

    Args:
        simulator: the environment to act in; its true state is read.

    Attributes:
        phase: what the last block was for (``approach``, ``push``, ``grasp`` ...; ``done`` once solved).

    Raises:
        ValueError: if there is no expert for the task.
    """

    def __init__(self, simulator: PandaEnv) -> None:
        if simulator.task.name not in _EXPERTS:
            raise ValueError(f"no expert for {simulator.task.name}; known: {', '.join(_EXPERTS)}")
        self._simulator = simulator
        self._next = _EXPERTS[simulator.task.name]
        self.phase = "start"

    def reset(self, observation: Observation) -> None:
        """Start an episode."""
        self.phase = "start"

    def act(self, observation: Observation) -> np.ndarray:
        """The next action block, float32 [K, A]."""
        waypoint = self._next(self._simulator.scene, self._simulator.world_state(), self.phase)
        self.phase = waypoint.phase
        return held_action(self._simulator, waypoint.xyz, waypoint.gripper)


def _reach(scene: Scene, state: WorldState, phase: str) -> Waypoint:
    near = math.dist(state.ee_xyz.tolist(), scene.goal_xyz) < 0.02
    return Waypoint("done" if near else "approach", scene.goal_xyz)


def _push(scene: Scene, state: WorldState, phase: str) -> Waypoint:
    x, y, _ = state.item_xyz[scene.meant].tolist()
    ee_x, ee_y, ee_z = state.ee_xyz.tolist()
    away = math.hypot(scene.goal_xyz[0] - x, scene.goal_xyz[1] - y)
    if away < (0.045 if phase in ("push", "done") else 0.03):
        return Waypoint("done", (ee_x, ee_y, ee_z), SHUT)
    ux, uy = (scene.goal_xyz[0] - x) / away, (scene.goal_xyz[1] - y) / away
    along = (x - ee_x) * ux + (y - ee_y) * uy
    aside = (x - ee_x) * -uy + (y - ee_y) * ux
    start = (x - 0.08 * ux, y - 0.08 * uy)
    if ee_z < 0.055 and along > CONTACT - 0.02 and abs(aside) < 0.02:
        # At most 6 cm a block: faster, and the cube slides on by itself. A third of the offset is taken back.
        step = min(0.06, away) - CONTACT
        back = 0.35 * aside
        return Waypoint("push", (x + step * ux - back * uy, y + step * uy + back * ux, PUSH_HEIGHT), SHUT)
    if math.hypot(ee_x - start[0], ee_y - start[1]) < 0.02:
        return Waypoint("descend", (*start, PUSH_HEIGHT), SHUT)
    if ee_z < HOVER - 0.02:
        return Waypoint("retreat", (ee_x - 0.02 * ux, ee_y - 0.02 * uy, HOVER), SHUT)
    return Waypoint("approach", (*start, HOVER), SHUT)


def _pick_place(scene: Scene, state: WorldState, phase: str) -> Waypoint:
    x, y, z = state.item_xyz[scene.meant].tolist()
    ee_x, ee_y, ee_z = state.ee_xyz.tolist()
    goal_x, goal_y, goal_z = scene.goal_xyz
    aside = math.hypot(ee_x - x, ee_y - y)
    if phase in ("release", "retreat", "done") and math.hypot(goal_x - x, goal_y - y) < 0.04 and z < 0.03:
        return Waypoint("done" if ee_z > HOVER - 0.01 else "retreat", (ee_x, ee_y, HOVER))
    if phase in ("grasp", "lift", "carry", "lower", "done") and aside < 0.02 and abs(ee_z - z) < 0.02:
        if scene.kind == "lift":
            return Waypoint("lift" if z < 0.12 else "done", (ee_x, ee_y, goal_z), SHUT)
        if math.hypot(goal_x - x, goal_y - y) < 0.02:
            if z < goal_z + 0.012:
                return Waypoint("release", (ee_x, ee_y, ee_z))
            return Waypoint("lower", (goal_x, goal_y, goal_z + 0.003), SHUT)
        if z < 0.07:
            return Waypoint("lift", (ee_x, ee_y, 0.12), SHUT)
        return Waypoint("carry", (goal_x, goal_y, 0.12), SHUT)
    if aside < 0.012 and abs(ee_z - z) < 0.012:
        return Waypoint("grasp", (x, y, z), SHUT)
    if aside < 0.015:
        return Waypoint("descend", (x, y, z))
    if ee_z < 0.07:
        return Waypoint("retreat", (ee_x, ee_y, HOVER))
    return Waypoint("approach", (x, y, HOVER))


_EXPERTS: dict[str, Callable[[Scene, WorldState, str], Waypoint]] = {
    "PandaReach": _reach,
    "PandaPush": _push,
    "PandaPickPlace": _pick_place,
}
