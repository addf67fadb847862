"""The Panda in MuJoCo."""

from __future__ import annotations

import atexit
import math
import weakref
from typing import Any

import mujoco
import numpy as np

from emu_embodied.envs.engine import CONTROL_DT
from emu_embodied.envs.mujoco.gl import GL_HELP
from emu_embodied.envs.mujoco.model import TIMESTEP, build_model
from emu_embodied.envs.tasks import COLOURS, Scene, Task, WorldState

_SUBSTEPS = round(CONTROL_DT / TIMESTEP)
_STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)


class MujocoEngine:
    """``ArmEngine`` in MuJoCo.

    Every picture and state is a function of the integration state alone: kinematics are recomputed from it after each
    env step and each restore, so restoring is exact to the last byte.
    """

    def __init__(self, task: Task, *, image_size: int = 64, pretty: bool = False) -> None:
        self._model = build_model(task, image_size=image_size, pretty=pretty)
        self._data = mujoco.MjData(self._model)
        self._size = image_size
        self._pretty = pretty
        self._renderer: Any = None
        model = self._model
        self._tool = model.site("tool").id
        self._arm = [model.joint(f"panda_joint{i}").qposadr[0] for i in range(1, 8)]
        self._fingers = [model.joint(f"panda_finger_joint{i}").qposadr[0] for i in (1, 2)]
        self._body = [model.body(name).id for name, _, _ in task.slots]
        self._geom = [model.geom(name).id for name, _, _ in task.slots]
        # Address in qpos and qvel of what moves; mocap index of what does not.
        self._free = [
            (model.joint(n).qposadr[0], model.joint(n).dofadr[0]) if s == "cube" else None for n, s, _ in task.slots
        ]
        self._mocap = [int(model.body_mocapid[body]) for body in self._body]
        # Views of MuJoCo's arrays: looking them up by name costs as much as reading them.
        self._site_xpos, self._xpos = self._data.site_xpos[self._tool], self._data.xpos
        self._qpos, self._qvel, self._ctrl = self._data.qpos, self._data.qvel, self._data.ctrl
        self._velocity = np.zeros(6)

    def reset(self, scene: Scene, joints: np.ndarray) -> None:
        """See ``ArmEngine``."""
        data = self._data
        mujoco.mj_resetData(self._model, data)
        data.qpos[self._arm] = joints
        data.qpos[self._fingers] = scene.opening / 2
        data.ctrl[:7] = joints
        data.ctrl[7:] = scene.opening / 2
        for item, geom, free, mocap in zip(scene.items, self._geom, self._free, self._mocap, strict=True):
            if free is not None:
                data.qpos[free[0] : free[0] + 7] = (*item.xyz, math.cos(item.yaw / 2), 0.0, 0.0, math.sin(item.yaw / 2))
            else:
                data.mocap_pos[mocap] = item.xyz
            self._model.geom_rgba[geom, :3] = COLOURS[item.colour]
        self._refresh()

    def advance(self, joints: np.ndarray, opening: float) -> None:
        """See ``ArmEngine``."""
        self._ctrl[:7] = joints
        self._ctrl[7:] = opening / 2
        mujoco.mj_step(self._model, self._data, _SUBSTEPS)
        self._refresh()

    def _refresh(self) -> None:
        """Bring poses and velocities up to date with the state, touching nothing that the next step reads."""
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)
        mujoco.mj_comVel(self._model, self._data)

    def state(self) -> WorldState:
        """See ``ArmEngine``."""
        mujoco.mj_objectVelocity(self._model, self._data, mujoco.mjtObj.mjOBJ_SITE, self._tool, self._velocity, 0)
        item_velocity = np.zeros((len(self._body), 3))
        for i, free in enumerate(self._free):
            if free is not None:
                item_velocity[i] = self._qvel[free[1] : free[1] + 3]
        return WorldState(
            ee_xyz=self._site_xpos.copy(),
            ee_velocity=self._velocity[3:].copy(),
            opening=float(self._qpos[self._fingers].sum()),
            item_xyz=self._xpos[self._body],
            item_velocity=item_velocity,
        )

    def render(self, camera: str) -> np.ndarray:
        """See ``ArmEngine``."""
        if self._renderer is None:
            self._renderer = self._make_renderer()
        self._renderer.update_scene(self._data, camera)
        return self._renderer.render()

    def _make_renderer(self) -> mujoco.Renderer:
        try:
            renderer = mujoco.Renderer(self._model, self._size, self._size)
        except Exception as error:  # GL libraries raise types of their own
            raise RuntimeError(f"MuJoCo could not open an off-screen renderer ({error}): {GL_HELP}") from error
        # Handlers run last in, first out: registered after MuJoCo's, this one still finds the GL library initialised.
        atexit.register(_close, weakref.ref(renderer))
        flags = renderer.scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = self._pretty
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = self._pretty
        flags[mujoco.mjtRndFlag.mjRND_SKYBOX] = self._pretty
        flags[mujoco.mjtRndFlag.mjRND_HAZE] = False
        return renderer

    def snapshot(self) -> np.ndarray:
        """See ``ArmEngine``: MuJoCo's integration state, float64."""
        state = np.empty(mujoco.mj_stateSize(self._model, _STATE))
        mujoco.mj_getState(self._model, self._data, state, _STATE)
        return state

    def restore(self, snapshot: np.ndarray) -> None:
        """See ``ArmEngine``."""
        mujoco.mj_setState(self._model, self._data, snapshot, _STATE)
        self._refresh()

    def close(self) -> None:
        """See ``ArmEngine``."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def _close(reference: weakref.ref[mujoco.Renderer]) -> None:
    renderer = reference()
    if renderer is not None:
        renderer.close()
