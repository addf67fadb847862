"""OGBench's manipulation tasks (Park et al. 2025): a UR5e with cubes, or with a cube, two buttons, drawer and window.

Reset seeds below ``EVALUATION_SEEDS`` draw one of the suite's five evaluation tasks, as its leaderboard does; all
others (and resets without a seed) draw a scene and one goal at random, as its datasets were made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from ogbench.manipspace.envs.cube_env import CubeEnv
from ogbench.manipspace.envs.scene_env import SceneEnv
from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle

from emu_embodied.envs.mujoco.view import Orbit, View, load_state, save_state
from emu_embodied.envs.suites.closeness import closeness
from emu_embodied.envs.suites.play import Ground, Play
from emu_embodied.records import Field

EVALUATION_SEEDS = 100_000
"""Reset seeds below this draw evaluation tasks."""
_CAMERAS: dict[str, Orbit | str] = {
    "close": Orbit((0.42, 0.0, 0.06), 0.95, 180.0, -45.0),
    "front": Orbit((0.42, 0.0, 0.10), 1.2, 180.0, -25.0),
}
_LIMITS = {"single": 200, "double": 500, "triple": 1000, "quadruple": 1000, "scene": 750}
"""[env steps] the suite's own."""
_IN_DRAWER = -0.3
"""[m] a cube's y beyond which it lies in the closed drawer."""
_SLIDES = {
    "drawer": ("m", -0.17, 0.01),
    "window": ("m", -0.01, 0.21),
    "left_button": ("", 0.0, 1.0),
    "right_button": ("", 0.0, 1.0),
}
"""What else the scene is about: unit and range."""
_OPEN = -0.12
"""[m] drawer positions below this are open enough to put a cube in."""


@dataclass(frozen=True, slots=True)
class _State:
    """All of an episode's state; the last five are the scene's."""

    physics: np.ndarray
    random: dict[str, Any]
    mode: str
    """``task``: everything has a goal; ``data_collection``: one thing has."""
    cube: int
    """Which cube is meant, in data collection."""
    thing: str
    """What is meant, in data collection: ``cube``, ``button``, ``drawer`` or ``window``."""
    buttons: np.ndarray
    wanted_buttons: np.ndarray
    button: int
    drawer: float
    window: float


class OGBench:
    """``World`` of one task.

    Actions: the suite's, moves of the tool relative to where it is (x, y, z; 1 is 5 cm), turn (1 is 0.3 rad) and change
    of the gripper's opening (1 closes). The suite's reward is sparse; ours is closeness of cubes (drawer, window,
    buttons) to their goals, of the tool to what is to be moved next, and success. Goals are shown, half transparent.

    The suite starts an env step from poses that are one physics step (2 ms) old; here they are brought up to date after
    every env step, so that what happens next is a function of MuJoCo's state and snapshots are exact.

    Args:
        task: ``cube-single``, ``cube-double``, ``cube-triple``, ``cube-quadruple`` or ``scene``.
        image_size: edge of the pictures [px].
    """

    proprio_fields = (
        Field("ee_x", "m", 0.2, 0.65),
        Field("ee_y", "m", -0.45, 0.45),
        Field("ee_z", "m", 0.0, 0.45),
        Field("ee_vx", "m/s", -1.0, 1.0),
        Field("ee_vy", "m/s", -1.0, 1.0),
        Field("ee_vz", "m/s", -1.0, 1.0),
        Field("yaw", "rad", -math.pi, math.pi),
        Field("gripper", "", 0.0, 1.0),
    )
    action_dim = 5
    cameras = tuple(_CAMERAS)
    weights = {"goal": 0.6, "near": 0.2, "success": 0.2}  # noqa: RUF012 (never changed)
    control_dt = 0.05

    def __init__(self, task: str, *, image_size: int = 64) -> None:
        kind, _, number = task.partition("-")
        self._scene = kind == "scene"
        self.max_episode_steps = _LIMITS[number or kind]
        self._env: Any = (SceneEnv if self._scene else CubeEnv)(number or kind, terminate_at_goal=False)
        self._size = image_size
        self._env.reset(seed=0, options={"task_id": 1})  # compiles the model
        self.object_fields = tuple(
            Field(f"{thing}{cube}_{axis}", "m", low, high)
            for thing in ("cube", "goal")
            for cube in range(self._env._num_cubes)
            for axis, low, high in (("x", 0.2, 0.65), ("y", -0.5, 0.5), ("z", 0.0, 0.4))
        )
        if self._scene:
            self.object_fields += tuple(Field(f"{kind}{of}", *_SLIDES[of]) for kind in ("", "goal_") for of in _SLIDES)
        self._model, self._data = self._env._model, self._env._data
        self._pinch = self._env._pinch_site_id
        self._view = View(self._model, size=image_size, cameras=_CAMERAS, faces=150)
        self._velocity = np.zeros(6)

    @property
    def instruction(self) -> str:
        """See ``World``."""
        env = self._env
        if env._mode == "task":
            return "bring everything to its goal" if self._scene or env._num_cubes > 1 else "bring the cube to its goal"
        if env._target_task == "button":
            return f"press the {('left', 'right')[int(env._target_button)]} button"
        if env._target_task == "drawer":
            return "open the drawer" if env._target_drawer_pos < -0.08 else "close the drawer"
        if env._target_task == "window":
            return "open the window" if env._target_window_pos > 0.1 else "close the window"
        return "bring the cube to its goal" if env._num_cubes == 1 else "bring the marked cube to its goal"

    def begin(self, seed: int | None, rng: np.random.Generator) -> None:
        """See ``World``."""
        env = self._env
        env._mode = "task" if seed is not None and seed < EVALUATION_SEEDS else "data_collection"
        env.reset(seed=int(rng.integers(2**31)), options={"task_id": int(rng.integers(1, env.num_tasks + 1))})
        # In its evaluation tasks the suite takes two steps with unseeded actions on the way. What they leave behind
        # (controls, warm start, clock) is wiped; poses it has put right itself.
        kept = {name: getattr(self._data, name).copy() for name in ("qpos", "qvel", "mocap_pos", "mocap_quat")}
        mujoco.mj_resetData(self._model, self._data)
        for name, value in kept.items():
            getattr(self._data, name)[:] = value
        self._data.ctrl[env._arm_actuator_ids] = self._data.qpos[env._arm_joint_ids]
        self._renew()

    def advance(self, action: np.ndarray) -> None:
        """See ``World``."""
        self._env.step(action)
        self._renew()

    def terms(self) -> dict[str, float]:
        """See ``World``."""
        gaps = self._gaps()
        _, place = self._next()
        success = self._success()
        return {
            "goal": float(np.mean([closeness(gap) for gap in gaps])),
            "near": 1.0 if success else closeness(float(np.linalg.norm(place - self._tool()))),
            "success": float(success),
        }

    def proprio(self) -> np.ndarray:
        """See ``World``."""
        kind = mujoco.mjtObj.mjOBJ_SITE
        mujoco.mj_objectVelocity(self._model, self._data, kind, self._pinch, self._velocity, 0)
        rotation = self._data.site_xmat[self._pinch]
        yaw = math.atan2(rotation[3], rotation[0])
        opening = self._data.qpos[self._env._gripper_opening_joint_id] / 0.8
        return np.array([*self._tool(), *self._velocity[3:], yaw, opening])

    def objects(self) -> np.ndarray:
        """See ``World``: cubes and their goals; in the scene, also the slides of drawer and window, and the buttons."""
        env, cubes = self._env, range(self._env._num_cubes)
        places = [*(self._cube(cube) for cube in cubes), *(self._goal(cube) for cube in cubes)]
        if self._scene:
            slides = [float(self._data.joint(f"{thing}_slide").qpos[0]) for thing in ("drawer", "window")]
            places.append(np.array([*slides, *env._cur_button_states]))
            places.append(np.array([env._target_drawer_pos, env._target_window_pos, *env._target_button_states]))
        return np.concatenate(places)

    def draw(self, camera: str) -> np.ndarray:
        """See ``World``."""
        return self._view.draw(self._data, camera)

    def save(self) -> _State:
        """See ``World``."""
        env = self._env
        none = np.zeros(0, int)
        return _State(
            physics=save_state(self._model, self._data),
            random=env.np_random.bit_generator.state,
            mode=env._mode,
            cube=int(env._target_block),
            thing=str(env._target_task),
            buttons=env._cur_button_states.copy() if self._scene else none,
            wanted_buttons=env._target_button_states.copy() if self._scene else none,
            button=int(env._target_button) if self._scene else 0,
            drawer=float(env._target_drawer_pos) if self._scene else 0.0,
            window=float(env._target_window_pos) if self._scene else 0.0,
        )

    def load(self, saved: _State) -> None:
        """See ``World``."""
        env = self._env
        env._mode, env._target_block, env._target_task = saved.mode, saved.cube, saved.thing
        env.np_random.bit_generator.state = saved.random
        if self._scene:
            env._cur_button_states = saved.buttons.copy()
            env._target_button_states = saved.wanted_buttons.copy()
            env._target_button, env._target_drawer_pos, env._target_window_pos = (
                saved.button,
                saved.drawer,
                saved.window,
            )
            self._model.site("drawer_handle_center_target").pos[1] = saved.drawer
            self._model.site("window_handle_center_target").pos[0] = saved.window
            env._apply_button_states()  # locks are damping in the model
        load_state(self._model, self._data, saved.physics)
        self._renew(moved=False)

    def solve(self) -> bool:
        """See ``World``: everything is put where it belongs, as the suite makes its own goal pictures."""
        env = self._env
        for cube in range(env._num_cubes):
            if env._mode == "task" or (cube == env._target_block and env._target_task == "cube"):
                joint = self._data.joint(f"object_joint_{cube}")
                joint.qpos[:3] = self._data.mocap_pos[env._cube_target_mocap_ids[cube]]
                joint.qpos[3:] = self._data.mocap_quat[env._cube_target_mocap_ids[cube]]
                joint.qvel[:] = 0.0
        if self._scene:
            if self._is_meant("button"):
                env._cur_button_states = env._target_button_states.copy()
            if self._is_meant("drawer"):
                self._data.joint("drawer_slide").qpos[0] = env._target_drawer_pos
            if self._is_meant("window"):
                self._data.joint("window_slide").qpos[0] = env._target_window_pos
            env._apply_button_states()
        self._renew()
        return True

    def oracle(self, rng: np.random.Generator) -> _Oracle:
        """The suite's Markov oracles, one after another where there are several goals."""
        return _Oracle(self, rng)

    def player(self, rng: np.random.Generator) -> Play:
        """See ``World``."""
        return Play(self._ground, self.action_dim, rng)

    def close(self) -> None:
        """See ``World``."""
        self._view.close()
        self._env.close()

    def aim(self, place: np.ndarray) -> None:
        """Put the (first) cube's goal somewhere else, float64 [3] [m]."""
        self._data.mocap_pos[self._env._cube_target_mocap_ids[0]] = place
        self._renew()

    # What is where

    def _renew(self, *, moved: bool = True) -> None:
        if moved:
            load_state(self._model, self._data, save_state(self._model, self._data))
        mujoco.mj_rnePostConstraint(self._model, self._data)  # oracles feel contact forces
        self._colour()

    def _colour(self) -> None:
        """The suite's colours for reached goals; it sets them only when it steps."""
        env = self._env
        solved = env._compute_successes()
        solved = solved[0] if self._scene else solved
        for cube in range(env._num_cubes):
            colours = env._cube_success_colors if solved[cube] else env._cube_colors
            for geom in env._cube_geom_ids_list[cube]:
                self._model.geom_rgba[geom, :3] = colours[cube, :3]
            shown = env._mode == "task" or (cube == env._target_block and env._target_task == "cube")
            for geom in env._cube_target_geom_ids_list[cube]:
                self._model.geom_rgba[geom] = (*env._cube_colors[cube, :3], 0.35 if shown else 0.0)

    def _tool(self) -> np.ndarray:
        return self._data.site_xpos[self._pinch].copy()

    def _cube(self, cube: int) -> np.ndarray:
        return self._data.joint(f"object_joint_{cube}").qpos[:3].copy()

    def _goal(self, cube: int) -> np.ndarray:
        return self._data.mocap_pos[self._env._cube_target_mocap_ids[cube]].copy()

    def _is_meant(self, thing: str) -> bool:
        return self._env._mode == "task" or self._env._target_task == thing

    def _cubes(self) -> list[int]:
        """The cubes that have a goal."""
        if not self._is_meant("cube"):
            return []
        return list(range(self._env._num_cubes)) if self._env._mode == "task" else [int(self._env._target_block)]

    def _buttons(self) -> list[int]:
        if not self._is_meant("button"):
            return []
        return [0, 1] if self._env._mode == "task" else [int(self._env._target_button)]

    def _gaps(self) -> list[float]:
        """How far everything is from its goal [m]; a button that is wrong counts as 15 cm."""
        env = self._env
        gaps = [float(np.linalg.norm(self._cube(cube) - self._goal(cube))) for cube in self._cubes()]
        if self._scene:
            gaps += [0.15 * float(env._cur_button_states[b] != env._target_button_states[b]) for b in self._buttons()]
            if self._is_meant("drawer"):
                gaps.append(abs(float(self._data.joint("drawer_slide").qpos[0]) - env._target_drawer_pos))
            if self._is_meant("window"):
                gaps.append(abs(float(self._data.joint("window_slide").qpos[0]) - env._target_window_pos))
        return gaps

    def _success(self) -> bool:
        """The suite's rule: cubes, drawer and window within 4 cm, buttons right."""
        return all(gap <= 0.04 for gap in self._gaps())

    def _next(self, doing: str = "") -> tuple[tuple[str, Any], np.ndarray]:
        """What to do next, with its argument, and where that is [m]: unlock, make room, move, then the rest.

        What is being done already is done more exactly than the rule asks for.
        """
        if self._scene:
            return self._next_of_scene(doing)
        open_cubes = [cube for cube in self._cubes() if np.linalg.norm(self._cube(cube) - self._goal(cube)) > 0.035]
        cube = min(open_cubes or self._cubes(), key=lambda cube: self._goal(cube)[2])
        return ("cube", cube), self._cube(cube)

    def _next_of_scene(self, doing: str) -> tuple[tuple[str, Any], np.ndarray]:
        env, data = self._env, self._data
        drawer, window = float(data.joint("drawer_slide").qpos[0]), float(data.joint("window_slide").qpos[0])

        def press(button: int) -> tuple[tuple[str, Any], np.ndarray]:
            return ("button", button), data.site_xpos[env._button_site_ids[button]].copy()

        def slide(thing: str, target: float) -> tuple[tuple[str, Any], np.ndarray]:
            lock = {"drawer": 0, "window": 1}[thing]
            if env._cur_button_states[lock] == 0:
                return press(lock)
            handle = env._drawer_site_id if thing == "drawer" else env._window_site_id
            return (thing, target), data.site_xpos[handle].copy()

        if self._cubes() and np.linalg.norm(self._cube(0) - self._goal(0)) > 0.035:
            if self._goal(0)[1] < _IN_DRAWER and not env._is_in_drawer(self._cube(0)):
                if drawer > _OPEN:
                    return slide("drawer", -0.16)
                return ("cube", 0), self._cube(0)
            if self._goal(0)[1] >= _IN_DRAWER:
                return ("cube", 0), self._cube(0)
        limit = {thing: 0.012 if doing == thing else 0.035 for thing in ("drawer", "window")}
        if self._is_meant("drawer") and abs(drawer - env._target_drawer_pos) > limit["drawer"]:
            return slide("drawer", env._target_drawer_pos)
        if self._is_meant("window") and abs(window - env._target_window_pos) > limit["window"]:
            return slide("window", env._target_window_pos)
        for button in self._buttons():
            if env._cur_button_states[button] != env._target_button_states[button]:
                return press(button)
        return ("rest", None), self._tool()

    def told(self, what: tuple[str, Any]) -> dict[str, Any]:
        """What an oracle of the suite is told about its one goal, in the suite's words."""
        env, data = self._env, self._data
        info = env.compute_ob_info()
        thing, which = what
        if thing == "cube":
            mocap = env._cube_target_mocap_ids[which]
            w, _, _, z = data.mocap_quat[mocap]
            place = data.mocap_pos[mocap].copy()
            if self._scene and place[1] < _IN_DRAWER:  # in the closed drawer: put it where the open drawer is
                place = env._drawer_center + np.array([0.0, float(data.joint("drawer_slide").qpos[0]) + 0.16, 0.0])
            info |= {
                "privileged/target_block": which,
                "privileged/target_block_pos": place,
                "privileged/target_block_yaw": np.array([2 * math.atan2(z, w)]),
            }
        elif thing == "button":
            info |= {
                "privileged/target_button": which,
                "privileged/target_button_state": 1 - env._cur_button_states[which],
                "privileged/target_button_top_pos": data.site_xpos[env._button_site_ids[which]].copy(),
            }
        elif thing in ("drawer", "window"):
            # Where the handle would be: the site that marks the goal, moved along its slide.
            site = env._drawer_target_site_id if thing == "drawer" else env._window_target_site_id
            place = self._model.site_pos[site].copy()
            place[1 if thing == "drawer" else 0] = which
            body = self._model.site_bodyid[site]
            info[f"privileged/target_{thing}_handle_pos"] = data.xpos[body] + data.xmat[body].reshape(3, 3) @ place
        return info

    def _ground(self) -> Ground:
        env = self._env
        items = [self._cube(cube) for cube in range(env._num_cubes)]
        if self._scene:
            sites = [*env._button_site_ids, env._drawer_site_id, env._window_site_id]
            items += [self._data.site_xpos[site].copy() for site in sites]
        low, high = env._workspace_bounds
        return Ground(
            tool=self._tool(),
            items=np.array(items),
            low=low,
            high=np.minimum(high, (0.6, 0.35, 0.3)),
            gain=1 / 0.06,
            gap=0.06,
            gripper=(1.0, -1.0),
        )


_ORACLES = {
    "cube": CubeMarkovOracle,
    "button": ButtonMarkovOracle,
    "drawer": DrawerMarkovOracle,
    "window": WindowMarkovOracle,
}


class _Oracle:
    """The suite's Markov oracles, chosen anew whenever something has been done."""

    def __init__(self, world: OGBench, rng: np.random.Generator) -> None:
        self._world, self._rng = world, rng
        self._what: tuple[str, Any] | None = None
        self._oracle: Any = None
        self._last = ""
        self._retreat = 0
        self.phase = "start"

    def act(self) -> np.ndarray:
        """See ``Oracle``."""
        what, _ = self._world._next("" if self._what is None else self._what[0])
        if what != self._what:
            # Let go and rise before turning to the next thing, or the last one comes along.
            self._retreat = 0 if self._what is None else 12
            self._last = "" if self._what is None else self._what[0]
            self._what = what
            self._oracle = None
        if self._retreat > 0 or what[0] == "rest":
            self._retreat -= 1
            self.phase = "retreat"
            low = self._world._tool()[2] < 0.22
            self._retreat = self._retreat if low else 0
            # Opening fingers would press a button again.
            return np.array([0.0, 0.0, float(low), 0.0, 1.0 if self._last == "button" else -1.0])
        if self._oracle is None:
            self._oracle = _ORACLES[what[0]](env=self._world._env, min_norm=0.4)
            self._oracle._step, self._oracle._done = 0, False
            bounds = self._world._env._arm_sampling_bounds
            self._oracle._final_pos = self._rng.uniform(*bounds)
            self._oracle._final_yaw = self._rng.uniform(-math.pi, math.pi)
        self.phase = what[0]
        return np.asarray(self._oracle.select_action(None, self._world.told(what)), float)
