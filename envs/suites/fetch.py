"""Gymnasium-Robotics' Fetch tasks (Plappert et al. 2018; version 4): reach, push, pick and place, slide."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from emu_embodied.envs.mujoco.view import Orbit, View, load_state, save_state
from emu_embodied.envs.suites.closeness import closeness
from emu_embodied.envs.suites.handler import Handled, Handler, Kind
from emu_embodied.envs.suites.play import Ground, Play
from emu_embodied.records import Field

_TASKS: dict[str, tuple[str, str, Kind, str]] = {
    "Reach": ("reach", "MujocoFetchReachEnv", "reach", "reach the red ball"),
    "Push": ("push", "MujocoFetchPushEnv", "push", "push the block to the red ball"),
    "PickAndPlace": ("pick_and_place", "MujocoFetchPickAndPlaceEnv", "pick", "bring the block to the red ball"),
    "Slide": ("slide", "MujocoFetchSlideEnv", "strike", "make the puck slide to the red ball"),
}
"""Task -> module, class, what its expert does, instruction."""
_CLOSE = Orbit((1.30, 0.75, 0.46), 0.95, 135.0, -32.0)
_CAMERAS = {"close": _CLOSE, "side": Orbit((1.30, 0.75, 0.46), 1.1, 180.0, -25.0)}
_LONG = {"close": Orbit((1.32, 0.75, 0.42), 1.1, 180.0, -62.0), "side": Orbit((1.32, 0.75, 0.42), 1.3, 140.0, -30.0)}


@dataclass(frozen=True, slots=True)
class _State:
    physics: np.ndarray
    goal: np.ndarray


class Fetch:
    """``World`` of one task.

    Actions: the suite's, tool displacement (x, y, z; 1 is 5 cm) and gripper (1 opens; held shut in all tasks but pick
    and place). The suite's reward is sparse; ours is closeness to the goal, of the tool to the block, and its success.

    The suite starts an env step from poses that are one physics step old. Here they are brought up to date after every
    env step, so that what happens next is a function of MuJoCo's state and snapshots are exact; where it matters at all
    (pick and place, slide) the tool's target shifts by under a millimetre.

    Args:
        task: key of the suite's tasks, such as ``Push``.
        image_size: edge of the pictures [px].
    """

    object_fields = tuple(
        Field(f"{thing}_{axis}", "m", low, high)
        for thing in ("object", "goal")
        for axis, low, high in (("x", 0.9, 2.1), ("y", 0.2, 1.3), ("z", 0.35, 1.0))
    )
    proprio_fields = (
        Field("ee_x", "m", 0.8, 1.8),
        Field("ee_y", "m", 0.2, 1.3),
        Field("ee_z", "m", 0.35, 1.1),
        Field("ee_vx", "m/s", -1.5, 1.5),
        Field("ee_vy", "m/s", -1.5, 1.5),
        Field("ee_vz", "m/s", -1.5, 1.5),
        Field("gripper", "m", 0.0, 0.1),
    )
    action_dim = 4
    cameras = tuple(_CAMERAS)
    max_episode_steps = 50
    control_dt = 0.04

    def __init__(self, task: str, *, image_size: int = 64) -> None:
        module, name, self._kind, self.instruction = _TASKS[task]
        self._env: Any = getattr(import_module(f"gymnasium_robotics.envs.fetch.{module}"), name)()
        model = self._env.model
        self._has_item = self._kind != "reach"
        self.weights = {"goal": 0.6, "near": 0.2, "success": 0.2} if self._has_item else {"goal": 0.8, "success": 0.2}
        self._target, self._grip = model.site("target0").id, model.site("robot0:grip").id
        # Slide's model spreads over two metres, so the camera stands back.
        cameras = _LONG if self._kind == "strike" else _CAMERAS
        self._view = View(model, size=image_size, cameras=dict(cameras))

    def begin(self, seed: int | None, rng: np.random.Generator) -> None:
        """See ``World``."""
        self._env.reset(seed=int(rng.integers(2**31)))
        self._renew()

    def advance(self, action: np.ndarray) -> None:
        """See ``World``."""
        self._env.step(action)
        self._renew()

    def terms(self) -> dict[str, float]:
        """See ``World``."""
        away = float(np.linalg.norm(self._item() - self._env.goal))
        terms = {"goal": closeness(away), "success": float(away < self._env.distance_threshold)}
        if self._has_item:
            terms["near"] = closeness(float(np.linalg.norm(self._item() - self._tool())))
        return terms

    def proprio(self) -> np.ndarray:
        """See ``World``."""
        env = self._env
        velocity = env._utils.get_site_xvelp(env.model, env.data, "robot0:grip")
        fingers = env._utils.robot_get_obs(env.model, env.data, env._model_names.joint_names)[0][-2:]
        return np.array([*self._tool(), *velocity, fingers.sum()])

    def objects(self) -> np.ndarray:
        """See ``World``: what has to get to the goal (in a reach, the tool), and the goal."""
        return np.concatenate([self._item(), self._env.goal])

    def draw(self, camera: str) -> np.ndarray:
        """See ``World``."""
        self._env.data.site_xpos[self._target] = self._env.goal  # a mark without physics
        return self._view.draw(self._env.data, camera)

    def save(self) -> _State:
        """See ``World``."""
        return _State(save_state(self._env.model, self._env.data), self._env.goal.copy())

    def load(self, saved: _State) -> None:
        """See ``World``."""
        load_state(self._env.model, self._env.data, saved.physics)
        self._env.goal = saved.goal.copy()

    def solve(self) -> bool:
        """See ``World``: a puck is put onto its goal; all else the expert does, whose hand belongs into the picture."""
        if self._kind != "strike":
            return False
        joint = self._env.model.joint("object0:joint")
        self._env.data.qpos[joint.qposadr[0] : joint.qposadr[0] + 3] = self._env.goal
        self._env.data.qvel[joint.dofadr[0] : joint.dofadr[0] + 6] = 0.0
        self._renew()
        return True

    def oracle(self, rng: np.random.Generator) -> Handler:
        """See ``World``."""
        return Handler(self._handled, self._kind, self.action_dim, self)

    def player(self, rng: np.random.Generator) -> Play:
        """See ``World``."""
        return Play(self._ground, self.action_dim, rng)

    def close(self) -> None:
        """See ``World``."""
        self._view.close()
        self._env.close()

    def aim(self, place: np.ndarray) -> None:
        """Put the goal somewhere else, float64 [3] [m]."""
        self._env.goal = np.array(place, float)

    def _renew(self) -> None:
        load_state(self._env.model, self._env.data, save_state(self._env.model, self._env.data))

    def _tool(self) -> np.ndarray:
        return self._env.data.site_xpos[self._grip].copy()

    def _item(self) -> np.ndarray:
        return self._env.data.site("object0").xpos.copy() if self._has_item else self._tool()

    def _handled(self) -> Handled:
        return Handled(
            tool=self._tool(),
            item=self._item(),
            goal=self._env.goal,
            gain=1 / 0.06,
            half=0.025,
            top=self._env.height_offset + 0.12 if self._has_item else 0.0,
        )

    def _ground(self) -> Ground:
        items = [self._env.goal] if not self._has_item else [self._item(), self._item(), self._env.goal]
        return Ground(
            tool=self._tool(),
            items=np.array(items),
            low=np.array([1.05, 0.45, 0.425]),
            high=np.array([1.55, 1.05, 0.75]),
            gain=1 / 0.06,
            gap=0.06,
            gripper=(-1.0, 1.0),
        )
