"""A suite's world as an environment: one Gymnasium class for all suites, over the small seam ``World``."""

from __future__ import annotations

import difflib
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np

from emu_embodied.records import Field, Observation, Transition

BLOCK = 5
"""[env steps] K: one action block, as in our own worlds."""
LONGEST_INSTRUCTION = 96
"""[letters] the longest sentence of a suite. A model reads as many as it was trained with (``tasks.MAX_INSTRUCTION``
unless a preset says otherwise) and refuses more."""
_SETTLE = 20
"""[env steps] how far an oracle goes on after success in search of a better goal picture."""


class Oracle(Protocol):
    """A scripted expert that sees the true state and chooses single env steps."""

    @property
    def phase(self) -> str:
        """Label of the action given last: ``approach``, ``grasp`` ..."""
        ...

    def act(self) -> np.ndarray:
        """float64 [A], for the present state of the world it was made for."""
        ...


class World(Protocol):
    """One task of a suite. Everything that happens is a function of ``save``'s value and the actions."""

    proprio_fields: tuple[Field, ...]
    object_fields: tuple[Field, ...]
    """What ``objects`` tells; may be empty."""
    action_dim: int
    """A."""
    cameras: tuple[str, ...]
    """Names of the pictures that can be drawn; the first is the robot's eye."""
    weights: Mapping[str, float]
    """Reward term -> weight; they sum to 1. Terms without a weight are told and not rewarded."""
    max_episode_steps: int
    """Time limit unless another is asked for [env steps]."""
    control_dt: float
    """[s] one env step."""

    @property
    def instruction(self) -> str:
        """What the robot is told in the running episode: lower case, at most ``LONGEST_INSTRUCTION``."""
        ...

    def begin(self, seed: int | None, rng: np.random.Generator) -> None:
        """Start an episode, drawn from ``rng``; ``seed`` is what ``rng`` was seeded with just now, if it was."""
        ...

    def advance(self, action: np.ndarray) -> None:
        """One env step; float64 [A] in [-1, 1]."""
        ...

    def terms(self) -> dict[str, float]:
        """Named reward terms of the present state, each in [0, 1]; ``success`` is among them."""
        ...

    def proprio(self) -> np.ndarray:
        """Vector [P], in the units of ``proprio_fields``; may leave their ranges."""
        ...

    def objects(self) -> np.ndarray:
        """Vector [O]: where the things are that the task is about, in the units of ``object_fields``."""
        ...

    def draw(self, camera: str) -> np.ndarray:
        """uint8 [size, size, 3]."""
        ...

    def save(self) -> Any:
        """The complete state, which nobody changes."""
        ...

    def load(self, saved: Any) -> None:
        """Return to a state saved by a world of the same task, exactly."""
        ...

    def solve(self) -> bool:
        """Put the episode into a solved state directly; False where there is no way to, so that an oracle must."""
        ...

    def oracle(self, rng: np.random.Generator) -> Oracle | None:
        """A fresh expert for the running episode, or None if the suite has none."""
        ...

    def player(self, rng: np.random.Generator) -> Oracle | None:
        """What makes contact from all sides and to no purpose, for data; None if nothing is known to touch."""
        ...

    def close(self) -> None:
        """Free the renderer and the simulator."""
        ...


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that the next step depends on."""

    env_id: str
    world: Any
    start: Any
    """The episode's first state, from which its goal picture is made."""
    elapsed: int
    rng: Mapping[str, Any]


class SuiteEnv(gymnasium.Env):
    """A suite's world behind Gymnasium's API and the ``Simulator`` protocol.

    Actions are float32 [A] in [-1, 1] (what they mean is the suite's affair). Observations are a dictionary of the
    cameras (uint8 [size, size, 3]), ``proprio`` (float32 [P], see ``proprio_fields``) and ``instruction``. Episodes are
    truncated after ``max_episode_steps`` and never terminated: ``info["success"]`` says whether the state solves the
    task, and a suite's own rule (success at any step) is ``Transition.success_any``.

    Args:
        world: the simulator and its task.
        env_id: the id that episodes and snapshots are labelled with.
        image_size: edge of the pictures that ``world`` draws [px].
        cameras: which pictures to draw; the world's first where None.
        max_episode_steps: time limit [env steps], the world's own where None.
        render_mode: ``"rgb_array"`` or None.

    Raises:
        ValueError: if a camera is unknown.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (Gymnasium's own)
    block: int = BLOCK

    def __init__(
        self,
        world: World,
        *,
        env_id: str,
        image_size: int = 64,
        cameras: tuple[str, ...] | None = None,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / world.control_dt)}
        self.world = world
        self.env_id = env_id
        self.cameras = world.cameras[:1] if cameras is None else tuple(cameras)
        for camera in self.cameras:
            _check_camera(camera, world, env_id)
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"unknown render_mode {render_mode!r}; did you mean 'rgb_array'?")
        self.render_mode = render_mode
        self.image_size = image_size
        self.max_episode_steps = max_episode_steps or world.max_episode_steps
        self.proprio_fields = world.proprio_fields
        self.object_fields = world.object_fields
        self._low = np.array([f.low for f in self.proprio_fields], np.float32)
        self._high = np.array([f.high for f in self.proprio_fields], np.float32)
        self._elapsed = 0
        self._start: Any = None
        self._terms: dict[str, float] | None = None
        self._goal: tuple[Any, Observation] | None = None
        picture = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.action_dim = world.action_dim
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (world.action_dim,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({
            **dict.fromkeys(self.cameras, picture),
            "proprio": gymnasium.spaces.Box(self._low, self._high, dtype=np.float32),
            "instruction": gymnasium.spaces.Text(LONGEST_INSTRUCTION, charset=string.ascii_lowercase + " ,:-"),
        })  # fmt: skip

    # Gymnasium

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw a new episode; the same seed gives the same bytes."""
        super().reset(seed=seed)
        self.world.begin(seed, self.np_random)
        self._elapsed = 0
        self._terms = None
        self._start = self.world.save()
        return self._gym_observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One env step."""
        reward = self._advance(np.asarray(action, np.float64))
        return self._gym_observation(), reward, False, self._elapsed >= self.max_episode_steps, self._info()

    def render(self, camera: str | None = None) -> np.ndarray:
        """A camera's picture of the present state, uint8 [size, size, 3]."""
        return self.world.draw(camera or self.cameras[0])

    def close(self) -> None:
        """Free the simulator."""
        self.world.close()

    # Simulator

    def observe(self, *, render: bool = True) -> Observation:
        """The present state as an observation."""
        self._check_running()
        frames = {name: self.world.draw(name) for name in self.cameras} if render else {}
        objects = np.asarray(self.world.objects(), np.float32)
        return Observation(frames, self._proprio(), self.world.instruction, objects)

    def step_block(self, actions_KA: np.ndarray, *, render: bool = True) -> Transition:
        """Apply K actions (any K); pictures are drawn only of the state reached, and only if ``render``."""
        self._check_running()
        rewards, solved = [], []
        for action in np.asarray(actions_KA, np.float64):
            rewards.append(self._advance(action))
            solved.append(self.success())
        return Transition(
            observation=self.observe(render=render),
            rewards_K=np.array(rewards, np.float32),
            terms=self.reward_terms(),
            success=solved[-1],
            success_any=any(solved),
            truncated=self._elapsed >= self.max_episode_steps,
        )

    def snapshot(self) -> Snapshot:
        """The complete state: simulator, episode, clock and random generator."""
        self._check_running()
        return Snapshot(
            env_id=self.env_id,
            world=self.world.save(),
            start=self._start,
            elapsed=self._elapsed,
            rng=self.np_random.bit_generator.state,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot; stepping from there gives the same bytes.

        Raises:
            ValueError: if the snapshot is another environment's.
        """
        if snapshot.env_id != self.env_id:
            raise ValueError(f"this is {self.env_id}, the snapshot is of {snapshot.env_id}: restore it there")
        self.world.load(snapshot.world)
        self._start = snapshot.start
        self._elapsed = snapshot.elapsed
        self.np_random.bit_generator.state = snapshot.rng
        self._terms = None

    # What experts, planners and recorders ask for

    @property
    def elapsed(self) -> int:
        """Env steps since the reset."""
        return self._elapsed

    def reward_terms(self) -> dict[str, float]:
        """The named reward terms of the present state, each in [0, 1]."""
        if self._terms is None:
            self._terms = self.world.terms()
        return dict(self._terms)

    def reward(self) -> float:
        """The present state's reward, in [0, 1]: the weighted sum of its terms."""
        terms = self.reward_terms()
        return sum(weight * terms[name] for name, weight in self.world.weights.items())

    def success(self) -> bool:
        """Whether the present state solves the task."""
        return bool(self.reward_terms()["success"])

    def goal_observation(self) -> Observation:
        """What the robot would see with the task solved; the episode is left as it was.

        Where the suite can place things, they are placed; otherwise its oracle solves the episode from its start, and
        the picture is of the state with the highest reward among those that solve it (among all, should it fail).

        Raises:
            ValueError: if the suite can do neither.
        """
        if self._goal is None or self._goal[0] is not self._start:
            before = self.snapshot()
            try:
                self.world.load(self._start)
                if not self.world.solve():
                    self._solve_by_oracle()
                self._terms = None
                self._goal = (self._start, self.observe())
            finally:
                self.restore(before)
        return self._goal[1]

    # Inner workings

    def _solve_by_oracle(self) -> None:
        oracle = self.world.oracle(np.random.default_rng(0))
        if oracle is None:
            raise ValueError(f"{self.env_id} has no picture of its goal: plan for reward instead (--objective reward)")
        best, state, after = (-1.0, -1.0), self.world.save(), 0
        for _ in range(max(self.max_episode_steps, self.world.max_episode_steps)):
            self._advance(oracle.act())
            value = (float(self.success()), self.reward())
            if value > best:
                best, state = value, self.world.save()
            after += best[0] > 0
            if after > _SETTLE:
                break
        self.world.load(state)

    def _advance(self, action: np.ndarray) -> float:
        self._check_running()
        self.world.advance(np.minimum(np.maximum(action, -1.0), 1.0))
        self._elapsed += 1
        self._terms = None
        return self.reward()

    def _check_running(self) -> None:
        if self._start is None:
            raise ValueError("no episode is running: call reset() first")

    def _proprio(self) -> np.ndarray:
        return np.clip(np.asarray(self.world.proprio(), np.float32), self._low, self._high)

    def _gym_observation(self) -> dict[str, Any]:
        observation = self.observe()
        return {**observation.frames, "proprio": observation.proprio, "instruction": observation.instruction}

    def _info(self) -> dict[str, Any]:
        return {"success": self.success(), "terms": self.reward_terms()}


def _check_camera(camera: str, world: World, env_id: str) -> None:
    if camera not in world.cameras:
        near = difflib.get_close_matches(camera, world.cameras, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown camera {camera!r} of {env_id}; {hint}known: {', '.join(world.cameras)}")
