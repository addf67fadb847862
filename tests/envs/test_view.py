"""What worlds in MuJoCo share: their Python state and their light copies."""

from typing import Any

import numpy as np
import pytest

from emu_embodied.envs.mujoco.view import light_copy, plain_state, set_plain_state

import mujoco  # isort: skip (after our package, which settles on an OpenGL library)


def test_windows_into_the_simulator_are_not_saved() -> None:
    memory = bytearray(24)

    class Task:
        pass

    task: Any = Task()
    task.window, task.own = np.frombuffer(memory), np.arange(3.0)
    task.slice, task.flag, task.nested, task.model = task.own[1:], True, [np.ones(2), 3], object()
    saved = plain_state(task)
    assert saved.keys() == {"own", "slice", "flag", "nested"}
    task.own += 1
    task.flag = False
    memory[7] = 1
    set_plain_state(task, saved)
    assert task.own.tolist() == [0, 1, 2] and task.flag
    assert task.window.base is not None and task.window[0] != 0  # still what the simulator says


def test_decimating_keeps_the_shape_and_the_original() -> None:
    pytest.importorskip("fast_simplification", reason="decimation comes with the extra suites")
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    ring = np.array([[np.cos(a) * r, np.sin(a) * r, z] for z, r in ((0, 1), (0.5, 1.2), (1, 1)) for a in angles])
    mesh = " ".join(f"{value:.5f}" for value in ring.ravel())
    model = mujoco.MjModel.from_xml_string(
        f'<mujoco><asset><mesh name="m" vertex="{mesh}"/></asset>'
        '<worldbody><geom type="mesh" mesh="m"/></worldbody></mujoco>'
    )
    before = model.mesh_face.copy(), model.mesh_vert.copy()
    light = light_copy(model, 40)
    assert np.array_equal(model.mesh_face, before[0]) and np.array_equal(model.mesh_vert, before[1])
    assert 10 < light.mesh_facenum[0] <= 48 < model.mesh_facenum[0]
    kept = light.mesh_vert[: light.mesh_vertnum[0]]
    assert np.ptp(kept, axis=0) == pytest.approx(np.ptp(model.mesh_vert, axis=0), rel=0.15)
    assert light.mesh_face[: light.mesh_facenum[0]].max() < len(kept)
