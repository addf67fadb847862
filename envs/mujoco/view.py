"""Quick pictures of any MuJoCo model, and its complete state as an array.

Software OpenGL pays for shadows, antialiasing and faces, hardly for pixels. So the renderer gets a copy of the model
with decimated visual meshes, while physics and the scene (poses, colours, sizes) come from the original, which is never
touched.
"""

from __future__ import annotations

import atexit
import copy
import weakref
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

from emu_embodied.envs.mujoco.gl import GL_HELP
from emu_embodied.require import require

STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)
"""What the next step depends on: positions, velocities, controls, mocap bodies, warm start ..."""


@dataclass(frozen=True, slots=True)
class Orbit:
    """A camera that looks at a point from a distance."""

    target: tuple[float, float, float]
    """[m] the point in the middle of the picture."""
    distance: float
    """[m]"""
    azimuth: float
    """[degrees]"""
    elevation: float
    """[degrees]"""


def save_state(model: Any, data: Any) -> np.ndarray:
    """MuJoCo's integration state, float64."""
    state = np.empty(mujoco.mj_stateSize(model, STATE))
    mujoco.mj_getState(model, data, state, STATE)
    return state


def load_state(model: Any, data: Any, state: np.ndarray) -> None:
    """Return to a state; poses and all else that is derived from it are brought up to date."""
    mujoco.mj_setState(model, data, state, STATE)
    mujoco.mj_forward(model, data)
    # Bringing things up to date moved the solver's warm start.
    mujoco.mj_setState(model, data, state, STATE)


def plain_state(owner: Any) -> dict[str, Any]:
    """An object's attributes that are numbers, texts and arrays of its own, copied.

    Arrays that are windows into the simulator's memory are left out: they follow the simulator by themselves.
    """
    return {name: _copied(value) for name, value in vars(owner).items() if _is_plain(value)}


def set_plain_state(owner: Any, saved: dict[str, Any]) -> None:
    """Set what ``plain_state`` saved."""
    for name, value in saved.items():
        setattr(owner, name, _copied(value))


def _is_plain(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        while isinstance(value.base, np.ndarray):
            value = value.base
        return value.base is None and value.dtype != object
    if isinstance(value, tuple | list):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str | np.generic)


def _copied(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    return [_copied(each) for each in value] if isinstance(value, list) else value


class View:
    """Draws a model's states.

    Args:
        model: the model that physics runs on.
        size: edge of the pictures [px].
        cameras: name -> where from, or the name of one of the model's own cameras.
        faces: most faces of a visual mesh; those with more are decimated.
        hidden_groups: groups of geoms and sites that are not drawn.
        hidden_sites: groups of sites that are not drawn, where they are others than those of geoms.
        texture: longest edge of a texture in the renderer's copy [texels]; None for all of them as they are.
    """

    def __init__(
        self,
        model: Any,
        *,
        size: int,
        cameras: dict[str, Orbit | str],
        faces: int = 400,
        hidden_groups: tuple[int, ...] = (3, 4, 5),
        hidden_sites: tuple[int, ...] | None = None,
        texture: int | None = None,
    ) -> None:
        self._model, self._size, self._faces, self._texture = model, size, faces, texture
        self._renderer: Any = None
        self._cameras = {name: _camera(model, camera) for name, camera in cameras.items()}
        self._option = mujoco.MjvOption()
        for group in hidden_groups:
            self._option.geomgroup[group] = 0
        for group in hidden_groups if hidden_sites is None else hidden_sites:
            self._option.sitegroup[group] = 0

    def draw(self, data: Any, camera: str) -> np.ndarray:
        """uint8 [size, size, 3]; poses in ``data`` must be up to date."""
        if self._renderer is None:
            self._renderer = self._open()
        scene = self._renderer.scene
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, data, self._option, None, self._cameras[camera], everything, scene)
        return self._renderer.render()

    def close(self) -> None:
        """Free the renderer."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _open(self) -> Any:
        model = light_copy(self._model, self._faces)
        if self._texture is not None:
            _shrink_textures(model, self._texture)
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 16
        model.vis.global_.offwidth = model.vis.global_.offheight = self._size
        try:
            renderer = mujoco.Renderer(model, self._size, self._size)
        except Exception as error:  # GL libraries raise types of their own
            raise RuntimeError(f"MuJoCo could not open an off-screen renderer ({error}): {GL_HELP}") from error
        # Handlers run last in, first out: registered after MuJoCo's, this one still finds the GL library initialised.
        atexit.register(_close, weakref.ref(renderer))
        for flag in ("SHADOW", "REFLECTION", "HAZE"):
            renderer.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = False
        return renderer


def light_copy(model: Any, faces: int) -> Any:
    """A copy whose meshes have at most ``faces`` faces, with the original's array sizes: fit for drawing only."""
    light = copy.deepcopy(model)
    for mesh in np.flatnonzero(light.mesh_facenum > faces):
        _decimate(light, int(mesh), faces)
    return light


def _decimate(model: Any, mesh: int, faces: int) -> None:
    """Write a simpler mesh into the places of a mesh."""
    vert, face, normal = int(model.mesh_vertadr[mesh]), int(model.mesh_faceadr[mesh]), int(model.mesh_normaladr[mesh])
    points = model.mesh_vert[vert : vert + model.mesh_vertnum[mesh]]
    corners = model.mesh_face[face : face + model.mesh_facenum[mesh]]
    before, places = points.copy(), _texture_places(model, mesh)
    # Files repeat a point for each of its faces' normals; such seams would open into holes.
    points, corners = _merged(points, corners, 1e-5)
    for grain in (0.0, 0.03, 0.05, 0.08, 0.12):
        # Loose shells (screws, threads) cannot be collapsed edge by edge; on a coarser grid they fall together.
        points, corners = _merged(points, corners, grain) if grain else (points, corners)
        points, corners = _simplified(points, corners, faces)
        if len(corners) <= 1.2 * faces:
            break
    normals, which = _normals(points, corners)
    if len(points) > model.mesh_vertnum[mesh] or len(normals) > model.mesh_normalnum[mesh]:
        return
    count = len(corners)
    if places is not None:
        if 3 * count > model.mesh_texcoordnum[mesh]:
            return
        start = int(model.mesh_texcoordadr[mesh])
        model.mesh_texcoord[start : start + 3 * count] = _carried(before, places, points, corners)
        model.mesh_facetexcoord[face : face + count] = np.arange(3 * count).reshape(-1, 3)
        model.mesh_texcoordnum[mesh] = 3 * count
    model.mesh_vert[vert : vert + len(points)] = points
    model.mesh_face[face : face + count] = corners
    model.mesh_normal[normal : normal + len(normals)] = normals
    model.mesh_facenormal[face : face + count] = which
    model.mesh_vertnum[mesh], model.mesh_facenum[mesh], model.mesh_normalnum[mesh] = len(points), count, len(normals)
    model.mesh_graphadr[mesh] = -1  # the convex hull names vertices that are no more


def _texture_places(model: Any, mesh: int) -> np.ndarray | None:
    """Where on its texture each point of a mesh lies, [N, 2]; None for a mesh without."""
    start, face, count = int(model.mesh_texcoordadr[mesh]), int(model.mesh_faceadr[mesh]), int(model.mesh_facenum[mesh])
    if start < 0:
        return None
    places = np.zeros((int(model.mesh_vertnum[mesh]), 2))
    corners = model.mesh_face[face : face + count].ravel()
    places[corners] = model.mesh_texcoord[start + model.mesh_facetexcoord[face : face + count].ravel()]
    return places


def _carried(before: np.ndarray, places: np.ndarray, points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Places on the texture of the corners of simplified faces, [3 F, 2]: those of the nearest points of old.

    Where a corner's place is far from that of its face's middle, a seam of the texture lies between, and the face takes
    one colour.
    """
    middles = places[_nearest(before, points[corners].mean(1))][:, None]
    found = places[_nearest(before, points)][corners]
    seam = np.abs(found - middles).max(-1, keepdims=True) > 0.1
    return np.where(seam, middles, found).reshape(-1, 2)


def _nearest(points: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The index of the nearest point for each that is asked for."""
    points, asked = np.asarray(points, np.float32), np.asarray(asked, np.float32)
    squares = (points**2).sum(1)
    chunks = np.array_split(asked, 1 + len(asked) * len(points) // 10**6)  # of a size that stays in the caches
    return np.concatenate([(squares - 2 * chunk @ points.T).argmin(1) for chunk in chunks])


def _shrink_textures(model: Any, most: int) -> None:
    """Average textures down, in their places, until no edge of theirs (of one side of a cube) is longer than asked."""
    for texture in range(model.ntex):
        width, height = int(model.tex_width[texture]), int(model.tex_height[texture])
        depth = int(model.tex_nchannel[texture])
        factor = 1
        while width // factor > most and width % (2 * factor) == 0 and height % (2 * factor) == 0:
            factor *= 2
        start = int(model.tex_adr[texture])
        texels = model.tex_data[start : start + width * height * depth].reshape(
            height // factor, factor, width // factor, factor, depth
        )
        step = max(factor // 2, 1)  # four texels stand for all
        small = np.round(texels[:, ::step, :, ::step].mean((1, 3))).astype(np.uint8)
        model.tex_data[start : start + small.size] = small.ravel()
        model.tex_width[texture], model.tex_height[texture] = width // factor, height // factor


def _simplified(points: np.ndarray, corners: np.ndarray, faces: int) -> tuple[np.ndarray, np.ndarray]:
    if len(corners) <= faces:
        return points, corners
    simplify = require("fast_simplification", extra="suites").simplify
    return simplify(points.astype(np.float32), np.ascontiguousarray(corners, np.int32), target_count=faces)


def _merged(points: np.ndarray, corners: np.ndarray, grain: float) -> tuple[np.ndarray, np.ndarray]:
    """Points that share a cell of a grid become one; ``grain`` is the cell's share of the largest extent."""
    cell = float(np.ptp(points, axis=0).max()) * grain
    _, first, which = np.unique(np.round(points / cell), axis=0, return_index=True, return_inverse=True)
    corners = which.reshape(-1)[corners]
    flat = (corners == np.roll(corners, 1, axis=1)).any(1)
    corners = corners[~flat]
    _, once = np.unique(np.sort(corners, axis=1), axis=0, return_index=True)
    return points[first], corners[once]


def _normals(points: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A normal for every corner: smooth across flat edges, sharp across steep ones. Returns them and indices."""
    a, b, c = (points[corners[:, i]] for i in range(3))
    area = np.cross(b - a, c - a)
    flat = area / np.maximum(np.linalg.norm(area, axis=1, keepdims=True), 1e-12)
    smooth = np.zeros_like(points)
    for i in range(3):
        np.add.at(smooth, corners[:, i], area)
    smooth /= np.maximum(np.linalg.norm(smooth, axis=1, keepdims=True), 1e-12)
    at_corner = smooth[corners]
    sharp = (at_corner * flat[:, None]).sum(-1) < 0.75
    at_corner[sharp] = np.broadcast_to(flat[:, None], at_corner.shape)[sharp]
    normals, which = np.unique(np.round(at_corner.reshape(-1, 3), 2), axis=0, return_inverse=True)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    return normals, which.reshape(-1, 3)


def _camera(model: Any, camera: Orbit | str) -> Any:
    made = mujoco.MjvCamera()
    if isinstance(camera, str):
        made.type = mujoco.mjtCamera.mjCAMERA_FIXED
        made.fixedcamid = model.camera(camera).id
        return made
    made.type = mujoco.mjtCamera.mjCAMERA_FREE
    made.lookat[:] = camera.target
    made.distance, made.azimuth, made.elevation = camera.distance, camera.azimuth, camera.elevation
    return made


def _close(reference: weakref.ref[mujoco.Renderer]) -> None:
    renderer = reference()
    if renderer is not None:
        renderer.close()
