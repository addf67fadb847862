"""Off-screen OpenGL: which library MuJoCo is to use, decided before MuJoCo is imported."""

from __future__ import annotations

import ctypes.util
import importlib
import os
import sys

GL_HELP = (
    "no off-screen OpenGL was found: on Debian or Ubuntu run `apt-get install -y libegl1 libgl1` "
    "(or `apt-get install -y libosmesa6` and set MUJOCO_GL=osmesa)"
)


def find_gl() -> str | None:
    """``"egl"`` or ``"osmesa"``, whichever has its libraries, or None."""
    if ctypes.util.find_library("EGL") and (ctypes.util.find_library("GL") or ctypes.util.find_library("OpenGL")):
        return "egl"
    return "osmesa" if ctypes.util.find_library("OSMesa") else None


def choose_gl() -> str | None:
    """Set ``MUJOCO_GL`` where it is unset and there is no display; returns the choice now in force.

    Nothing is raised where no library is found: physics runs without one, and the renderer explains what is missing.
    """
    headless = sys.platform.startswith("linux") and not os.environ.get("DISPLAY")  # elsewhere the system has its own
    if "MUJOCO_GL" not in os.environ and headless:
        found = find_gl()
        # Without a library "disable" lets MuJoCo be imported; its own default would look for a window system.
        os.environ["MUJOCO_GL"] = found or "disable"
        if found == "egl":
            os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
        chooser = sys.modules.get("mujoco.rendering.classic.gl_context")
        if chooser is not None:
            # MuJoCo was imported before and settled on a window system; reloaded, this module looks again.
            importlib.reload(chooser)
    return os.environ.get("MUJOCO_GL")
