"""A protocol without a suite: bring a point in the plane to where a recorded episode brought it."""

from __future__ import annotations

from typing import Any

import numpy as np

from emu_embodied.envs.suites.world import SuiteEnv
from emu_embodied.experiments.protocols.goals import GoalReaching
from emu_embodied.experiments.protocols.protocol import (
    IMAGINED,
    IMAGINED_OBJECTS,
    RANDOM,
    REPLAY,
    SHOOTING,
    STILL,
    TOKEN,
    TRUE_OBJECTS,
    TRUE_PICTURE,
    Protocol,
)
from emu_embodied.policies.registry import PlanningBudget
from tests.envs.fake_world import FakeWorld


class FakeRule:
    sources = ("expert", "noisy")
    ends_at_success = False
    first_seed = 0

    def places(self, world: Any) -> np.ndarray:
        return world.proprio()

    def gaps(self, here: np.ndarray, goal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.array([np.linalg.norm(here - goal) / 0.05]), np.zeros(0)

    def moved(self, start: np.ndarray, goal: np.ndarray) -> bool:
        return bool(np.linalg.norm(start - goal) >= 0.05)


def make_env(env_id: str, *, image_size: int = 32) -> GoalReaching:
    simulator = SuiteEnv(FakeWorld(image_size=image_size), env_id=env_id, image_size=image_size)
    return GoalReaching(simulator, FakeRule(), ahead=10, budget=20)


def make_toy_env(env_id: str, *, image_size: int = 32) -> GoalReaching:
    """With blocks as short as the toy models'."""
    env = make_env(env_id, image_size=image_size)
    env.block = 2
    return env


PROTOCOL = Protocol(
    name="fake",
    title="a point",
    suites=(),
    env_ids=("Fake/A", "Fake/B"),
    episodes=4,
    sets=2,
    make=make_env,
    search=PlanningBudget(samples=48, iterations=4, horizon=2, replan_every=2, answer="best"),
    controls=(STILL, RANDOM, REPLAY, TRUE_OBJECTS, TRUE_PICTURE, SHOOTING, IMAGINED, IMAGINED_OBJECTS, TOKEN),
)
