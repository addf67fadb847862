"""panda-gym (Gallouédec et al. 2021; version 3): a Panda in PyBullet. Flip is left out, as its texture is missing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from emu_embodied.envs.bullet.engine import BulletSnapshot, without_greetings
from emu_embodied.envs.kinematics import panda_folder
from emu_embodied.envs.suites.closeness import closeness
from emu_embodied.envs.suites.handler import Handled, Handler, Kind
from emu_embodied.envs.suites.play import Ground, Play
from emu_embodied.records import Field

with without_greetings():
    import pybullet
    from panda_gym.envs.core import RobotTaskEnv
    from panda_gym.envs.robots.panda import Panda
    from panda_gym.envs.tasks.pick_and_place import PickAndPlace
    from panda_gym.envs.tasks.push import Push
    from panda_gym.envs.tasks.reach import Reach
    from panda_gym.envs.tasks.slide import Slide
    from panda_gym.envs.tasks.stack import Stack
    from panda_gym.pybullet import PyBullet

_TASKS: dict[str, tuple[Any, Kind, str]] = {
    "Reach": (Reach, "reach", "reach the green ball"),
    "Push": (Push, "push", "push the cube to its goal"),
    "Slide": (Slide, "strike", "make the puck slide to its goal"),
    "PickAndPlace": (PickAndPlace, "pick", "bring the cube to its goal"),
    "Stack": (Stack, "pick", "stack the cubes at their goal"),
}
"""Task -> class, what its expert does, instruction."""
_VIEWS = {
    "close": ((0.0, 0.0, 0.06), 0.75, 50.0, -38.0),
    "side": ((0.0, 0.0, 0.06), 0.85, 0.0, -30.0),
}
"""Camera -> target [m], distance [m], yaw and pitch [degrees]."""
_LIMITS = {"Stack": 100}
"""[env steps] the suite's own; 50 for all other tasks."""


class _Simulation(PyBullet):
    """Bullet with an arm that shows the meshes it collides with: they look alike and have a hundredth of the faces."""

    def loadURDF(self, body_name: str, **kwargs: Any) -> None:
        """See panda-gym; only what is drawn differs."""
        if not str(kwargs.get("fileName", "")).endswith("panda.urdf"):
            super().loadURDF(body_name, **kwargs)
            return
        folder = panda_folder()
        urdf = (folder / "panda.urdf").read_text().replace("package://", f"{folder}/")
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / "panda.urdf"
            path.write_text(urdf.replace("meshes/visual/", "meshes/collision/"))
            super().loadURDF(body_name, **{**kwargs, "fileName": str(path)})


@dataclass(frozen=True, slots=True)
class _State:
    """Bullet's state, which cannot leave its memory, and the goal."""

    engine: BulletSnapshot
    goal: np.ndarray
    numbers: np.ndarray
    """What the state is made of, to compare states by: joints, items and their velocities."""


class PandaGym:
    """``World`` of one task.

    Actions: the suite's, tool displacement (x, y, z; 1 is 5 cm) and, where there is something to grasp, a change of the
    gripper's opening (1 opens). The suite's reward is sparse; ours is closeness to the goal, of the tool to the item,
    and its success. Snapshots belong to the environment that took them.

    Bullet saves what a step needs, except for impulses that contacts keep from step to step. Here they are forgotten
    after every env step (twenty physics steps), so that snapshots are exact.

    Args:
        task: key of the suite's tasks, such as ``Push``.
        image_size: edge of the pictures [px].
    """

    cameras = tuple(_VIEWS)
    control_dt = 0.04

    def __init__(self, task: str, *, image_size: int = 64) -> None:
        make, self._kind, self.instruction = _TASKS[task]
        grasps = self._kind == "pick"
        self.max_episode_steps = _LIMITS.get(task, 50)
        self.action_dim = 4 if grasps else 3
        self._size = image_size
        with without_greetings():
            self._sim = _Simulation()
            robot = Panda(self._sim, block_gripper=not grasps, base_position=np.array([-0.6, 0.0, 0.0]))
            reach = {"get_ee_position": robot.get_ee_position} if task == "Reach" else {}
            self._env = RobotTaskEnv(robot, make(self._sim, **reach))
        self._client = self._sim.physics_client
        self._client.setPhysicsEngineParameter(deterministicOverlappingPairs=1)
        names = list(self._sim._bodies_idx)
        self._items = sorted(name for name in names if name.startswith("object"))
        self._targets = sorted(name for name in names if name.startswith("target"))
        for i, name in enumerate(self._items):
            self._sim.set_base_pose(name, np.array([0.0, 0.0, -10.0 - i]), np.array([0.0, 0.0, 0.0, 1.0]))
        self._pristine = BulletSnapshot(self._client)
        self.weights = {"goal": 0.6, "near": 0.2, "success": 0.2} if self._items else {"goal": 0.8, "success": 0.2}
        self.object_fields = tuple(
            Field(f"{thing}{number}_{axis}", "m", low, high)
            for thing in ("object", "goal")
            for number in (("1", "2") if len(self._items) > 1 else ("",))
            for axis, low, high in (("x", -0.5, 0.8), ("y", -0.5, 0.5), ("z", -0.02, 0.4))
        )
        self.proprio_fields = (
            Field("ee_x", "m", -0.5, 0.5),
            Field("ee_y", "m", -0.5, 0.5),
            Field("ee_z", "m", -0.02, 0.6),
            Field("ee_vx", "m/s", -1.5, 1.5),
            Field("ee_vy", "m/s", -1.5, 1.5),
            Field("ee_vz", "m/s", -1.5, 1.5),
            Field("gripper", "m", 0.0, 0.08),
        )

    def begin(self, seed: int | None, rng: np.random.Generator) -> None:
        """See ``World``."""
        self._restore(self._pristine)  # contacts of an earlier episode would live on
        self._env.reset(seed=int(rng.integers(2**31)))

    def advance(self, action: np.ndarray) -> None:
        """See ``World``."""
        self._env.step(action)
        self._restore(BulletSnapshot(self._client))

    def terms(self) -> dict[str, float]:
        """See ``World``."""
        task = self._env.task
        reached, goal = task.get_achieved_goal(), task.get_goal()
        gaps = np.linalg.norm((reached - goal).reshape(-1, 3), axis=1)
        terms = {
            "goal": float(np.mean([closeness(float(gap)) for gap in gaps])),
            "success": float(task.is_success(reached, goal)),
        }
        if self._items:
            terms["near"] = closeness(float(np.linalg.norm(self._handled().item - self._tool())))
        return terms

    def proprio(self) -> np.ndarray:
        """See ``World``."""
        robot = self._env.robot
        return np.array([*robot.get_ee_position(), *robot.get_ee_velocity(), robot.get_fingers_width()])

    def objects(self) -> np.ndarray:
        """See ``World``: what has to get to its goal (in a reach, the tool), and the goals."""
        task = self._env.task
        return np.concatenate([task.get_achieved_goal(), task.get_goal()])

    def draw(self, camera: str) -> np.ndarray:
        """See ``World``."""
        client, (target, distance, yaw, pitch) = self._client, _VIEWS[camera]
        if self._kind == "strike":  # the goal lies beyond the arm's reach
            target, distance = (0.15, 0.0, 0.0), distance + 0.35
        picture = client.getCameraImage(
            self._size,
            self._size,
            client.computeViewMatrixFromYawPitchRoll(target, distance, yaw, pitch, 0.0, 2),
            client.computeProjectionMatrixFOV(50.0, 1.0, 0.05, 4.0),
            lightDirection=(0.5, -0.7, 1.4),
            shadow=0,
            renderer=pybullet.ER_TINY_RENDERER,
            flags=pybullet.ER_NO_SEGMENTATION_MASK,
        )[2]
        return np.ascontiguousarray(np.asarray(picture, np.uint8).reshape(self._size, self._size, 4)[:, :, :3])

    def save(self) -> _State:
        """See ``World``."""
        client, sim = self._client, self._sim
        joints = client.getJointStates(sim._bodies_idx["panda"], list(range(9)))
        numbers = [np.ravel([joint[:2] for joint in joints])]
        for name in self._items:
            numbers += [np.ravel(client.getBasePositionAndOrientation(sim._bodies_idx[name])[i]) for i in (0, 1)]
            numbers += [np.ravel(client.getBaseVelocity(sim._bodies_idx[name])[i]) for i in (0, 1)]
        return _State(BulletSnapshot(client), self._env.task.goal.copy(), np.concatenate(numbers))

    def load(self, saved: _State) -> None:
        """See ``World``.

        Raises:
            ValueError: if another environment took the snapshot.
        """
        self._restore(saved.engine)
        self._env.task.goal = saved.goal.copy()
        self._place(self._targets, saved.goal)

    def solve(self) -> bool:
        """See ``World``: a puck is put onto its goal; all else the expert does, whose hand belongs into the picture."""
        if self._kind != "strike":
            return False
        self._place(self._items, self._env.task.goal)
        return True

    def oracle(self, rng: np.random.Generator) -> Handler:
        """See ``World``."""
        return Handler(self._handled, self._kind, self.action_dim, self, release=len(self._items) > 1)

    def player(self, rng: np.random.Generator) -> Play:
        """See ``World``."""
        return Play(self._ground, self.action_dim, rng)

    def close(self) -> None:
        """See ``World``."""
        self._env.close()

    def _restore(self, engine: BulletSnapshot) -> None:
        if engine.client is not self._client:
            raise ValueError("a Bullet snapshot can only be restored in the environment that took it")
        # Bullet's contacts outlive the restoring of a state without them: step once with everything out of reach.
        self._client.restoreState(self._pristine.state)
        self._client.stepSimulation()
        self._client.restoreState(engine.state)

    def _place(self, names: list[str], goal: np.ndarray) -> None:
        for name, place in zip(names, goal.reshape(-1, 3), strict=True):
            self._sim.set_base_pose(name, place, np.array([0.0, 0.0, 0.0, 1.0]))

    def _tool(self) -> np.ndarray:
        return np.asarray(self._env.robot.get_ee_position(), float)

    def _handled(self) -> Handled:
        """The first item, bottom one first, that is not yet where it should be."""
        goals = self._env.task.goal.reshape(-1, 3)
        places = [self._sim.get_base_position(name) for name in self._items] or [self._tool()]
        away = [float(np.linalg.norm(place - goal)) for place, goal in zip(places, goals, strict=True)]
        which = next((i for i, gap in enumerate(away) if gap > 0.02), len(away) - 1)
        return Handled(
            tool=self._tool(),
            item=np.asarray(places[which], float),
            goal=goals[which],
            gain=1 / 0.08,
            half=0.03 if self._kind == "strike" else 0.02,
            top=0.16,
        )

    def _ground(self) -> Ground:
        items = [np.asarray(self._sim.get_base_position(name), float) for name in self._items]
        return Ground(
            tool=self._tool(),
            items=np.array([*items, *self._env.task.goal.reshape(-1, 3)]),
            low=np.array([-0.25, -0.25, 0.02]),
            high=np.array([0.25, 0.25, 0.35]),
            gain=1 / 0.08,
            gap=0.05,
            gripper=(-1.0, 1.0) if self.action_dim == 4 else None,
        )
