"""P1: Push-T, a goal picture 25 env steps ahead; 50 env steps to get there.

The rule is DINO-WM's (Zhou et al. 2024, arXiv:2411.04983) as stable-worldmodel (arXiv:2605.21800) states it: a start is
drawn from an episode, the goal is the observation 25 env steps later, and an attempt has succeeded if at any of 50 env
steps the positions of disc and block, as one vector of four numbers, are within 20 px of the goal's and the block's
angle is within 20 degrees. Theirs are 50 attempts; ours are 3 times 200.

What differs:

- Episodes are held out: they are recorded for the table, from reset seeds that no dataset of ``collect`` draws. Others
  take starts and goals from the very episodes that their models are trained on.
- Episodes are those of our own scripted pusher, half of them with noise and detours, up to the suite's own success.
  Others take demonstrations by people, with noise added.
- Actions are relative (1 is 100 px), as DINO-WM's; pictures are 64 px wide, and the suite's.
- Starts are restored exactly. A problem in which the block has to move (20 px, or 20 degrees) is tagged ``moved`` and
  counted apart: in the others it is enough to bring the disc to its place.
- The true-simulator control searches with the budget of the learned rows, a small part of the 300 x 30 candidates that
  others give their models.
- The controls are told nothing of each other: ``replay`` plays the recorded actions and shows that goals can be
  reached; it is no expert. No expert is pointed at these goals: the pusher knows how to place the block, not the disc.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from emu_embodied.envs.registry import make
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

NEAR = 20.0
"""[px] allowed for the four positions together."""
ALIKE = math.radians(20.0)
"""[rad] allowed for the block's angle."""


class PushTRule:
    """See ``Rule``: positions of disc and block, and the block's angle."""

    sources: tuple[str, ...] = ("expert", "noisy")
    ends_at_success = True
    first_seed = 0

    def places(self, world: Any) -> np.ndarray:
        """Disc x, y; block x, y, angle [px, rad]."""
        x, y, sin, cos = world.objects()
        return np.array([*world.proprio()[:2], x, y, math.atan2(sin, cos)])

    def gaps(self, here: np.ndarray, goal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both of what counts, in units of what is allowed."""
        return np.array([np.linalg.norm(here[:4] - goal[:4]) / NEAR, _turn(here, goal) / ALIKE]), np.zeros(0)

    def moved(self, start: np.ndarray, goal: np.ndarray) -> bool:
        """Whether the disc alone cannot do it."""
        return bool(np.linalg.norm(start[2:4] - goal[2:4]) >= NEAR or _turn(start, goal) >= ALIKE)


def _turn(here: np.ndarray, goal: np.ndarray) -> float:
    """Angle between two poses of the block [rad], in [0, pi]."""
    away = abs(float(here[4] - goal[4])) % (2 * math.pi)
    return min(away, 2 * math.pi - away)


def make_env(env_id: str, *, image_size: int = 64) -> GoalReaching:
    """Push-T, posing problems."""
    simulator = make(env_id, image_size=image_size)
    assert isinstance(simulator, SuiteEnv)
    return GoalReaching(simulator, PushTRule())


PROTOCOL = Protocol(
    name="p1",
    title="Push-T, goal picture 25 env steps ahead",
    suites=("pusht",),
    env_ids=("PushT",),
    episodes=200,
    sets=3,
    make=make_env,
    search=PlanningBudget(samples=32, iterations=3, horizon=5, replan_every=5, init_std=0.15, answer="best"),
    controls=(
        STILL,
        RANDOM,
        REPLAY,
        TRUE_OBJECTS,
        TRUE_PICTURE,
        SHOOTING,
        IMAGINED,
        IMAGINED_OBJECTS,
        TOKEN,
    ),
)
