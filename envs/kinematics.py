"""Forward kinematics and differential inverse kinematics of the Panda, from its URDF and without an engine.

Both engines are driven by joint targets that are computed here, so one action means the same motion in each.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

HOME_Q = np.array([0.0, 0.1, 0.0, -2.2, 0.0, 2.3, np.pi / 4])
"""[rad] elbow up, tool over the table and pointing down: the posture that the redundant joint is drawn towards."""

_DAMPING = 0.03
_POSTURE_GAIN = 0.1
_MAX_JOINT_STEP = 0.25
"""[rad] per call of ``follow``."""


def panda_folder() -> Path:
    """The folder of ``panda.urdf`` and its meshes inside the installed pybullet wheel.

    Raises:
        FileNotFoundError: if the wheel is not installed.
    """
    # Found without importing pybullet_data, which the MuJoCo worlds do not need.
    spec = importlib.util.find_spec("pybullet_data")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / "franka_panda" / "panda.urdf").exists():
            return Path(folder) / "franka_panda"
    raise FileNotFoundError("the Panda's URDF ships with pybullet, which is not installed: pip install pybullet")


class PandaChain:
    """The seven joints from the base to the point between the fingertips (``panda_grasptarget``)."""

    def __init__(self) -> None:
        root = ElementTree.parse(panda_folder() / "panda.urdf").getroot()
        joints = {_attribute(joint, "child", "link"): joint for joint in root.iter("joint")}
        path = []
        link = "panda_grasptarget"
        while link in joints:
            path.append(joints[link])
            link = _attribute(joints[link], "parent", "link")
        origins, low, high, tool = [], [], [], np.eye(4)
        for joint in reversed(path):
            origin = _transform(joint.find("origin"))
            if joint.get("type") == "revolute":
                origins.append(origin)
                low.append(float(_attribute(joint, "limit", "lower")))
                high.append(float(_attribute(joint, "limit", "upper")))
            else:
                tool = tool @ origin
        self._origins = np.array(origins)
        self._tool = tool
        self.low = np.array(low) + 0.02
        self.high = np.array(high) - 0.02

    def forward(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tool position [m] [3], rotation [3, 3] and geometric Jacobian [6, 7] (linear, then angular) at ``q`` [7]."""
        cos, sin = np.cos(q)[:, None], np.sin(q)[:, None]
        local = self._origins.copy()
        local[:, :, 0] = cos * self._origins[:, :, 0] + sin * self._origins[:, :, 1]
        local[:, :, 1] = cos * self._origins[:, :, 1] - sin * self._origins[:, :, 0]
        frames = np.empty((7, 4, 4))
        pose = frames[0] = local[0]
        for i in range(1, 7):
            pose = frames[i] = pose @ local[i]
        pose = pose @ self._tool
        axes = frames[:, :3, 2]
        lever = pose[:3, 3] - frames[:, :3, 3]
        jacobian = np.empty((6, 7))
        jacobian[0] = axes[:, 1] * lever[:, 2] - axes[:, 2] * lever[:, 1]
        jacobian[1] = axes[:, 2] * lever[:, 0] - axes[:, 0] * lever[:, 2]
        jacobian[2] = axes[:, 0] * lever[:, 1] - axes[:, 1] * lever[:, 0]
        jacobian[3:] = axes.T
        return pose[:3, 3], pose[:3, :3], jacobian

    def follow(self, q: np.ndarray, target_xyz: np.ndarray) -> np.ndarray:
        """One damped least-squares step [7] from ``q`` [7] towards ``target_xyz`` [m].

        The gripper points down and its fingers part along y, so that they are seen from the front.
        The null space is used to stay near ``HOME_Q``, so the elbow does not drift over an episode.
        """
        position, rotation, jacobian = self.forward(q)
        r = rotation
        error = np.array([
            *(target_xyz - position),
            # Half the sum of cross products between the tool's axes and those wanted: world x, -y and -z.
            0.5 * (r[2, 1] - r[1, 2]),
            0.5 * (r[2, 0] + r[0, 2]),
            -0.5 * (r[1, 0] + r[0, 1]),
        ])  # fmt: skip
        posture = _POSTURE_GAIN * (HOME_Q - q)
        gram = jacobian @ jacobian.T
        gram.flat[::7] += _DAMPING**2
        step = jacobian.T @ np.linalg.solve(gram, error - jacobian @ posture) + posture
        step = np.minimum(np.maximum(step, -_MAX_JOINT_STEP), _MAX_JOINT_STEP)  # np.clip takes three times as long
        return np.minimum(np.maximum(q + step, self.low), self.high)

    def solve(self, target_xyz: np.ndarray) -> np.ndarray:
        """Joint angles [7] with the tool at ``target_xyz`` [m], gripper pointing down, searched from ``HOME_Q``."""
        q = HOME_Q
        for _ in range(60):
            q = self.follow(q, target_xyz)
        return q


@cache
def panda_chain() -> PandaChain:
    """The chain, parsed once per process."""
    return PandaChain()


def _attribute(joint: ElementTree.Element, tag: str, name: str) -> str:
    """What the joint's child element ``tag`` says about ``name``."""
    element = joint.find(tag)
    value = None if element is None else element.get(name)
    if value is None:
        raise ValueError(f"the URDF's joint {joint.get('name')!r} has no {name} in its <{tag}>: is it the Panda's?")
    return value


def _transform(origin: ElementTree.Element | None) -> np.ndarray:
    matrix = np.eye(4)
    if origin is None:
        return matrix
    roll, pitch, yaw = (float(v) for v in origin.get("rpy", "0 0 0").split())
    cr, sr, cp, sp, cy, sy = np.cos(roll), np.sin(roll), np.cos(pitch), np.sin(pitch), np.cos(yaw), np.sin(yaw)
    matrix[:3, :3] = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    matrix[:3, 3] = [float(v) for v in origin.get("xyz", "0 0 0").split()]
    return matrix
