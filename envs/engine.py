"""The seam between the environment and a physics engine, and everything about the scene that both engines share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from emu_embodied.envs.tasks import Scene, WorldState

CONTROL_DT = 0.05
"""[s] one env step: 20 Hz."""
MAX_OPENING = 0.08
"""[m] distance between the fingers when open."""
EFFECTOR_LINKS = ("panda_hand", "panda_leftfinger", "panda_rightfinger")
"""The only links that collide with cubes."""

# Alternating light and dark links, an orange hand and dark fingers: the arm's pose is readable at 64 px.
LINK_COLOURS: dict[str, tuple[float, float, float]] = {
    "panda_link0": (0.22, 0.24, 0.28),
    "panda_link1": (0.92, 0.93, 0.95),
    "panda_link2": (0.22, 0.24, 0.28),
    "panda_link3": (0.92, 0.93, 0.95),
    "panda_link4": (0.22, 0.24, 0.28),
    "panda_link5": (0.92, 0.93, 0.95),
    "panda_link6": (0.22, 0.24, 0.28),
    "panda_link7": (0.92, 0.93, 0.95),
    "panda_hand": (1.00, 0.45, 0.05),
    "panda_leftfinger": (0.10, 0.10, 0.12),
    "panda_rightfinger": (0.10, 0.10, 0.12),
}
STAND_LENGTH, STAND_RADIUS, STAND_COLOUR = 0.25, 0.007, (0.25, 0.25, 0.28)
"""[m] a ball hangs on a thin stand that ends inside the table: where it meets the table tells one camera how high the
ball is."""
TABLE_COLOUR = (0.80, 0.78, 0.74)
TABLE_HALF = (1.2, 1.5, 0.02)
"""[m] half extents of the table top."""

JOINT_STIFFNESS = (1200.0, 1200.0, 1000.0, 1000.0, 300.0, 300.0, 200.0)
"""[N m/rad]"""
JOINT_DAMPING = (70.0, 70.0, 60.0, 60.0, 18.0, 18.0, 12.0)
"""[N m s/rad]"""
JOINT_EFFORT = (87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0)
"""[N m], from the URDF's limits."""
FINGER_STIFFNESS = 1500.0
"""[N/m]"""
FINGER_DAMPING = 40.0
"""[N s/m]"""
FINGER_EFFORT = 8.0
"""[N] firm on a 36 g cube, and not so hard that it is squeezed visibly."""
CUBE_DENSITY = 400.0
"""[kg/m^3], like light wood: 86 g for a 6 cm cube."""


@dataclass(frozen=True, slots=True)
class Camera:
    """Where a camera is and where it looks; ``link`` names the link it is fixed to (the world where empty)."""

    position: tuple[float, float, float]
    """[m] in the frame of ``link``."""
    target: tuple[float, float, float]
    """[m] the point in the middle of the picture."""
    up: tuple[float, float, float]
    fovy: float
    """[degrees]"""
    link: str = ""


CAMERAS: dict[str, Camera] = {
    "front": Camera((1.02, 0.0, 0.62), (0.455, 0.0, 0.09), (0.0, 0.0, 1.0), 32.5),
    "wrist": Camera((0.085, 0.0, 0.02), (0.03, 0.0, 0.13), (-1.0, 0.0, 0.0), 75.0, link="panda_hand"),
    "overview": Camera((1.30, -0.85, 0.80), (0.27, 0.0, 0.24), (0.0, 0.0, 1.0), 40.0),
}
"""``front`` and ``wrist`` are the robot's eyes; ``overview`` shows the whole arm to people."""


class ArmEngine(Protocol):
    """A Panda, a table and the items of one task in a physics engine."""

    def reset(self, scene: Scene, joints: np.ndarray) -> None:
        """Place everything at rest: items as in ``scene``, the arm at ``joints`` [rad] [7], fingers at its opening."""
        ...

    def advance(self, joints: np.ndarray, opening: float) -> None:
        """Drive the joints [rad] [7] and the fingers [m] towards targets for one env step."""
        ...

    def state(self) -> WorldState:
        """The current state."""
        ...

    def render(self, camera: str) -> np.ndarray:
        """uint8 [size, size, 3] picture of the current state."""
        ...

    def snapshot(self) -> Any:
        """The complete physics state."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Return to a snapshot of this engine, exactly."""
        ...

    def close(self) -> None:
        """Free the renderer and the physics."""
        ...
