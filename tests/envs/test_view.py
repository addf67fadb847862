"""What worlds in MuJoCo share: their Python state and their light copies."""

from typing import Any

import numpy as np
import pytest

from emu_embodied.envs.mujoco.view import _shrink_textures, light_copy, plain_state, set_plain_state

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


def test_decimating_keeps_the_places_of_a_texture() -> None:
    """Faces of a simpler mesh take their colours from where the surface was; nothing is taken from across a seam."""
    pytest.importorskip("fast_simplification", reason="decimation comes with the extra suites")
    side = np.linspace(0, 1, 40)
    grid = np.array([[x, y, 0.2 * np.sin(6 * x)] for y in side for x in side])
    # The sheet's two halves lie at the texture's two ends.
    places = np.stack([0.4 * grid[:, 0] + 0.6 * (grid[:, 0] > 0.5), grid[:, 1]], 1)
    at = np.arange(40 * 40).reshape(40, 40)
    quads = np.stack([at[:-1, :-1], at[:-1, 1:], at[1:, 1:], at[1:, :-1]], -1).reshape(-1, 4)
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])

    def text(numbers: np.ndarray) -> str:
        return " ".join(f"{number:.5f}" for number in numbers.ravel())

    model = mujoco.MjModel.from_xml_string(
        f'<mujoco><asset><mesh name="m" inertia="shell" vertex="{text(grid)}" texcoord="{text(places)}" '
        f'face="{" ".join(map(str, faces.ravel()))}"/></asset>'
        '<worldbody><geom type="mesh" mesh="m"/></worldbody></mujoco>'
    )
    light = light_copy(model, 100)
    count = int(light.mesh_facenum[0])
    assert 20 < count <= 120
    points = light.mesh_vert[light.mesh_face[:count]]
    found = light.mesh_texcoord[light.mesh_facetexcoord[:count]]
    assert light.mesh_facetexcoord[:count].max() < light.mesh_texcoordnum[0]
    span = found.max(1) - found.min(1)
    assert span.max() < 0.35, "no face reaches from one end of the texture to the other"
    middle = points.mean(1) - points.reshape(-1, 3).min(0)
    whole = np.ptp(points.reshape(-1, 3), axis=0)
    along = middle[:, 1] / whole[1]
    v = found.mean(1)[:, 1]
    assert min(np.abs(along - v).mean(), np.abs(along - (1 - v)).mean()) < 0.1


def test_shrinking_textures_keeps_their_looks() -> None:
    model = mujoco.MjModel.from_xml_string(
        '<mujoco><asset><texture name="t" type="2d" builtin="checker" rgb1="1 0 0" rgb2="0 0 1" width="64" '
        'height="32"/>'
        '<texture name="s" type="skybox" builtin="gradient" rgb1="0 1 0" rgb2="0 1 0" width="16" height="96"/></asset>'
        '<worldbody><geom size="1"/></worldbody></mujoco>'
    )
    before = model.tex_data.copy()
    _shrink_textures(model, 16)
    assert model.tex_width.tolist() == [16, 16] and model.tex_height.tolist() == [8, 96]
    texels = model.tex_data[: 16 * 8 * 3].reshape(8, 16, 3)
    assert set(map(tuple, texels.reshape(-1, 3).tolist())) == {(255, 0, 0), (0, 0, 255)}
    assert (texels[0, 0] != texels[0, -1]).any()
    start = int(model.tex_adr[1])
    assert np.array_equal(model.tex_data[start:], before[start:])
