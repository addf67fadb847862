"""A simulator of a dot on a line, and behaviours for it, at module level so that worker processes can import them."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np

from emu_embodied.data.episodes import DatasetSpec
from emu_embodied.records import Episode, Field, Observation, Transition

FIELDS = (Field("x", "m", -1.0, 1.0), Field("goal", "m", -1.0, 1.0))
GOAL = FIELDS[1:]
SPEC = DatasetSpec(
    env_ids=("Dot-v0", "Dash-v0"),
    block=3,
    action_dim=2,
    cameras={"front": (8, 6), "wrist": (8, 6)},
    proprio=FIELDS,
    objects=GOAL,
)


def make_episode(seed: int = 0, blocks: int = 4, env_id: str = "Dot-v0", **changes: object) -> Episode:
    rng = np.random.default_rng(seed)
    values: dict = {
        "env_id": env_id,
        "seed": seed,
        "source": "random",
        "instruction": f"go to the {seed}th dot \u2192 r\u00f6d",
        "frames": {name: rng.integers(0, 256, (blocks + 1, 8, 6, 3), np.uint8) for name in ("front", "wrist")},
        "proprio_TP": rng.normal(size=(blocks + 1, 2)).astype(np.float32),
        "actions_TKA": rng.uniform(-1, 1, (blocks, 3, 2)).astype(np.float32),
        "rewards_TK": rng.random((blocks, 3), np.float32),
        "reward_T": rng.random(blocks + 1, np.float32),
        "success_T": rng.random(blocks + 1) < 0.3,
        "phases": tuple(f"phase {i % 2}" for i in range(blocks)),
        "objects_TO": rng.normal(size=(blocks + 1, 1)).astype(np.float32),
    }
    return Episode(**(values | changes))


class DotSimulator:
    """A dot that actions push along a line; the goal and the length of an episode come from the seed."""

    def __init__(self, env_id: str, size: int = 8, block: int = 3) -> None:
        self.env_id, self.size, self.block = env_id, size, block
        self.proprio_fields, self.object_fields = FIELDS, GOAL
        self.action_space = SimpleNamespace(shape=(2,))
        self.x = self.goal = 0.0
        self.left = 0

    def reset(self, *, seed: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.x, self.goal = rng.uniform(-1, 1, 2)
        self.left = int(rng.integers(4, 12))

    def observe(self, *, render: bool = True) -> Observation:
        frame = np.zeros((self.size, 6, 3), np.uint8)
        frame[int((self.x + 1) / 2 * (self.size - 1)), 2] = 255
        return Observation(
            {"front": frame, "wrist": 255 - frame}, np.array([self.x, self.goal], np.float32), f"{self.env_id} go",
            np.array([self.goal], np.float32),
        )  # fmt: skip

    def reward(self) -> float:
        return float(1 - abs(self.x - self.goal) / 2)

    def success(self) -> bool:
        return abs(self.x - self.goal) < 0.2

    def step_block(self, actions_KA: np.ndarray, *, render: bool = True) -> Transition:
        rewards = []
        for action in actions_KA:
            self.x = float(np.clip(self.x + 0.1 * action[0], -1, 1))
            self.left -= 1
            rewards.append(self.reward())
        success = self.success()
        return Transition(
            self.observe(), np.asarray(rewards, np.float32), {"reach": rewards[-1]}, success, success, self.left <= 0
        )

    def snapshot(self) -> tuple[float, float, int]:
        return self.x, self.goal, self.left

    def restore(self, snapshot: tuple[float, float, int]) -> None:
        self.x, self.goal, self.left = snapshot

    def close(self) -> None:
        if marker := os.environ.get("DOT_CLOSED"):
            with open(marker, "a") as file:
                file.write(f"{self.env_id} {os.environ['OMP_NUM_THREADS']}\n")


class Wander:
    phase = "wander"

    def __init__(self, simulator: DotSimulator, rng: np.random.Generator) -> None:
        self.block, self.rng = simulator.block, rng

    def reset(self, observation: Observation) -> None:
        pass

    def act(self, observation: Observation) -> np.ndarray:
        return self.rng.uniform(-1, 1, (self.block, 2)).astype(np.float32)


class Seek(Wander):
    phase = "seek"

    def act(self, observation: Observation) -> np.ndarray:
        towards = np.sign(observation.proprio[1] - observation.proprio[0])
        return np.full((self.block, 2), towards, np.float32)


class Crash(Wander):
    def act(self, observation: Observation) -> np.ndarray:
        raise ZeroDivisionError("the motor is gone")


class Die(Wander):
    def act(self, observation: Observation) -> np.ndarray:
        os._exit(7)


class OutOfBox(Wander):
    def act(self, observation: Observation) -> np.ndarray:
        return np.full((self.block, 2), 1.5, np.float32)


def make_small(env_id: str) -> DotSimulator:
    return DotSimulator(env_id, size=8 if env_id == "Dot-v0" else 4)


def make_known(env_id: str) -> DotSimulator:
    if env_id not in SPEC.env_ids:
        raise ValueError(f"unknown environment {env_id!r}")
    return DotSimulator(env_id)
