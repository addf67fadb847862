"""The Panda's URDF, a table and a task's items as one MuJoCo model."""

from __future__ import annotations

import re

import mujoco
import numpy as np

from emu_embodied.envs import engine
from emu_embodied.envs.kinematics import panda_folder
from emu_embodied.envs.tasks import COLOURS, Task

TIMESTEP = 0.005
"""[s] ten physics steps are one env step."""
_TABLE, _CUBE, _EFFECTOR = 1, 2, 4
"""Collision bits."""


def build_model(task: Task, *, image_size: int, pretty: bool) -> mujoco.MjModel:
    """Compile the world of a task.

    Args:
        task: gives the items; where they are and their colours come with every episode.
        image_size: edge of the largest picture that will be drawn [px].
        pretty: fine meshes, shadows and antialiasing, for pictures that people look at.
    """
    folder = panda_folder()
    urdf = (folder / "panda.urdf").read_text().replace("package://", "")
    # The URDF's loader knows meshes by the path written in it, so they are handed over under those names.
    names = set(re.findall(r'mesh filename="([^"]+)"', urdf))
    meshes = {name: _one_part((folder / name).read_bytes()) for name in names if pretty or "/collision/" in name}
    spec = mujoco.MjSpec.from_string(urdf, assets=meshes)
    spec.compiler.fusestatic = False
    spec.compiler.discardvisual = False  # here "visual" is all that does not collide, most of the arm included
    spec.compiler.degree = False
    spec.option.timestep = TIMESTEP
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.jacobian = mujoco.mjtJacobian.mjJAC_SPARSE  # a quarter faster here
    _dress_arm(spec)
    if pretty:
        _add_fine_meshes(spec, names)
    _add_table(spec)
    for name, shape, size in task.slots:
        _add_item(spec, name, shape, size)
    _add_cameras_and_lights(spec, image_size=image_size, pretty=pretty)
    return spec.compile()


def _one_part(obj: bytes) -> bytes:
    """An OBJ file without its division into parts, of which MuJoCo would load the first."""
    return re.sub(rb"(?m)^(o|g|s|usemtl|mtllib) .*$", b"", obj)


def _dress_arm(spec: mujoco.MjSpec) -> None:
    for body in spec.bodies:
        if not body.name.startswith("panda_"):
            continue
        body.gravcomp = 1.0
        for geom in body.geoms:
            geom.rgba = (*engine.LINK_COLOURS[body.name], 1.0)
            geom.contype = geom.conaffinity = 0
            geom.group = 0
            if body.name == "panda_hand":
                geom.contype, geom.conaffinity = _EFFECTOR, _CUBE
    for name in ("panda_leftfinger", "panda_rightfinger"):
        # A box instead of the finger's convex mesh: flat against flat gives the contact points that a firm grasp needs.
        sign = 1.0 if name == "panda_leftfinger" else -1.0
        spec.body(name).add_geom(
            name=f"{name}_pad",
            type=mujoco.mjtGeom.mjGEOM_BOX,
            pos=(0.0, 0.0072 * sign, 0.033),
            size=(0.0095, 0.0072, 0.0208),
            group=3,
            contype=_EFFECTOR,
            conaffinity=_CUBE,
            condim=4,
            friction=(1.2, 0.02, 0.0001),
            mass=0.0,
        )
    arm = [f"panda_joint{i}" for i in range(1, 8)]
    gains = zip(arm, engine.JOINT_STIFFNESS, engine.JOINT_DAMPING, engine.JOINT_EFFORT, strict=True)
    for name, stiffness, damping, effort in gains:
        _add_servo(spec, name, stiffness, damping, effort)
    for name in ("panda_finger_joint1", "panda_finger_joint2"):
        _add_servo(spec, name, engine.FINGER_STIFFNESS, engine.FINGER_DAMPING, engine.FINGER_EFFORT)
    spec.body("panda_hand").add_site(name="tool", pos=(0.0, 0.0, 0.105), group=4)


def _add_fine_meshes(spec: mujoco.MjSpec, names: set[str]) -> None:
    """Show the URDF's visual meshes (a hundred times the faces) instead of those that collide; no mass, no contacts."""
    for body in spec.bodies:
        for coarse in [geom for geom in body.geoms if geom.meshname]:
            file = f"meshes/visual/{coarse.meshname}.obj"
            if file not in names:
                continue
            fine = f"fine_{coarse.meshname}"
            if all(mesh.name != fine for mesh in spec.meshes):
                spec.add_mesh(name=fine, file=file)
            body.add_geom(
                type=mujoco.mjtGeom.mjGEOM_MESH,
                meshname=fine,
                pos=coarse.pos,
                quat=coarse.quat,
                rgba=coarse.rgba,
                contype=0,
                conaffinity=0,
                mass=0.0,
            )
            coarse.group = 3


def _add_servo(spec: mujoco.MjSpec, joint: str, stiffness: float, damping: float, effort: float) -> None:
    servo = spec.add_actuator(name=f"servo_{joint}", target=joint, trntype=mujoco.mjtTrn.mjTRN_JOINT)
    servo.gaintype = mujoco.mjtGain.mjGAIN_FIXED
    servo.biastype = mujoco.mjtBias.mjBIAS_AFFINE
    servo.gainprm[0] = stiffness
    servo.biasprm[1] = -stiffness
    servo.biasprm[2] = -damping
    servo.forcerange = (-effort, effort)
    servo.forcelimited = True


def _add_table(spec: mujoco.MjSpec) -> None:
    x, y, z = engine.TABLE_HALF
    spec.worldbody.add_geom(
        name="table",
        type=mujoco.mjtGeom.mjGEOM_BOX,
        pos=(0.4, 0.0, -z),
        size=(x, y, z),
        rgba=(*engine.TABLE_COLOUR, 1.0),
        contype=_TABLE,
        conaffinity=_CUBE,
        friction=(0.6, 0.005, 0.0001),
    )


def _add_item(spec: mujoco.MjSpec, name: str, shape: str, size: float) -> None:
    if shape == "cube":
        body = spec.worldbody.add_body(name=name, pos=(0.5, 0.0, size))
        body.add_freejoint(name=name)
        body.add_geom(
            name=name,
            type=mujoco.mjtGeom.mjGEOM_BOX,
            size=(size, size, size),
            density=engine.CUBE_DENSITY,
            contype=_CUBE,
            conaffinity=_CUBE | _TABLE | _EFFECTOR,
            friction=(0.6, 0.005, 0.0001),
        )
        return
    body = spec.worldbody.add_body(name=name, mocap=True)
    flat = shape == "disc"
    body.add_geom(
        name=name,
        type=mujoco.mjtGeom.mjGEOM_CYLINDER if flat else mujoco.mjtGeom.mjGEOM_SPHERE,
        size=(size, 0.001, 0.0) if flat else (size, 0.0, 0.0),
        rgba=(*COLOURS["violet"], 1.0),
        contype=0,
        conaffinity=0,
    )
    if shape == "ball":
        half = engine.STAND_LENGTH / 2
        body.add_geom(
            name=f"{name}_stand",
            type=mujoco.mjtGeom.mjGEOM_CYLINDER,
            pos=(0.0, 0.0, -half),
            size=(engine.STAND_RADIUS, half, 0.0),
            rgba=(*engine.STAND_COLOUR, 1.0),
            contype=0,
            conaffinity=0,
        )


def _add_cameras_and_lights(spec: mujoco.MjSpec, *, image_size: int, pretty: bool) -> None:
    for name, camera in engine.CAMERAS.items():
        body = spec.body(camera.link) if camera.link else spec.worldbody
        body.add_camera(name=name, pos=camera.position, quat=_look_at(camera), fovy=camera.fovy)
    spec.visual.global_.offwidth = spec.visual.global_.offheight = image_size
    spec.visual.map.znear = 0.004  # times the model's extent: the wrist camera is close to the hand
    spec.visual.quality.offsamples = 4 if pretty else 0
    spec.visual.quality.shadowsize = 4096 if pretty else 1024
    shade = 0.5 if pretty else 0.35  # brighter where shadows darken the picture
    spec.visual.headlight.ambient = (shade, shade, shade)
    spec.visual.headlight.diffuse = (0.25, 0.25, 0.25)
    spec.visual.headlight.specular = (0.1, 0.1, 0.1)
    if pretty:
        sky = mujoco.mjtTexture.mjTEXTURE_SKYBOX, mujoco.mjtBuiltin.mjBUILTIN_GRADIENT
        spec.add_texture(
            name="sky",
            type=sky[0],
            builtin=sky[1],
            rgb1=(0.93, 0.95, 0.97),
            rgb2=(0.62, 0.70, 0.80),
            width=256,
            height=256,
        )
    strength = 0.4 if pretty else 0.55
    spec.worldbody.add_light(
        pos=(1.3, -0.9, 1.8) if pretty else (0.9, -0.8, 1.8),
        dir=(-0.9, 0.85, -1.75) if pretty else (-0.35, 0.5, -1.0),
        diffuse=(strength, strength, strength),
        specular=(0.2, 0.2, 0.2),
        cutoff=40.0 if pretty else 45.0,
        castshadow=pretty,
    )


def _look_at(camera: engine.Camera) -> np.ndarray:
    """Quaternion (w, x, y, z) of a camera that looks along its -z with +y up."""
    back = np.subtract(camera.position, camera.target)
    back /= np.linalg.norm(back)
    right = np.cross(camera.up, back)
    right /= np.linalg.norm(right)
    quaternion = np.empty(4)
    mujoco.mju_mat2Quat(quaternion, np.stack([right, np.cross(back, right), back], axis=1).ravel())
    return quaternion
