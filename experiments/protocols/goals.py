"""Goal-reaching problems from recorded episodes: bring about the state that an episode came to some env steps later.

The rule is DINO-WM's (Zhou et al. 2024) as stable-worldmodel states it: a start is drawn from an episode, the goal is
the observation ``ahead`` env steps later, and ``budget`` env steps may be spent on getting there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from emu_embodied.envs.suites.world import Oracle, SuiteEnv, World
from emu_embodied.policies.rehearsal import Astray, Rehearsed
from emu_embodied.records import Field, Observation, Transition

AHEAD = 25
"""[env steps] from the start to the goal."""
BUDGET = 50
"""[env steps] for getting there."""
SOLVED_AT_START = "solved at the start"
"""Tag of problems whose start already counts as their goal."""
MOVED = "moved"
"""Tag of problems in which a thing has to move, not the robot alone."""


class Rule(Protocol):
    """When a state counts as the goal's."""

    sources: tuple[str, ...]
    """Behaviours that episodes are recorded of, in turn: ``expert`` or ``noisy``."""
    ends_at_success: bool
    """Whether a recorded episode ends where the suite's own task is solved."""
    first_seed: int
    """Reset seed of problem 0."""

    def places(self, world: Any) -> np.ndarray:
        """float64 [D]: what is compared."""
        ...

    def gaps(self, here: np.ndarray, goal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances in units of what is allowed: those that success is judged by, and others that lie on the way."""
        ...

    def moved(self, start: np.ndarray, goal: np.ndarray) -> bool:
        """Whether a thing besides the robot has to move."""
        ...


@dataclass(frozen=True, slots=True)
class Problem:
    """Where to start, and where to end.

    Attributes:
        start: the simulator there, complete.
        goal: what is seen at the goal.
        places_D: what the rule compares, at the goal.
        actions_TA: float32 [ahead, A], the recorded way from one to the other.
        tags: what kind of problem it is.
    """

    start: Any
    goal: Observation
    places_D: np.ndarray
    actions_TA: np.ndarray
    tags: tuple[str, ...]


class GoalReaching:
    """A suite's environment whose task is to bring about a recorded state; ``reset(seed=n)`` poses problem n.

    Success is the rule's, at any env step. The reward, ``1 / (1 + mean gap)``, sees the true state: a planner in the
    true simulator may search for it, a learned model is not told.

    Args:
        simulator: whose episodes and physics it uses; closed with it.
        rule: what counts as the goal.
        ahead: env steps from start to goal.
        budget: env steps for getting there.
    """

    def __init__(self, simulator: SuiteEnv, rule: Rule, *, ahead: int = AHEAD, budget: int = BUDGET) -> None:
        self.simulator, self.rule, self.ahead = simulator, rule, ahead
        self.max_episode_steps = budget
        self.env_id = simulator.env_id
        self.block = simulator.block
        self.action_space = simulator.action_space
        self.cameras, self.image_size = simulator.cameras, simulator.image_size
        self.proprio_fields: tuple[Field, ...] = simulator.proprio_fields
        self.object_fields: tuple[Field, ...] = simulator.object_fields
        self._problems: dict[int, Problem] = {}
        self._problem: Problem | None = None
        self._elapsed = 0

    @property
    def problem(self) -> Problem:
        """The one at hand.

        Raises:
            ValueError: before the first ``reset``.
        """
        if self._problem is None:
            raise ValueError("no problem is posed: call reset(seed=...) first")
        return self._problem

    @property
    def tags(self) -> tuple[str, ...]:
        """What kind of problem the one at hand is."""
        return self.problem.tags

    def reset(self, *, seed: int | None = None) -> None:
        """Pose problem ``seed`` (0 if left out)."""
        number = seed or 0
        if number not in self._problems:
            self._problems[number] = make_problem(self.simulator, self.rule, number, ahead=self.ahead)
        self._problem = self._problems[number]
        self.simulator.world.load(self._problem.start)
        self._elapsed = 0

    def observe(self, *, render: bool = True) -> Observation:
        """The present state as an observation."""
        return self.simulator.observe(render=render)

    def goal_observation(self) -> Observation:
        """What is seen at the goal."""
        return self.problem.goal

    def step_block(self, actions_KA: np.ndarray, *, render: bool = True) -> Transition:
        """Apply K actions (any K); pictures are drawn only of the state reached, and only if ``render``."""
        rewards, solved = [], []
        for action in np.asarray(actions_KA, np.float64):
            self.simulator.world.advance(np.clip(action, -1.0, 1.0))
            self._elapsed += 1
            reward, success = self._judge()
            rewards.append(reward)
            solved.append(success)
        return Transition(
            observation=self.observe(render=render),
            rewards_K=np.array(rewards, np.float32),
            terms={"closeness": rewards[-1], "success": float(solved[-1])},
            success=solved[-1],
            success_any=any(solved),
            truncated=self._elapsed >= self.max_episode_steps,
        )

    def reward(self) -> float:
        """The present state's, in [0, 1]."""
        return self._judge()[0]

    def success(self) -> bool:
        """Whether the present state counts as the goal."""
        return self._judge()[1]

    def snapshot(self) -> tuple[Any, int]:
        """The complete state."""
        return self.simulator.world.save(), self._elapsed

    def restore(self, snapshot: tuple[Any, int]) -> None:
        """Return to a snapshot of the same problem."""
        saved, self._elapsed = snapshot
        self.simulator.world.load(saved)

    def close(self) -> None:
        """Free the simulator."""
        self.simulator.close()

    def _judge(self) -> tuple[float, bool]:
        counted, beside = self.rule.gaps(self.rule.places(self.simulator.world), self.problem.places_D)
        return 1.0 / (1.0 + float(np.mean([*counted, *beside]))), bool((counted < 1.0).all())


def make_problem(simulator: SuiteEnv, rule: Rule, number: int, *, ahead: int = AHEAD) -> Problem:
    """Record an episode that no training run draws, and pick a start in it, every env step alike.

    Args:
        simulator: whose episode; left in some state of it.
        rule: how episodes are recorded, and what is compared.
        number: of the problem; all else follows from it.
        ahead: env steps from start to goal.

    Raises:
        RuntimeError: if twenty episodes in a row were shorter than ``ahead``.
    """
    world = simulator.world
    for attempt in range(20):
        rng = np.random.default_rng([number, attempt, 25])
        simulator.reset(seed=rule.first_seed + number + attempt * _APART)
        oracle = _oracle(simulator, rule.sources[number % len(rule.sources)], rng)
        states, actions = _record(simulator, oracle, rule.ends_at_success)
        if len(actions) < ahead:
            continue
        start = int(rng.integers(len(actions) - ahead + 1))
        world.load(states[start])
        before = rule.places(world)
        world.load(states[start + ahead])
        after = rule.places(world)
        solved = bool((rule.gaps(before, after)[0] < 1.0).all())
        tags = ((SOLVED_AT_START,) if solved else ()) + ((MOVED,) if rule.moved(before, after) else ())
        actions_TA = np.stack(actions[start : start + ahead])
        return Problem(states[start], simulator.observe(), after, actions_TA, tags)
    raise RuntimeError(f"{simulator.env_id}: twenty episodes in a row were shorter than {ahead} env steps")


_APART = 20_000
"""Between the reset seeds of two attempts at a problem: more than there are problems."""


def _oracle(simulator: SuiteEnv, source: str, rng: np.random.Generator) -> Oracle:
    oracle = simulator.world.oracle(rng)
    if oracle is None:
        raise ValueError(
            f"{simulator.env_id} comes without a scripted expert, so there are no episodes to take goals from"
        )
    return Astray(simulator, oracle, rng) if source == "noisy" else oracle


def _record(simulator: SuiteEnv, oracle: Oracle, ends_at_success: bool) -> tuple[list[Any], list[np.ndarray]]:
    """States of an episode and the actions between them, env step by env step, without pictures."""
    world: World = simulator.world
    states, actions = [world.save()], list[np.ndarray]()
    while len(actions) < simulator.max_episode_steps:
        actions.append(np.clip(oracle.act(), -1.0, 1.0).astype(np.float32))
        world.advance(actions[-1].astype(np.float64))
        states.append(world.save())
        # Looked at once a block: what a suite says of a state can cost more than the step to it.
        if ends_at_success and len(actions) % simulator.block == 0 and world.terms()["success"]:
            break
    return states, actions


class Still:
    """Does nothing: what of a table needs no planning.

    Args:
        simulator: where it acts; an action of zero must leave things as they are.
        seed: not used.
    """

    def __init__(self, simulator: Any, seed: int = 0) -> None:
        self._zeros_KA = np.zeros((simulator.block, simulator.action_space.shape[0]), np.float32)

    def reset(self, observation: Observation) -> None:
        """Start an episode."""

    def act(self, observation: Observation) -> np.ndarray:
        """Zeros, float32 [K, A]."""
        return self._zeros_KA


class Replay:
    """Plays the recorded actions, then nothing: that goals can be reached at all. No expert, it sees no goal.

    Args:
        simulator: a ``GoalReaching``.
        seed: not used.
    """

    def __init__(self, simulator: GoalReaching, seed: int = 0) -> None:
        self._simulator = simulator
        self._blocks: list[np.ndarray] = []
        self._still = Still(simulator)

    def reset(self, observation: Observation) -> None:
        """Start an episode."""
        block, actions_TA = self._simulator.block, self._simulator.problem.actions_TA
        self._blocks = [actions_TA[i : i + block] for i in range(0, len(actions_TA), block)]

    def act(self, observation: Observation) -> np.ndarray:
        """The next recorded block, float32 [K, A]."""
        return self._blocks.pop(0) if self._blocks else self._still.act(observation)


class PointedExpert:
    """The suite's expert, told to bring its thing to where it is in the goal state.

    Args:
        simulator: a ``GoalReaching`` whose world can move its goal (``aim``), and whose rule compares tool and thing.
        seed: of what the expert draws.
    """

    def __init__(self, simulator: GoalReaching, seed: int = 0) -> None:
        self._simulator, self._seed = simulator, seed
        self._expert: Rehearsed | None = None

    def reset(self, observation: Observation) -> None:
        """Start an episode."""
        world: Any = self._simulator.simulator.world
        world.aim(self._simulator.problem.places_D[3:6])
        # Rehearsal needs no more of a simulator than this one has.
        simulator: Any = self._simulator
        self._expert = Rehearsed(simulator, lambda _, rng: world.oracle(rng), np.random.default_rng([self._seed, 2]))

    def act(self, observation: Observation) -> np.ndarray:
        """The next block, float32 [K, A].

        Raises:
            ValueError: before the first ``reset``.
        """
        if self._expert is None:
            raise ValueError("reset the policy with the first observation before it acts")
        return self._expert.act(observation)
