"""What data is collected with: behaviours that together touch everything from every side, with failures kept.

A world model is wrong about actions that it never saw, so experts alone will not do: ``noisy`` strays from the expert,
``play`` makes contact on purpose but to no purpose, ``random`` covers the rest. Each is a ``Policy`` with ``phase``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator

import numpy as np

from emu_embodied.data.recording import Behaviour
from emu_embodied.envs.panda import PandaEnv
from emu_embodied.envs.suites.world import SuiteEnv
from emu_embodied.envs.tasks import WORKSPACE_HIGH, WORKSPACE_LOW
from emu_embodied.policies.random import RandomPolicy
from emu_embodied.policies.rehearsal import make_expert, make_noisy, make_play
from emu_embodied.policies.scripted import HOVER, OPEN, SHUT, ScriptedPolicy, Waypoint, held_action
from emu_embodied.records import Observation


class NoisyExpert:
    """The expert with noise that lasts over blocks, and now and then a few random blocks.

    Args:
        simulator: the environment to act in.
        rng: where the noise comes from; its strength is drawn anew for every episode.
    """

    _MEMORY = 0.6
    """Correlation of the noise from block to block."""

    def __init__(self, simulator: PandaEnv, rng: np.random.Generator) -> None:
        self._simulator = simulator
        self._expert = ScriptedPolicy(simulator)
        self._random = RandomPolicy(simulator.block, 4, rng)
        self._rng = rng
        self._strength = 0.0
        self._noise = np.zeros(4)
        self._astray = 0
        self.phase = "start"

    def reset(self, observation: Observation) -> None:
        """Start an episode."""
        self._expert.reset(observation)
        self._strength = self._rng.uniform(0.03, 0.3)
        self._noise = self._strength * self._rng.standard_normal(4)
        self._astray = 0
        self.phase = "start"

    def act(self, observation: Observation) -> np.ndarray:
        """The next action block, float32 [K, A]."""
        fresh = math.sqrt(1 - self._MEMORY**2) * self._strength * self._rng.standard_normal(4)
        self._noise = self._MEMORY * self._noise + fresh
        if self._astray == 0 and self._rng.random() < 0.08:
            self._astray = int(self._rng.integers(1, 4))
        if self._astray > 0:
            self._astray -= 1
            self.phase = "random"
            return self._random.act(observation)
        actions = self._expert.act(observation)
        self.phase = self._expert.phase
        return np.clip(actions + self._noise, -1.0, 1.0).astype(np.float32)


class Play:
    """Contact-rich movement without a goal: pushes from all sides, grasps, drops, and wandering near what matters.

    Args:
        simulator: the environment to act in.
        rng: where every choice comes from.
    """

    def __init__(self, simulator: PandaEnv, rng: np.random.Generator) -> None:
        self._simulator = simulator
        self._rng = rng
        self._script: Iterator[Waypoint] = iter(())
        self._cubes = [i for i, (_, shape, _) in enumerate(simulator.task.slots) if shape == "cube"]
        self._seen = [i for i, (_, shape, _) in enumerate(simulator.task.slots) if shape != "cube"]
        self._can_grasp = bool(self._cubes) and simulator.task.locked_opening is None
        self.phase = "start"

    def reset(self, observation: Observation) -> None:
        """Start an episode."""
        self._script = self._choose_for_ever()
        self.phase = "start"

    def act(self, observation: Observation) -> np.ndarray:
        """The next action block, float32 [K, A]."""
        waypoint = next(self._script)
        self.phase = waypoint.phase
        return held_action(self._simulator, waypoint.xyz, waypoint.gripper)

    def _choose_for_ever(self) -> Iterator[Waypoint]:
        while True:
            draw = self._rng.random()
            if self._cubes and draw < 0.7:
                yield from self._grasp() if self._can_grasp and draw < 0.45 else self._push()
            elif draw < 0.85:
                yield from self._visit()
            else:
                yield from self._wander()

    def _push(self) -> Iterator[Waypoint]:
        """Get beside a cube and push it: anywhere, to a marker, or back to the middle."""
        simulator, rng = self._simulator, self._rng
        cube = int(rng.choice(self._cubes))
        low = simulator.task.tool_floor + rng.uniform(0.0, 0.015)
        gripper = float(rng.choice([OPEN, SHUT], p=[0.2, 0.8]))
        x, y, _ = simulator.world_state().item_xyz[cube].tolist()
        draw = rng.random()
        angle = rng.uniform(-math.pi, math.pi)
        if draw < 0.35:
            goal = simulator.world_state().item_xyz[int(rng.choice(self._seen))]
            angle = math.atan2(goal[1] - y, goal[0] - x) + 0.2 * rng.standard_normal()
        elif draw < 0.5:
            angle = math.atan2(-y, 0.49 - x) + 0.5 * rng.standard_normal()
        gap = rng.uniform(0.07, 0.09)
        aside = rng.normal(0.0, 0.012)
        ux, uy = math.cos(angle), math.sin(angle)
        start = (x - gap * ux - aside * uy, y - gap * uy + aside * ux)
        yield from self._go("approach", (*start, HOVER), gripper)
        yield from self._go("descend", (*start, low), gripper)
        length = gap - 0.03 + rng.uniform(0.03, 0.16)
        blocks = max(1, round(length / rng.uniform(0.04, 0.12)))
        for i in range(1, blocks + 1):
            far = length * i / blocks
            yield Waypoint("push", (start[0] + far * ux, start[1] + far * uy, low), gripper)
        if rng.random() < 0.7:
            ee = simulator.world_state().ee_xyz
            yield Waypoint("retreat", (ee[0] - 0.02 * ux, ee[1] - 0.02 * uy, HOVER), gripper)

    def _grasp(self) -> Iterator[Waypoint]:
        """Close on a cube (not always well), carry it somewhere, let go at some height."""
        simulator, rng = self._simulator, self._rng
        x, y, z = simulator.world_state().item_xyz[int(rng.choice(self._cubes))].tolist()
        x, y = x + rng.normal(0.0, 0.006), y + rng.normal(0.0, 0.006)
        yield from self._go("approach", (x, y, HOVER), OPEN)
        yield from self._go("descend", (x, y, z), OPEN)
        yield Waypoint("grasp", (x, y, z), SHUT)
        yield from self._go("lift", (x, y, rng.uniform(0.06, 0.2)), SHUT)
        if rng.random() < 0.5:
            place = simulator.world_state().item_xyz[int(rng.choice(self._seen))] + rng.normal(0.0, 0.02, 3)
        else:
            place = self._anywhere()
        height = rng.uniform(0.02, 0.12)
        yield from self._go("carry", (place[0], place[1], max(height, 0.07)), SHUT)
        yield from self._go("lower", (place[0], place[1], height), SHUT)
        yield Waypoint("release", (place[0], place[1], height), OPEN)
        yield Waypoint("retreat", (place[0], place[1], HOVER + 0.04), OPEN)

    def _visit(self) -> Iterator[Waypoint]:
        """Go near a ball, marker or cube and stay a moment."""
        items = self._simulator.world_state().item_xyz
        near = items[int(self._rng.integers(len(items)))] + self._rng.normal(0.0, 0.025, 3)
        if self._cubes:
            near[2] += self._rng.uniform(0.05, 0.12)
        gripper = float(self._rng.uniform(-1, 1))
        yield from self._go("visit", (near[0], near[1], near[2]), gripper)
        for _ in range(int(self._rng.integers(0, 3))):
            x, y, z = (near + self._rng.normal(0.0, 0.015, 3)).tolist()
            yield Waypoint("visit", (x, y, z), gripper)

    def _wander(self) -> Iterator[Waypoint]:
        """Go anywhere in the workspace."""
        x, y, z = self._anywhere()
        yield from self._go("wander", (x, y, z), float(self._rng.uniform(-1, 1)))

    def _anywhere(self) -> tuple[float, float, float]:
        low = (*WORKSPACE_LOW, self._simulator.task.tool_floor)
        x, y, z = self._rng.uniform(low, WORKSPACE_HIGH).tolist()
        return x, y, z

    def _go(self, phase: str, xyz: tuple[float, float, float], gripper: float) -> Iterator[Waypoint]:
        """At most four blocks towards a place, fewer where it is reached."""
        for _ in range(4):
            yield Waypoint(phase, xyz, gripper)
            if math.dist(self._simulator.target_xyz.tolist(), xyz) < 0.01:
                return


Worlds = PandaEnv | SuiteEnv
"""What there are behaviours for; a suite brings its own experts."""


def _expert(simulator: Worlds, rng: np.random.Generator) -> Behaviour:
    return make_expert(simulator, rng) if isinstance(simulator, SuiteEnv) else ScriptedPolicy(simulator)


def _noisy(simulator: Worlds, rng: np.random.Generator) -> Behaviour:
    return make_noisy(simulator, rng) if isinstance(simulator, SuiteEnv) else NoisyExpert(simulator, rng)


def _play(simulator: Worlds, rng: np.random.Generator) -> Behaviour:
    return make_play(simulator, rng) if isinstance(simulator, SuiteEnv) else Play(simulator, rng)


def _random(simulator: Worlds, rng: np.random.Generator) -> Behaviour:
    action_dim = simulator.action_dim if isinstance(simulator, SuiteEnv) else 4
    return RandomPolicy(simulator.block, action_dim, rng)


BEHAVIOURS: dict[str, Callable[[Worlds, np.random.Generator], Behaviour]] = {
    "expert": _expert,
    "noisy": _noisy,
    "play": _play,
    "random": _random,
}
"""Name -> factory; the names are what episodes are labelled with (``Episode.source``)."""


def make_behaviour(name: str, simulator: Worlds, rng: np.random.Generator) -> Behaviour:
    """Make a behaviour.

    Raises:
        ValueError: if there is none of this name; the message names the nearest one.
    """
    if name not in BEHAVIOURS:
        near = difflib.get_close_matches(name, BEHAVIOURS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown behaviour {name!r}; {hint}known: {', '.join(BEHAVIOURS)}")
    return BEHAVIOURS[name](simulator, rng)
