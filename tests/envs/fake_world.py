"""A suite's world without a suite: a point in the plane that should be at a place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from emu_embodied.envs.suites.gymnasium_image import GymnasiumImageEnv
from emu_embodied.records import Field


class FakeWorld:
    """``World``: a point that moves by a tenth of the action, towards a goal, with some memory in a counter."""

    proprio_fields = (Field("x", "m", -1.0, 1.0), Field("y", "m", -1.0, 1.0))
    object_fields = (Field("goal_x", "m", -1.0, 1.0), Field("goal_y", "m", -1.0, 1.0))
    action_dim = 2
    cameras = ("eye", "other")
    weights = {"near": 0.75, "still": 0.25}  # noqa: RUF012
    max_episode_steps = 30
    control_dt = 0.05
    instruction = "go to the place"

    def __init__(self, task: str = "", *, image_size: int = 64, places: bool = True, expert: bool = True) -> None:
        self.size, self.places, self.expert = image_size, places, expert
        self.state = (0.0, 0.0, 0.0, 0.0, 0)
        self.closed = False

    def begin(self, seed: int | None, rng: np.random.Generator) -> None:
        self.state = (*rng.uniform(-0.9, 0.9, 4).tolist(), 0)

    def advance(self, action: np.ndarray) -> None:
        x, y, goal_x, goal_y, count = self.state
        assert (np.abs(action) <= 1).all()
        self.state = (x + 0.1 * float(action[0]), y + 0.1 * float(action[1]), goal_x, goal_y, count + 1)

    def terms(self) -> dict[str, float]:
        x, y, goal_x, goal_y, count = self.state
        away = float(np.hypot(goal_x - x, goal_y - y))
        return {"near": max(0.0, 1 - away), "still": 1 / (1 + count), "success": float(away < 0.1)}

    def proprio(self) -> np.ndarray:
        return np.array(self.state[:2])

    def objects(self) -> np.ndarray:
        return np.array(self.state[2:4])

    def draw(self, camera: str) -> np.ndarray:
        frame = np.full((self.size, self.size, 3), 40 if camera == "eye" else 90, np.uint8)
        for (x, y), colour in ((self.state[2:4], (0, 255, 0)), (self.state[:2], (255, 0, 0))):
            column, row = (int(np.clip((value + 1) / 2 * (self.size - 3), 0, self.size - 3)) for value in (x, y))
            frame[row : row + 3, column : column + 3] = colour
        return frame

    def save(self) -> tuple[float, ...]:
        return self.state

    def load(self, saved: tuple[float, float, float, float, int]) -> None:
        self.state = saved

    def solve(self) -> bool:
        if self.places:
            self.state = (*self.state[2:4], *self.state[2:])
        return self.places

    def oracle(self, rng: np.random.Generator) -> FakeOracle | None:
        return FakeOracle(self) if self.expert else None

    def player(self, rng: np.random.Generator) -> FakeOracle | None:
        return None

    def close(self) -> None:
        self.closed = True


class FakeOracle:
    """Goes straight to the place."""

    phase = "approach"

    def __init__(self, world: FakeWorld) -> None:
        self.world = world

    def act(self) -> np.ndarray:
        x, y, goal_x, goal_y, _ = self.world.state
        return 10 * np.array([goal_x - x, goal_y - y])


class Corridor(gymnasium.Env):
    """A Gymnasium environment as others write them: actions in [0, 3], rewards in [-2, 0], an end."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    observation_space = gymnasium.spaces.Dict(
        {
            "place": gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float64),
            "view": gymnasium.spaces.Box(0, 255, (48, 80, 3), np.uint8),
        }
    )

    def __init__(self, *, fair: bool = True, actions: gymnasium.Space | None = None) -> None:
        self.action_space = actions or gymnasium.spaces.Box(0.0, 3.0, (1,), np.float32)
        self.fair, self.place = fair, 0.0
        self.lots = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = float(self.np_random.uniform(-1.0, 0.5))
        return self.seen(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        step = 0.1 * float(action[0]) if self.fair else float(self.lots.uniform(0.0, 0.1))
        self.place = min(self.place + step, 1.0)
        return self.seen(), self.place - 1.0, self.place >= 1.0, False, {}

    def seen(self) -> dict[str, np.ndarray]:
        view = np.full((48, 80, 3), 30, np.uint8)
        column = 16 + int((self.place + 1) / 2 * 44)
        view[20:28, column : column + 4] = 255
        return {"place": np.array([self.place]), "view": view}


def adapted(make_inner: Callable[[], gymnasium.Env] = Corridor, **kwargs: Any) -> GymnasiumImageEnv:
    return GymnasiumImageEnv(
        make_inner,
        env_id="Corridor",
        instruction="walk to the end",
        **{
            "reward_range": (-2.0, 0.0),
            "proprio": lambda seen: seen["place"],
            "proprio_fields": (Field("place", "m", -1.0, 1.0),),
            "picture": "view",
            **kwargs,
        },
    )
