"""The worlds in MuJoCo: the Panda's URDF compiled through MjSpec, and one renderer per environment."""

from emu_embodied.envs.mujoco.gl import choose_gl

# MuJoCo reads MUJOCO_GL once, when it is imported.
choose_gl()
