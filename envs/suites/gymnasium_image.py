"""Any other Gymnasium environment with pictures and continuous actions, behind the same seam.

Nothing is asked of it but that it is deterministic: a snapshot is the episode's seed and its actions, and restoring
replays them. That is exact, and as slow as the replay; a suite that plans in its true simulator deserves a ``World``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from PIL import Image

from emu_embodied.envs.suites.world import Oracle, SuiteEnv
from emu_embodied.envs.tasks import MAX_INSTRUCTION
from emu_embodied.records import Field


@dataclass(frozen=True, slots=True)
class _State:
    """How to get here, and what is here, to see that the replay came to the same place."""

    seed: int
    actions: tuple[bytes, ...]
    reward: float
    success: bool
    proprio: np.ndarray


class GymnasiumImageEnv(SuiteEnv):
    """A ``SuiteEnv`` around a Gymnasium environment.

    Args:
        make: makes the environment; with ``render_mode="rgb_array"`` where ``picture`` is None.
        env_id: the id that episodes and snapshots are labelled with.
        instruction: what the robot is told; lower case, at most 48 letters.
        reward_range: rewards that become 0 and 1; what lies beyond is clipped.
        picture: key of the picture in observations; None for what ``render()`` gives, ``""`` where the observation is
            the picture.
        proprio: a vector from the observation; nothing but zeros where None.
        proprio_fields: its names, units and ranges.
        success: key of ``info`` that says whether the state solves the task; otherwise ``terminated`` does.
        image_size: edge of the pictures [px]; larger ones are averaged down.
        max_episode_steps: time limit [env steps].
        control_dt: one env step [s].

    Raises:
        ValueError: if actions are not a bounded box or there is no picture.
    """

    def __init__(
        self,
        make: Callable[[], gymnasium.Env],
        *,
        env_id: str,
        instruction: str,
        reward_range: tuple[float, float] = (0.0, 1.0),
        picture: str | None = None,
        proprio: Callable[[Any], np.ndarray] | None = None,
        proprio_fields: tuple[Field, ...] = (Field("nothing", "", 0.0, 1.0),),
        success: str = "is_success",
        image_size: int = 64,
        max_episode_steps: int = 200,
        control_dt: float = 0.05,
    ) -> None:
        if instruction != instruction.lower() or not 0 < len(instruction) <= MAX_INSTRUCTION:
            raise ValueError(f"instructions are lower case and of 1 to {MAX_INSTRUCTION} letters: {instruction!r}")
        world = _GymnasiumWorld(make, instruction, reward_range, picture, proprio, proprio_fields, success, image_size)
        world.max_episode_steps, world.control_dt = max_episode_steps, control_dt
        super().__init__(world, env_id=env_id, image_size=image_size)


class _GymnasiumWorld:
    """``World`` of one environment."""

    object_fields: tuple[Field, ...] = ()
    cameras: tuple[str, ...] = ("eye",)
    weights: Mapping[str, float] = {"reward": 1.0}

    def __init__(
        self,
        make: Callable[[], gymnasium.Env],
        instruction: str,
        reward_range: tuple[float, float],
        picture: str | None,
        proprio: Callable[[Any], np.ndarray] | None,
        proprio_fields: tuple[Field, ...],
        success: str,
        image_size: int,
    ) -> None:
        self._env = env = make()
        space = env.action_space
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1 or not space.is_bounded():
            raise ValueError(f"actions have to be a bounded box of one axis, {env} has {space}: wrap it")
        if picture is None and env.render_mode != "rgb_array":
            raise ValueError(f"{env} draws nothing: make it with render_mode='rgb_array', or name picture=")
        self.instruction, self.proprio_fields = instruction, proprio_fields
        self.action_dim = int(space.shape[0])
        self.max_episode_steps, self.control_dt = 200, 0.05
        self._low, self._high = np.asarray(space.low, float), np.asarray(space.high, float)
        self._range, self._picture, self._read, self._key = reward_range, picture, proprio, success
        self._size = image_size
        self._seed = 0
        self._actions: tuple[bytes, ...] = ()
        self._observed: Any = None
        self._reward, self._success, self._over = 0.0, False, False

    def begin(self, seed: int | None, rng: np.random.Generator) -> None:
        """See ``World``."""
        self._restart(int(rng.integers(2**31)))

    def advance(self, action: np.ndarray) -> None:
        """See ``World``: an environment that has terminated stays as it is."""
        action = np.asarray(action, np.float64)
        self._actions = (*self._actions, action.tobytes())
        if self._over:
            return
        scaled = self._low + (action + 1) / 2 * (self._high - self._low)
        self._observed, reward, self._over, _, info = self._env.step(scaled.astype(self._env.action_space.dtype))
        low, high = self._range
        self._reward = min(max((float(reward) - low) / (high - low), 0.0), 1.0)
        self._success = bool(info.get(self._key, self._over))

    def terms(self) -> dict[str, float]:
        """See ``World``."""
        return {"reward": self._reward, "success": float(self._success)}

    def proprio(self) -> np.ndarray:
        """See ``World``."""
        return np.zeros(len(self.proprio_fields)) if self._read is None else np.asarray(self._read(self._observed))

    def objects(self) -> np.ndarray:
        """See ``World``: nothing is told."""
        return np.zeros(0)

    def draw(self, camera: str) -> np.ndarray:
        """See ``World``."""
        if self._picture is None:
            frame = self._env.render()
        else:
            frame = self._observed[self._picture] if self._picture else self._observed
        image = Image.fromarray(np.ascontiguousarray(frame, np.uint8))
        side = min(image.size)  # a square from the middle
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        return np.asarray(square.resize((self._size, self._size), Image.Resampling.BOX))

    def save(self) -> _State:
        """See ``World``."""
        return _State(self._seed, self._actions, self._reward, self._success, np.array(self.proprio()))

    def load(self, saved: _State) -> None:
        """See ``World``.

        Raises:
            ValueError: if the replay comes out elsewhere.
        """
        done = len(self._actions)
        if saved.seed != self._seed or saved.actions[:done] != self._actions:
            self._restart(saved.seed)
            done = 0
        for action in saved.actions[done:]:
            self.advance(np.frombuffer(action))
        if (self._reward, self._success) != (saved.reward, saved.success) or not np.array_equal(
            self.proprio(), saved.proprio
        ):
            raise ValueError(f"{self._env} is not deterministic: the same seed and actions led elsewhere")

    def solve(self) -> bool:
        """See ``World``."""
        return False

    def oracle(self, rng: np.random.Generator) -> Oracle | None:
        """See ``World``."""
        return None

    def player(self, rng: np.random.Generator) -> Oracle | None:
        """See ``World``."""
        return None

    def close(self) -> None:
        """See ``World``."""
        self._env.close()

    def _restart(self, seed: int) -> None:
        self._observed, _ = self._env.reset(seed=seed)
        self._seed, self._actions = seed, ()
        self._reward, self._success, self._over = 0.0, False, False
