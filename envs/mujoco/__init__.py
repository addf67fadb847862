"""The worlds in MuJoCo: the Panda's URDF compiled through MjSpec, and one renderer per environment."""

import importlib

from emu_embodied.envs.mujoco.gl import GL_HELP, choose_gl

# MuJoCo reads MUJOCO_GL once, when it is imported.
_backend = choose_gl()
try:
    importlib.import_module("mujoco")
except ModuleNotFoundError:
    raise
except Exception as error:  # PyOpenGL raises types of its own
    raise RuntimeError(f"MuJoCo could not be imported with MUJOCO_GL={_backend} ({error}): {GL_HELP}") from error
