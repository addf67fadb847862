"""Meta-World's 50 tasks (Yu et al. 2019; metaworld 3.x): a Sawyer arm at a table.

Goals come from two lists of 50 (``metaworld.MT1`` with seed 0 for training, 1 for evaluation): reset seeds below
``EVALUATION_SEEDS`` take the evaluation list, all others (and resets without a seed) the training list. Data collection
draws large seeds, so what is evaluated with small ones was never trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import metaworld
import mujoco
import numpy as np
from metaworld.policies import ENV_POLICY_MAP

from emu_embodied.envs.mujoco.view import Orbit, View, load_state, plain_state, save_state, set_plain_state
from emu_embodied.envs.suites.play import Ground, Play
from emu_embodied.records import Field

EVALUATION_SEEDS = 100_000
"""Reset seeds below this draw from the goals kept for evaluation."""
_LISTS = {"train": 0, "test": 1}
"""List of goals -> seed of ``MT1``."""
_TERMS = {
    "near": "near_object",
    "grasp": "grasp_reward",
    "in_place": "in_place_reward",
}
_CAMERAS: dict[str, Orbit | str] = {
    "close": Orbit((0.0, 0.67, 0.10), 0.92, 130.0, -35.0),
    "corner": Orbit((0.0, 0.60, 0.15), 1.35, 50.0, -25.0),
    "topview": "topview",
}
"""``close`` shows what is handled over many pixels; Meta-World's own corners are far, and upside down."""
_FAR = {task: Orbit((0.0, 0.72, 0.16), 1.25, 130.0, -32.0) for task in ("basketball-v3", "door-open-v3")}

_RANGES = (("x", -0.5, 0.5), ("y", 0.3, 1.0), ("z", 0.0, 0.6))
"""Axis, lowest and highest place of things [m]; in a few tasks something leaves them by some centimetres."""
INSTRUCTIONS = {
    "assembly": "put the ring over the peg",
    "basketball": "put the ball into the basket",
    "bin-picking": "move the cube into the other bin",
    "box-close": "put the lid on the box",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "press the button from above, behind the wall",
    "button-press": "press the button",
    "button-press-wall": "press the button behind the wall",
    "coffee-button": "press the button of the coffee machine",
    "coffee-pull": "pull the mug from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-close": "close the faucet",
    "faucet-open": "open the faucet",
    "hammer": "hammer the nail into the block",
    "hand-insert": "put the hand into the hole",
    "handle-press-side": "press the handle down from the side",
    "handle-press": "press the handle down",
    "handle-pull-side": "pull the handle up from the side",
    "handle-pull": "pull the handle up",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "put the peg into the hole from the side",
    "peg-unplug-side": "pull the peg out of the hole",
    "pick-out-of-hole": "pick the puck out of the hole",
    "pick-place": "pick up the puck and bring it to the goal",
    "pick-place-wall": "bring the puck over the wall to the goal",
    "plate-slide-back-side": "slide the plate out of the goal sideways",
    "plate-slide-back": "slide the plate back out of the goal",
    "plate-slide-side": "slide the plate into the goal sideways",
    "plate-slide": "slide the plate into the goal",
    "push-back": "pull the puck back to the goal",
    "push": "push the puck to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "reach": "reach the goal",
    "reach-wall": "reach the goal behind the wall",
    "shelf-place": "put the cube on the shelf",
    "soccer": "push the ball into the net",
    "stick-pull": "pull the thermos with the stick",
    "stick-push": "push the thermos with the stick",
    "sweep-into": "sweep the puck into the hole",
    "sweep": "sweep the puck off the table",
    "window-close": "close the window",
    "window-open": "open the window",
}
"""Task without its version -> what the robot is told."""


@dataclass(frozen=True, slots=True)
class _State:
    """All of an episode's state."""

    goals: str
    goal: int
    physics: np.ndarray
    python: dict[str, Any]
    result: tuple[float, dict[str, float]]


class MetaWorld:
    """``World`` of one task.

    Actions: hand displacement (x, y, z; 1 is 1 cm of its mocap body) and gripper effort (1 shuts). Reward: Meta-World's
    own of version 2, which lies in [0, 10], divided by 10. Success is the suite's, which counts at any step. The limit
    of 200 env steps is TD-MPC2's; the suite's own is 500.

    Args:
        task: one of Meta-World's names, such as ``reach-v3``.
        image_size: edge of the pictures [px].
    """

    object_fields = (
        *(Field(f"object_{axis}", "m", low, high) for axis, low, high in _RANGES),
        *(Field(f"second_{axis}", "m", min(low, 0.0), high) for axis, low, high in _RANGES),
        *(Field(f"goal_{axis}", "m", low, high) for axis, low, high in _RANGES),
    )
    proprio_fields = (
        Field("ee_x", "m", -0.525, 0.525),
        Field("ee_y", "m", 0.348, 1.025),
        Field("ee_z", "m", -0.0525, 0.7),
        Field("ee_vx", "m/s", -1.0, 1.0),
        Field("ee_vy", "m/s", -1.0, 1.0),
        Field("ee_vz", "m/s", -1.0, 1.0),
        Field("gripper", "", 0.0, 1.0),
    )
    action_dim = 4
    cameras = tuple(_CAMERAS)
    weights = {"shaped": 1.0}  # noqa: RUF012 (never changed)
    max_episode_steps = 200
    control_dt = 0.0125

    def __init__(self, task: str, *, image_size: int = 64) -> None:
        self._task = task
        self._env: Any = metaworld.ALL_V3_ENVIRONMENTS[task]()
        # The time limit is ours to keep; here one more step would raise.
        self._env.max_path_length = 10**9
        cameras = {**_CAMERAS, "close": _FAR.get(task, _CAMERAS["close"])}
        self._view = View(self._env.model, size=image_size, cameras=cameras, hidden_groups=(3, 4, 5))
        self._hand = self._env.model.body("hand").id
        # Marks have no part in physics; Meta-World's are two pixels wide.
        model = self._env.model
        for site in range(model.nsite):
            if "goal" in model.site(site).name:
                model.site_size[site] *= 1.6
        self._goals, self._goal = "", -1
        self._result: tuple[float, dict[str, float]] = (0.0, {})
        self._velocity = np.zeros(6)

    @property
    def instruction(self) -> str:
        """See ``World``."""
        return INSTRUCTIONS[self._task.removesuffix("-v3")]

    def begin(self, seed: int | None, rng: np.random.Generator) -> None:
        """See ``World``."""
        evaluation = seed is not None and seed < EVALUATION_SEEDS
        self._place("test" if evaluation else "train", int(rng.integers(50)))

    def advance(self, action: np.ndarray) -> None:
        """See ``World``."""
        _, reward, _, _, info = self._env.step(action)
        self._result = _result(reward, info)

    def terms(self) -> dict[str, float]:
        """See ``World``."""
        reward, info = self._result
        return {"shaped": reward, **info}

    def proprio(self) -> np.ndarray:
        """See ``World``."""
        env = self._env
        kind = mujoco.mjtObj.mjOBJ_BODY
        mujoco.mj_objectVelocity(env.model, env.data, kind, self._hand, self._velocity, 0)
        return np.array([*env.data.xpos[self._hand], *self._velocity[3:], env._prev_obs[3]])

    def objects(self) -> np.ndarray:
        """See ``World``: the two things of the suite's own observation (zeros where it has one), and the goal."""
        seen = self._env._prev_obs
        return np.concatenate([seen[4:7], seen[11:14], self._env._target_pos])

    def draw(self, camera: str) -> np.ndarray:
        """See ``World``."""
        # Sites are marks without physics; where a task's marks belong is written only into its Python state.
        for name, place in self._env._target_site_config:
            self._env._set_pos_site(name, np.asarray(place, float))
        return self._view.draw(self._env.data, camera)

    def save(self) -> _State:
        """See ``World``."""
        env = self._env
        return _State(self._goals, self._goal, save_state(env.model, env.data), plain_state(env), self._result)

    def load(self, saved: _State) -> None:
        """See ``World``."""
        if (saved.goals, saved.goal) != (self._goals, self._goal):
            # Furniture and marks stand in the model, not in its state.
            self._place(saved.goals, saved.goal)
        load_state(self._env.model, self._env.data, saved.physics)
        set_plain_state(self._env, saved.python)
        self._result = saved.result

    def solve(self) -> bool:
        """See ``World``: no task says what its solved state is."""
        return False

    def oracle(self, rng: np.random.Generator) -> _Oracle:
        """Meta-World's scripted policy."""
        return _Oracle(self._env, ENV_POLICY_MAP[self._task]())

    def player(self, rng: np.random.Generator) -> Play:
        """See ``World``."""
        return Play(self._ground, self.action_dim, rng)

    def _ground(self) -> Ground:
        env = self._env
        observed = env._prev_obs
        items = [observed[4:7]]
        if np.any(observed[11:14]):
            items.append(observed[11:14])
        items.append(np.asarray(env._target_pos, float))
        return Ground(
            tool=env.data.xpos[self._hand].copy(),
            items=np.array(items),
            low=np.maximum(env.mocap_low, (-0.35, 0.4, 0.05)),
            high=np.minimum(env.mocap_high, (0.35, 0.9, 0.35)),
            gain=1 / 0.08,  # the hand trails its mocap body by some centimetres
            gap=0.06,
            gripper=(1.0, -1.0),
        )

    def close(self) -> None:
        """See ``World``."""
        self._view.close()
        self._env.close()

    def _place(self, goals: str, goal: int) -> None:
        env = self._env
        mujoco.mj_resetData(env.model, env.data)  # nothing of an earlier episode, the warm start included
        env.set_task(_goals(self._task, goals)[goal])
        observed, _ = env.reset()
        env._prev_obs, env._last_stable_obs = observed[:18].copy(), None
        before = plain_state(env)
        reward, info = env.evaluate_state(np.clip(observed, -10, 10), np.zeros(4, np.float32))
        set_plain_state(env, before)  # some rewards remember what they have seen
        self._goals, self._goal, self._result = goals, goal, _result(reward, info)


@cache
def _goals(task: str, goals: str) -> list[Any]:
    return metaworld.MT1(task, seed=_LISTS[goals]).train_tasks


def _result(reward: Any, info: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """Reward and terms as plain numbers in [0, 1]; some of Meta-World's stray beyond by rounding."""
    terms = {name: min(max(float(info[theirs]), 0.0), 1.0) for name, theirs in _TERMS.items()}
    return min(max(float(reward) / 10, 0.0), 1.0), {**terms, "success": float(info["success"])}


class _Oracle:
    """One of Meta-World's scripted policies."""

    phase = "expert"

    def __init__(self, env: Any, policy: Any) -> None:
        self._env, self._policy = env, policy

    def act(self) -> np.ndarray:
        """See ``Oracle``."""
        env = self._env
        now = env._prev_obs
        before = now if env._last_stable_obs is None else env._last_stable_obs[18:36]
        observed = np.hstack((now, before, env._get_pos_goal()))
        return np.clip(np.asarray(self._policy.get_action(observed), float), -1.0, 1.0)
