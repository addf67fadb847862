"""P2: OGBench's cube-single and Fetch's reach and push, a goal picture 25 env steps ahead; 50 env steps to get there.

The rule is that of P1, as stable-worldmodel (arXiv:2605.21800) applies it to OGBench's cube, with its number of
problems (50; our P1 asks for more); success is the suite's own radius around where the thing is in the goal state: 4 cm
for OGBench's cube, 5 cm for Fetch's block, and in reach for Fetch's tool.

What differs, beside what ``p1`` names:

- Episodes are those of the suites' scripted experts, half of them with noise and detours, over the suite's whole time
  limit. OGBench's are of its data-collection mode, one cube and a goal drawn at random.
- The success rule looks at the thing alone. In many of these problems it need not move (the arm is still on its way, or
  the expert has finished), and doing nothing succeeds: ``still`` says how often, and problems in which the thing has to
  move farther than the radius are tagged ``moved`` and counted apart. Read that column.
- ``expert`` is the suite's scripted expert with the suite's goal put where the thing is in the goal state.
- The true-simulator control is told where tool and thing are in the goal state, and searches with the budget of the
  learned rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from emu_embodied.envs.registry import make
from emu_embodied.envs.suites.world import SuiteEnv
from emu_embodied.experiments.protocols.goals import GoalReaching, PointedExpert
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
    Control,
    Protocol,
)
from emu_embodied.policies.registry import PlanningBudget

RADIUS = {"OGBench/cube-single": 0.04, "Fetch/Reach": 0.05, "Fetch/Push": 0.05}
"""[m] the suites' own."""


class ArmRule:
    """See ``Rule``: where the thing is.

    Args:
        radius: that counts [m].
        alone: there is no thing: the tool itself has to get there.
    """

    sources: tuple[str, ...] = ("expert", "noisy")
    ends_at_success = False
    first_seed = 200_000
    """Above the seeds that OGBench keeps for its five evaluation tasks."""

    def __init__(self, radius: float, *, alone: bool) -> None:
        self.radius, self.alone = radius, alone

    def places(self, world: Any) -> np.ndarray:
        """Tool x, y, z; thing x, y, z [m]; the tool twice where there is no thing."""
        tool = world.proprio()[:3]
        return np.concatenate([tool, tool if self.alone else world.objects()[:3]])

    def gaps(self, here: np.ndarray, goal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The thing's distance counts; the tool's lies on the way."""
        thing = np.array([np.linalg.norm(here[3:] - goal[3:]) / self.radius])
        tool = np.zeros(0) if self.alone else np.array([np.linalg.norm(here[:3] - goal[:3]) / self.radius])
        return thing, tool

    def moved(self, start: np.ndarray, goal: np.ndarray) -> bool:
        """Whether doing nothing cannot be enough."""
        return bool(np.linalg.norm(start[3:] - goal[3:]) >= self.radius)


def make_env(env_id: str, *, image_size: int = 64) -> GoalReaching:
    """An arm's environment, posing problems."""
    simulator = make(env_id, image_size=image_size)
    assert isinstance(simulator, SuiteEnv)
    return GoalReaching(simulator, ArmRule(RADIUS[env_id], alone=env_id == "Fetch/Reach"))


POINTED = Control(
    name="expert",
    what="the suite's scripted expert, its goal put where the thing is",
    make=PointedExpert,  # type: ignore[arg-type]  # of problems, which is all that this protocol makes
)

PROTOCOL = Protocol(
    name="p2",
    title="OGBench cube-single, Fetch reach and push, goal picture 25 env steps ahead",
    suites=("ogbench", "fetch"),
    env_ids=tuple(RADIUS),
    episodes=50,
    make=make_env,
    search=PlanningBudget(samples=32, iterations=3, horizon=5, replan_every=5, answer="best"),
    controls=(
        STILL,
        RANDOM,
        REPLAY,
        POINTED,
        TRUE_OBJECTS,
        TRUE_PICTURE,
        SHOOTING,
        IMAGINED,
        IMAGINED_OBJECTS,
        TOKEN,
    ),
)
