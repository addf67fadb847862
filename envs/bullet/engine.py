"""The Panda in PyBullet."""

from __future__ import annotations

import math
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from emu_embodied.envs import engine
from emu_embodied.envs.kinematics import panda_folder
from emu_embodied.envs.tasks import COLOURS, Scene, Task, WorldState


@contextmanager
def without_greetings() -> Iterator[None]:
    """Bullet greets on the process's stdout and stderr from C++; output that others parse must not contain that."""
    saved = []
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        saved.append((number, os.dup(number)))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number, _ in saved:
            os.dup2(nowhere, number)
        yield
    finally:
        for number, copy in saved:
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)


with without_greetings():
    import pybullet
    from pybullet_utils.bullet_client import BulletClient

TIMESTEP = 1 / 240
"""[s] twelve physics steps are one env step; Bullet's solver is tuned for this step."""
_SUBSTEPS = round(engine.CONTROL_DT / TIMESTEP)
_ARM_GAIN = 0.075
"""Share of a joint's error taken back in one physics step: the lag is like that of MuJoCo's servos here."""
_FINGER_GAIN = 0.2
_FINGER_SPEED = 0.2
"""[m/s], from the URDF's limits."""
_NEAR, _FAR = 0.01, 4.0
"""[m] clipping planes."""


class BulletSnapshot:
    """A state that Bullet keeps in its memory, dropped with this object."""

    def __init__(self, client: BulletClient) -> None:
        self.client = client
        self.state = client.saveState()
        weakref.finalize(self, _drop, client, self.state)


def _drop(client: BulletClient, state: int) -> None:
    if client.isConnected():
        client.removeState(state)


class BulletEngine:
    """``ArmEngine`` in PyBullet. Snapshots belong to the engine that took them."""

    def __init__(self, task: Task, *, image_size: int = 64, pretty: bool = False) -> None:
        self._size = image_size
        self._pretty = pretty
        self._task = task
        with without_greetings():
            self._client = client = BulletClient(connection_mode=pybullet.DIRECT)
        client.setTimeStep(TIMESTEP)
        client.setGravity(0.0, 0.0, -9.81)
        client.setPhysicsEngineParameter(deterministicOverlappingPairs=1, numSolverIterations=50)
        self._load_arm()
        self._load_table()
        # Out of reach of all, one another included, until an episode places them.
        self._items = [
            self._load_item(shape, size, (0.0, 0.0, -10.0 - i)) for i, (_, shape, size) in enumerate(task.slots)
        ]
        self._pristine = client.saveState()

    def _load_arm(self) -> None:
        client = self._client
        folder = panda_folder()
        urdf = (folder / "panda.urdf").read_text().replace("package://", f"{folder}/")
        if not self._pretty:
            # The meshes it collides with look much the same at 64 px and have a hundredth of the faces.
            urdf = urdf.replace("meshes/visual/", "meshes/collision/")
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / "panda.urdf"
            path.write_text(urdf)
            self._robot = client.loadURDF(str(path), useFixedBase=True)
        links = {"panda_link0": -1}
        joints = {}
        for i in range(client.getNumJoints(self._robot)):
            info = client.getJointInfo(self._robot, i)
            joints[info[1].decode()] = i
            links[info[12].decode()] = i
        self._arm = [joints[f"panda_joint{i}"] for i in range(1, 8)]
        self._fingers = [joints["panda_finger_joint1"], joints["panda_finger_joint2"]]
        self._tool = links["panda_grasptarget"]
        self._links = links
        for name, link in links.items():
            touches = int(name in engine.EFFECTOR_LINKS)
            client.setCollisionFilterGroupMask(self._robot, link, 4 * touches, 2 * touches)
            if name in engine.LINK_COLOURS:
                client.changeVisualShape(self._robot, link, rgbaColor=(*engine.LINK_COLOURS[name], 1.0))
        for finger in self._fingers:
            client.changeDynamics(self._robot, finger, lateralFriction=1.5, spinningFriction=0.02)

    def _load_table(self) -> None:
        client, (x, y, z) = self._client, engine.TABLE_HALF
        shape = client.createCollisionShape(pybullet.GEOM_BOX, halfExtents=(x, y, z))
        look = client.createVisualShape(pybullet.GEOM_BOX, halfExtents=(x, y, z), rgbaColor=(*engine.TABLE_COLOUR, 1.0))
        table = client.createMultiBody(0.0, shape, look, basePosition=(0.4, 0.0, -z))
        client.changeDynamics(table, -1, lateralFriction=0.8)
        client.setCollisionFilterGroupMask(table, -1, 1, 2)

    def _load_item(self, shape: str, size: float, place: tuple[float, float, float]) -> int:
        client = self._client
        if shape == "cube":
            half = (size, size, size)
            body = client.createMultiBody(
                engine.CUBE_DENSITY * (2 * size) ** 3,
                client.createCollisionShape(pybullet.GEOM_BOX, halfExtents=half),
                client.createVisualShape(pybullet.GEOM_BOX, halfExtents=half),
                basePosition=place,
            )
            # Bullet multiplies the two frictions: 0.75 * 0.8 on the table is MuJoCo's 0.6.
            client.changeDynamics(body, -1, lateralFriction=0.75, spinningFriction=0.002)
            client.setCollisionFilterGroupMask(body, -1, 2, 1 | 2 | 4)
            return body
        if shape == "disc":
            look = client.createVisualShape(pybullet.GEOM_CYLINDER, radius=size, length=0.002)
            return client.createMultiBody(0.0, -1, look, basePosition=place)
        return self._load_ball(size, place)

    def _load_ball(self, radius: float, place: tuple[float, float, float]) -> int:
        client = self._client
        look = client.createVisualShape(pybullet.GEOM_SPHERE, radius=radius)
        stand = client.createVisualShape(
            pybullet.GEOM_CYLINDER,
            radius=engine.STAND_RADIUS,
            length=engine.STAND_LENGTH,
            rgbaColor=(*engine.STAND_COLOUR, 1.0),
        )
        upright = (0.0, 0.0, 0.0, 1.0)
        return client.createMultiBody(
            0.0,
            -1,
            look,
            basePosition=place,
            linkMasses=[0.0],
            linkCollisionShapeIndices=[-1],
            linkVisualShapeIndices=[stand],
            linkPositions=[(0.0, 0.0, -engine.STAND_LENGTH / 2)],
            linkOrientations=[upright],
            linkInertialFramePositions=[(0.0, 0.0, 0.0)],
            linkInertialFrameOrientations=[upright],
            linkParentIndices=[0],
            linkJointTypes=[pybullet.JOINT_FIXED],
            linkJointAxis=[(0.0, 0.0, 1.0)],
        )

    def reset(self, scene: Scene, joints: np.ndarray) -> None:
        """See ``ArmEngine``. Starts from the state after loading, so nothing of the last episode is left in Bullet."""
        client = self._client
        self._forget_contacts()
        client.restoreState(self._pristine)
        for joint, angle in zip(self._arm, joints.tolist(), strict=True):
            client.resetJointState(self._robot, joint, angle)
        for finger in self._fingers:
            client.resetJointState(self._robot, finger, scene.opening / 2)
        for item, body in zip(scene.items, self._items, strict=True):
            turn = (0.0, 0.0, math.sin(item.yaw / 2), math.cos(item.yaw / 2))
            client.resetBasePositionAndOrientation(body, item.xyz, turn)
            client.resetBaseVelocity(body, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
            client.changeVisualShape(body, -1, rgbaColor=(*COLOURS[item.colour], 1.0))

    def _forget_contacts(self) -> None:
        """Step once with the cubes out of reach: Bullet's contacts outlive the restoring of a state without them."""
        self._client.restoreState(self._pristine)
        self._client.stepSimulation()

    def advance(self, joints: np.ndarray, opening: float) -> None:
        """See ``ArmEngine``."""
        client = self._client
        client.setJointMotorControlArray(
            self._robot,
            self._arm,
            pybullet.POSITION_CONTROL,
            targetPositions=joints.tolist(),
            positionGains=[_ARM_GAIN] * 7,
            velocityGains=[1.0] * 7,
            forces=engine.JOINT_EFFORT,
        )
        for finger in self._fingers:
            client.setJointMotorControl2(
                self._robot,
                finger,
                pybullet.POSITION_CONTROL,
                targetPosition=opening / 2,
                positionGain=_FINGER_GAIN,
                velocityGain=1.0,
                force=engine.FINGER_EFFORT,
                maxVelocity=_FINGER_SPEED,
            )
        for _ in range(_SUBSTEPS):
            client.stepSimulation()

    def state(self) -> WorldState:
        """See ``ArmEngine``."""
        client = self._client
        tool = client.getLinkState(self._robot, self._tool, computeLinkVelocity=1, computeForwardKinematics=1)
        fingers = client.getJointStates(self._robot, self._fingers)
        item_xyz = np.zeros((len(self._items), 3))
        item_velocity = np.zeros((len(self._items), 3))
        for i, body in enumerate(self._items):
            item_xyz[i] = client.getBasePositionAndOrientation(body)[0]
            item_velocity[i] = client.getBaseVelocity(body)[0]
        return WorldState(
            ee_xyz=np.array(tool[4]),
            ee_velocity=np.array(tool[6]),
            opening=fingers[0][0] + fingers[1][0],
            item_xyz=item_xyz,
            item_velocity=item_velocity,
        )

    def render(self, camera: str) -> np.ndarray:
        """See ``ArmEngine``."""
        client, view = self._client, engine.CAMERAS[camera]
        position, target, up = (np.array(v) for v in (view.position, view.target, view.up))
        if view.link:
            link = client.getLinkState(self._robot, self._links[view.link], computeForwardKinematics=1)
            turn = np.array(client.getMatrixFromQuaternion(link[5])).reshape(3, 3)
            position, target, up = turn @ position + link[4], turn @ target + link[4], turn @ up
        picture = client.getCameraImage(
            self._size,
            self._size,
            client.computeViewMatrix(position.tolist(), target.tolist(), up.tolist()),
            client.computeProjectionMatrixFOV(view.fovy, 1.0, _NEAR, _FAR),
            lightDirection=(0.5, -0.7, 1.4),
            lightColor=(1.0, 1.0, 1.0),
            lightAmbientCoeff=0.5,
            lightDiffuseCoeff=0.38,
            lightSpecularCoeff=0.05,
            shadow=int(self._pretty),
            renderer=pybullet.ER_TINY_RENDERER,
            flags=pybullet.ER_NO_SEGMENTATION_MASK,
        )[2]
        return np.ascontiguousarray(np.asarray(picture, np.uint8).reshape(self._size, self._size, 4)[:, :, :3])

    def snapshot(self) -> BulletSnapshot:
        """See ``ArmEngine``."""
        return BulletSnapshot(self._client)

    def restore(self, snapshot: BulletSnapshot) -> None:
        """See ``ArmEngine``.

        Raises:
            ValueError: if another engine took the snapshot: Bullet's states cannot leave its memory.
        """
        if snapshot.client is not self._client:
            raise ValueError("a Bullet snapshot can only be restored in the environment that took it")
        self._forget_contacts()
        self._client.restoreState(snapshot.state)

    def close(self) -> None:
        """See ``ArmEngine``."""
        if self._client.isConnected():
            self._client.disconnect()
