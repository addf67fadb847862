"""The environment: a task in an engine, behind Gymnasium's API and the ``Simulator`` protocol."""

from __future__ import annotations

import difflib
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import gymnasium
import numpy as np

from emu_embodied.envs.engine import CAMERAS, CONTROL_DT, MAX_OPENING, ArmEngine
from emu_embodied.envs.kinematics import panda_chain
from emu_embodied.envs.tasks import MAX_INSTRUCTION, TASKS, WORKSPACE_HIGH, WORKSPACE_LOW, Scene, Task, WorldState
from emu_embodied.records import Field, Observation, Transition

MAX_MOVE = 0.025
"""[m] an action of 1 moves the target this far in one env step."""
MAX_LEAD = 0.04
"""[m] how far the target may run ahead of the tool, per axis: bounds the force against what is in the way."""
BLOCK = 5
"""[env steps] K: one action block."""

PROPRIO_FIELDS = (
    Field("ee_x", "m", 0.25, 0.72),
    Field("ee_y", "m", -0.30, 0.30),
    Field("ee_z", "m", -0.02, 0.36),
    Field("ee_vx", "m/s", -0.8, 0.8),
    Field("ee_vy", "m/s", -0.8, 0.8),
    Field("ee_vz", "m/s", -0.8, 0.8),
    Field("gripper", "m", 0.0, MAX_OPENING),
)
OBJECT_FIELDS = (
    Field("object_x", "m", 0.25, 0.72),
    Field("object_y", "m", -0.30, 0.30),
    Field("object_z", "m", -0.02, 0.36),
    Field("goal_x", "m", 0.25, 0.72),
    Field("goal_y", "m", -0.30, 0.30),
    Field("goal_z", "m", -0.02, 0.36),
)
"""The meant item's centre, and where it (in a reach, the tool) has to go."""
_LOW = np.array([f.low for f in PROPRIO_FIELDS], np.float32)
_HIGH = np.array([f.high for f in PROPRIO_FIELDS], np.float32)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that the next step depends on."""

    env_id: str
    scene: Scene
    engine: Any
    joints: np.ndarray
    target_xyz: np.ndarray
    elapsed: int
    rng: Mapping[str, Any]


class PandaEnv(gymnasium.Env):
    """A Panda arm at a table.

    Actions are float32 [4] in [-1, 1]: tool displacement (x, y, z; 1 is 2.5 cm per env step) and gripper (-1 shut,
    1 open). Observations are a dictionary of the cameras (uint8 [size, size, 3]), ``proprio`` (float32 [7], see
    ``proprio_fields``) and ``instruction``. Episodes are truncated after ``max_episode_steps`` and never terminated:
    ``info["success"]`` says whether the state solves the task.

    Args:
        task: key of ``TASKS``.
        engine: ``"mujoco"`` or ``"bullet"``.
        env_id: the id that episodes and snapshots are labelled with.
        image_size: edge of the pictures [px].
        cameras: which pictures to draw, of ``CAMERAS``.
        max_episode_steps: time limit [env steps], the task's own where None.
        pretty: shadows and antialiasing, for pictures that people look at.
        render_mode: ``"rgb_array"`` or None.

    Raises:
        ValueError: if the task, the engine or a camera is unknown.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / CONTROL_DT)}  # noqa: RUF012 (Gymnasium's own)
    proprio_fields: tuple[Field, ...] = PROPRIO_FIELDS
    object_fields: tuple[Field, ...] = OBJECT_FIELDS
    block: int = BLOCK

    def __init__(
        self,
        task: str = "PandaReach",
        engine: str = "mujoco",
        env_id: str = "",
        image_size: int = 64,
        cameras: tuple[str, ...] = ("front", "wrist"),
        max_episode_steps: int | None = None,
        pretty: bool = False,
        render_mode: str | None = None,
    ) -> None:
        _check_known("task", task, TASKS)
        _check_known("engine", engine, _ENGINES)
        for camera in cameras:
            _check_known("camera", camera, CAMERAS)
        if render_mode is not None:
            _check_known("render_mode", render_mode, self.metadata["render_modes"])
        self.task: Task = TASKS[task]
        self.env_id = env_id or f"{task}-v0"
        self.cameras = tuple(cameras)
        self.image_size = image_size
        self.max_episode_steps = max_episode_steps or self.task.max_episode_steps
        self.render_mode = render_mode
        self._engine = _make_engine(engine, self.task, image_size=image_size, pretty=pretty)
        self._chain = panda_chain()
        self._low = np.array([*WORKSPACE_LOW, self.task.tool_floor])
        self._high = np.array(WORKSPACE_HIGH)
        self._scene: Scene | None = None
        self._state: WorldState | None = None
        self._joints = np.zeros(7)
        self._target = np.zeros(3)
        self._elapsed = 0
        picture = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({
            **dict.fromkeys(self.cameras, picture),
            "proprio": gymnasium.spaces.Box(_LOW, _HIGH, dtype=np.float32),
            "instruction": gymnasium.spaces.Text(MAX_INSTRUCTION, charset=string.ascii_lowercase + " ,:"),
        })  # fmt: skip

    # Gymnasium

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw a new scene; the same seed gives the same bytes."""
        super().reset(seed=seed)
        self._begin(self.task.sample(self.np_random))
        return self._gym_observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One env step (0.05 s)."""
        reward = self._advance(np.asarray(action, np.float64))
        info = self._info()
        return self._gym_observation(), reward, False, self._elapsed >= self.max_episode_steps, info

    def render(self, camera: str = "front") -> np.ndarray:
        """A camera's picture of the current state, uint8 [size, size, 3]."""
        return self._engine.render(camera)

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()

    # Simulator

    def observe(self, *, render: bool = True) -> Observation:
        """The current state as an observation."""
        frames = {name: self._engine.render(name) for name in self.cameras} if render else {}
        meant = self.world_state().item_xyz[self.scene.meant]
        objects = np.array([*meant, *self.scene.goal_xyz], np.float32)
        return Observation(frames, self._proprio(), self.scene.instruction, objects)

    def step_block(self, actions_KA: np.ndarray, *, render: bool = True) -> Transition:
        """Apply K actions (any K); pictures are drawn only of the state reached, and only if ``render``."""
        rewards, solved = [], []
        for action in np.asarray(actions_KA, np.float64):
            rewards.append(self._advance(action))
            solved.append(self.task.success(self.scene, self.world_state()))
        return Transition(
            observation=self.observe(render=render),
            rewards_K=np.array(rewards, np.float32),
            terms=self.reward_terms(),
            success=solved[-1],
            success_any=any(solved),
            truncated=self._elapsed >= self.max_episode_steps,
        )

    def snapshot(self) -> Snapshot:
        """The complete state: physics, controller, clock and random generator."""
        return Snapshot(
            env_id=self.env_id,
            scene=self.scene,
            engine=self._engine.snapshot(),
            joints=self._joints.copy(),
            target_xyz=self._target.copy(),
            elapsed=self._elapsed,
            rng=self.np_random.bit_generator.state,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot; stepping from there gives the same bytes.

        Raises:
            ValueError: if the snapshot is another environment's.
        """
        if snapshot.env_id != self.env_id:
            raise ValueError(f"this is {self.env_id}, the snapshot is of {snapshot.env_id}: restore it there")
        if snapshot.scene is not self._scene:
            # Colours are not part of the physics state.
            self._engine.reset(snapshot.scene, snapshot.joints)
        self._engine.restore(snapshot.engine)
        self._scene = snapshot.scene
        self._joints = snapshot.joints.copy()
        self._target = snapshot.target_xyz.copy()
        self._elapsed = snapshot.elapsed
        self.np_random.bit_generator.state = snapshot.rng
        self._state = None

    # What experts, planners and recorders ask for

    @property
    def scene(self) -> Scene:
        """The running episode's start and goal."""
        if self._scene is None:
            raise ValueError("no episode is running: call reset() first")
        return self._scene

    @property
    def elapsed(self) -> int:
        """Env steps since the reset."""
        return self._elapsed

    @property
    def target_xyz(self) -> np.ndarray:
        """Where the controller is steering the tool [m] [3]; the tool trails it by up to 2 cm in motion."""
        return self._target.copy()

    def world_state(self) -> WorldState:
        """The true state."""
        if self._state is None:
            self._state = self._engine.state()
        return self._state

    def reward_terms(self) -> dict[str, float]:
        """The named reward terms of the current state, each in [0, 1]."""
        return self.task.terms(self.scene, self.world_state())

    def reward(self) -> float:
        """The current state's reward, in [0, 1]: the weighted sum of its terms."""
        return self.task.reward(self.reward_terms())

    def success(self) -> bool:
        """Whether the current state solves the task."""
        return self.task.success(self.scene, self.world_state())

    def goal_observation(self) -> Observation:
        """What the robot would see with the task solved; the episode is left as it was."""
        before = self.snapshot()
        try:
            self._begin(self.task.solved(self.scene))
            return self.observe()
        finally:
            self._scene = None  # the solved scene stood in its place, so the restore must place everything anew
            self.restore(before)

    # Inner workings

    def _begin(self, scene: Scene) -> None:
        self._scene = scene
        self._joints = self._chain.solve(np.array(scene.ee_xyz))
        self._engine.reset(scene, self._joints)
        self._target = np.array(scene.ee_xyz)
        self._elapsed = 0
        self._state = None

    def _advance(self, action: np.ndarray) -> float:
        action = np.minimum(np.maximum(action, -1.0), 1.0)
        ee = self.world_state().ee_xyz
        target = np.minimum(np.maximum(self._target + MAX_MOVE * action[:3], ee - MAX_LEAD), ee + MAX_LEAD)
        self._target = np.minimum(np.maximum(target, self._low), self._high)
        self._joints = self._chain.follow(self._joints, self._target)
        opening = self.task.locked_opening
        if opening is None:
            opening = MAX_OPENING * (float(action[3]) + 1) / 2
        self._engine.advance(self._joints, opening)
        self._elapsed += 1
        self._state = None
        return self.reward()

    def _proprio(self) -> np.ndarray:
        state = self.world_state()
        vector = np.array([*state.ee_xyz, *state.ee_velocity, state.opening], np.float32)
        return np.clip(vector, _LOW, _HIGH)

    def _gym_observation(self) -> dict[str, Any]:
        observation = self.observe()
        return {**observation.frames, "proprio": observation.proprio, "instruction": observation.instruction}

    def _info(self) -> dict[str, Any]:
        terms = self.reward_terms()
        return {"success": bool(terms["success"]), "terms": terms}


_ENGINES = {
    "mujoco": ("emu_embodied.envs.mujoco.engine", "MujocoEngine"),
    "bullet": ("emu_embodied.envs.bullet.engine", "BulletEngine"),
}
"""Engine -> module and class, imported when an environment is made."""


def _make_engine(name: str, task: Task, *, image_size: int, pretty: bool) -> ArmEngine:
    module, engine = _ENGINES[name]
    return getattr(import_module(module), engine)(task, image_size=image_size, pretty=pretty)


def _check_known(kind: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown {kind} {name!r}; {hint}known: {', '.join(known)}")
