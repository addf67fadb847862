"""The tasks, defined once and without an engine: what lies where, what is asked, what is rewarded, what is success.

Frame of reference: the robot's base is the origin, x points away from it, y to *its* left, z up; the table is z = 0.
Sides in instructions are those of the picture: the ``front`` camera faces the robot, so "left" is -y.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

Shape = Literal["cube", "disc", "ball"]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.10, 0.25, 0.90),
    "yellow": (0.98, 0.82, 0.05),
    "violet": (0.50, 0.15, 0.60),
}
"""Linear RGB in [0, 1]; violet is the markers', the others are told apart in instructions."""

NAMED = ("red", "green", "blue", "yellow")
SIDES = {"left": -1.0, "right": 1.0}
"""Side of the picture -> sign of y."""
HELD_OUT_PAIRS = frozenset({("blue", "left"), ("yellow", "right")})
"""Colours with sides (``Task.pair``) that training data can leave out, to see whether a model puts them together."""

MAX_INSTRUCTION = 48
"""Longest instruction [bytes]."""

WORKSPACE_LOW = (0.32, -0.24)
WORKSPACE_HIGH = (0.66, 0.24, 0.26)
"""Box [m] that the tool's target stays in; its floor is the task's ``tool_floor``."""


@dataclass(frozen=True, slots=True)
class Item:
    """A thing on (or above) the table."""

    name: str
    """Slot name, e.g. ``cube_0``: the same in every episode of a task."""
    shape: Shape
    """``cube`` moves and collides; ``disc`` (flat, on the table) and ``ball`` (in the air) are only seen."""
    size: float
    """[m] half edge of a cube, radius of a disc or ball."""
    colour: str
    """Key of ``COLOURS``."""
    xyz: tuple[float, float, float]
    """[m] centre."""
    yaw: float = 0.0
    """[rad] rotation about z."""


@dataclass(frozen=True, slots=True)
class Scene:
    """The start of an episode and what is asked in it."""

    items: tuple[Item, ...]
    ee_xyz: tuple[float, float, float]
    """[m] where the tool starts."""
    opening: float
    """[m] distance between the fingers at the start."""
    meant: int
    """Index of the item that is meant."""
    goal_xyz: tuple[float, float, float]
    """[m] where the meant cube's centre (or, in a reach, the tool) has to go."""
    instruction: str
    kind: str = ""
    """Which of a task's goals it is, e.g. ``place`` or ``lift``."""


@dataclass(frozen=True, slots=True)
class WorldState:
    """The true state that rewards, success and experts read. Engine-free."""

    ee_xyz: np.ndarray
    """[m] float64 [3], the point between the fingertips."""
    ee_velocity: np.ndarray
    """[m/s] float64 [3]."""
    opening: float
    """[m] distance between the fingers, 0 to 0.08."""
    item_xyz: np.ndarray
    """[m] float64 [items, 3], centres in the order of ``Scene.items``."""
    item_velocity: np.ndarray
    """[m/s] float64 [items, 3], zero for what does not move."""


class Task(ABC):
    """One task: samples scenes, rewards states."""

    name: str
    max_episode_steps: int
    """[env steps]"""
    weights: ClassVar[dict[str, float]]
    """Reward term -> weight; they sum to 1, so the reward is in [0, 1]."""
    slots: tuple[tuple[str, Shape, float], ...]
    """(name, shape, size [m]) of every item, the same in every episode."""
    tool_floor: float = 0.015
    """[m] the lowest the tool may go; in the tasks with 6 cm cubes the hand would otherwise press on their tops."""
    locked_opening: float | None = None
    """[m] if set, the gripper is held there and its action has no effect."""
    held_out_templates: ClassVar[dict[str, tuple[str, ...]]]
    """``Scene.kind`` -> instructions that no episode is ever sampled with: for evaluation alone."""

    @abstractmethod
    def sample(self, rng: np.random.Generator) -> Scene:
        """Draw the start of an episode."""

    @abstractmethod
    def success(self, scene: Scene, state: WorldState) -> bool:
        """Whether a state solves the task."""

    @abstractmethod
    def progress(self, scene: Scene, state: WorldState) -> dict[str, float]:
        """The reward terms in [0, 1], without ``success``."""

    @abstractmethod
    def solved(self, scene: Scene) -> Scene:
        """The scene as it looks when the task is done: what a goal image shows."""

    def pair(self, scene: Scene) -> tuple[str, str]:
        """Colour of what is meant, and the side that it has to go to or, where that is none of its own, lies on."""
        return scene.items[scene.meant].colour, "left" if scene.goal_xyz[1] < 0 else "right"

    def rephrased(self, scene: Scene, rng: np.random.Generator) -> str:
        """The same instruction in words that training never saw."""
        colour, side = self.pair(scene)
        return _pick(rng, self.held_out_templates[scene.kind]).format(colour=colour, side=side)

    def terms(self, scene: Scene, state: WorldState) -> dict[str, float]:
        """All reward terms, each in [0, 1] and a function of the state alone.

        A solved state gets every term in full but the one that says how well: nothing is to be gained by going back.
        """
        terms = self.progress(scene, state)
        done = self.success(scene, state)
        if done:
            terms = {name: value if name == "place" else 1.0 for name, value in terms.items()}
        terms["success"] = float(done)
        return terms

    def reward(self, terms: dict[str, float]) -> float:
        """Weighted sum of the terms, in [0, 1]."""
        return sum(self.weights[name] * value for name, value in terms.items())

    def _items(
        self, places: list[tuple[float, float, float]], colours: list[str], yaws: list[float]
    ) -> tuple[Item, ...]:
        return tuple(
            Item(name, shape, size, colour, xyz, yaw)
            for (name, shape, size), colour, xyz, yaw in zip(self.slots, colours, places, yaws, strict=True)
        )


class PandaReach(Task):
    """Move the tool to the ball of the named colour."""

    name = "PandaReach"
    max_episode_steps = 30
    weights: ClassVar[dict[str, float]] = {"near": 0.4, "touch": 0.4, "success": 0.2}
    tool_floor = 0.03
    slots = (("ball_0", "ball", 0.03), ("ball_1", "ball", 0.03))
    radius = 0.04
    """[m] success: distance of the tool to the ball's centre."""
    templates = (
        "reach the {colour} ball",
        "touch the {colour} ball",
        "move the gripper to the {colour} ball",
        "go to the {colour} sphere",
        "bring your hand to the {colour} one",
    )
    held_out_templates: ClassVar = {
        "": (
            "steer the tool into the {colour} ball",
            "the {colour} ball is where the hand must be",
            "put your fingertips on the {colour} sphere",
        )
    }

    def sample(self, rng: np.random.Generator) -> Scene:
        """Two balls of different colours at least 14 cm apart; the tool starts near the middle."""
        colours = _colours(rng, 2)
        while True:
            balls = [_uniform(rng, (0.38, -0.17, 0.05), (0.60, 0.17, 0.22)) for _ in range(2)]
            start = _uniform(rng, (0.42, -0.08, 0.12), (0.54, 0.08, 0.24))
            if math.dist(*balls) >= 0.14 and min(math.dist(start, ball) for ball in balls) >= 0.08:
                break
        meant = int(rng.integers(2))
        instruction = _pick(rng, self.templates).format(colour=colours[meant])
        items = self._items(balls, colours, [0.0, 0.0])
        return Scene(items, start, 0.04, meant, balls[meant], instruction)

    def success(self, scene: Scene, state: WorldState) -> bool:
        """The tool is within 4 cm of the ball's centre."""
        return math.dist(state.ee_xyz.tolist(), scene.goal_xyz) < self.radius

    def progress(self, scene: Scene, state: WorldState) -> dict[str, float]:
        """``near`` is felt across the workspace, ``touch`` sharpens the last centimetres."""
        distance = math.dist(state.ee_xyz.tolist(), scene.goal_xyz)
        return {"near": 1 - math.tanh(distance / 0.2), "touch": 1 - math.tanh(distance / 0.06)}

    def terms(self, scene: Scene, state: WorldState) -> dict[str, float]:
        """Nearer is better to the end, so success lifts no other term."""
        return self.progress(scene, state) | {"success": float(self.success(scene, state))}

    def solved(self, scene: Scene) -> Scene:
        """The tool is in the ball."""
        return replace(scene, ee_xyz=scene.goal_xyz)


class PandaPush(Task):
    """Push the named cube to the marker on the named side, with the gripper held shut."""

    name = "PandaPush"
    max_episode_steps = 60
    weights: ClassVar[dict[str, float]] = {"approach": 0.3, "place": 0.5, "success": 0.2}
    slots = (
        ("cube_0", "cube", 0.03),
        ("cube_1", "cube", 0.03),
        ("marker_left", "disc", 0.05),
        ("marker_right", "disc", 0.05),
    )
    tool_floor = 0.03
    locked_opening = 0.0
    radius = 0.05
    """[m] success: planar distance of the cube's centre to the marker's."""
    behind = 0.055
    """[m] the point to push from lies this far behind the cube's centre."""
    templates = (
        "push the {colour} cube to the {side} marker",
        "push the {colour} block to the {side}",
        "slide the {colour} cube onto the {side} disc",
        "move the {colour} cube to the marker on the {side}",
        "{side} marker: put the {colour} cube there",
    )
    held_out_templates: ClassVar = {
        "": (
            "shove the {colour} cube over to the {side} disc",
            "get the {colour} block onto the {side} marker",
            "the {colour} cube belongs on the {side} disc",
        )
    }

    def sample(self, rng: np.random.Generator) -> Scene:
        """Two cubes on the middle line, one near the robot and one far; a marker on either side."""
        colours = _colours(rng, 2)
        middle = rng.uniform(0.47, 0.51)
        cubes = [
            (middle - rng.uniform(0.055, 0.075), rng.uniform(-0.03, 0.03), 0.03),
            (middle + rng.uniform(0.055, 0.075), rng.uniform(-0.03, 0.03), 0.03),
        ]
        if rng.random() < 0.5:
            cubes.reverse()
        markers = [(middle + rng.uniform(-0.02, 0.02), sign * rng.uniform(0.135, 0.155), 0.0) for sign in (-1.0, 1.0)]
        yaws = [*rng.uniform(-0.25, 0.25, 2).tolist(), 0.0, 0.0]
        start = _uniform(rng, (middle - 0.05, -0.06, 0.10), (middle + 0.05, 0.06, 0.16))
        meant, side = int(rng.integers(2)), int(rng.integers(2))
        instruction = _pick(rng, self.templates).format(colour=colours[meant], side=("left", "right")[side])
        items = self._items([*cubes, *markers], [*colours, "violet", "violet"], yaws)
        return Scene(items, start, 0.0, meant, (*markers[side][:2], 0.03), instruction)

    def success(self, scene: Scene, state: WorldState) -> bool:
        """The cube's centre is above the marker."""
        x, y, _ = state.item_xyz[scene.meant].tolist()
        return math.hypot(x - scene.goal_xyz[0], y - scene.goal_xyz[1]) < self.radius

    def progress(self, scene: Scene, state: WorldState) -> dict[str, float]:
        """``approach``: the tool to the point to push from. ``place``: the cube to the marker."""
        x, y, _ = state.item_xyz[scene.meant].tolist()
        goal_x, goal_y, _ = scene.goal_xyz
        distance = math.hypot(goal_x - x, goal_y - y)
        # Inside the success radius "behind" turns with every millimetre, so it fades out there.
        scale = self.behind / max(distance, self.radius)
        behind = (x - scale * (goal_x - x), y - scale * (goal_y - y), 0.03)
        # A free zone of 2.5 cm: contact is inside it, so starting to push never costs approach reward.
        gap = max(0.0, math.dist(state.ee_xyz.tolist(), behind) - 0.025)
        return {"approach": 1 - math.tanh(gap / 0.1), "place": 1 - math.tanh(distance / 0.15)}

    def solved(self, scene: Scene) -> Scene:
        """The cube is on the marker, the tool behind it."""
        cube = scene.items[scene.meant]
        x, y = scene.goal_xyz[:2]
        away = math.hypot(x - cube.xyz[0], y - cube.xyz[1]) or 1.0
        tool = (x - 0.045 * (x - cube.xyz[0]) / away, y - 0.045 * (y - cube.xyz[1]) / away, 0.03)
        return replace(_moved(scene, scene.goal_xyz), ee_xyz=tool)


class PandaPickPlace(Task):
    """Put the named cube on the marker on the named side, or lift it."""

    name = "PandaPickPlace"
    max_episode_steps = 80
    weights: ClassVar[dict[str, float]] = {"approach": 0.2, "grasp": 0.2, "lift": 0.2, "place": 0.25, "success": 0.15}
    edge = 0.045
    """[m] the cube's edge; the gripper opens to 0.08."""
    slots = (
        ("cube_0", "cube", 0.0225),
        ("cube_1", "cube", 0.0225),
        ("marker_left", "disc", 0.05),
        ("marker_right", "disc", 0.05),
    )
    radius = 0.045
    """[m] place success: planar distance of the cube's centre to the marker's."""
    lift_height = 0.15
    """[m] centre height asked for when the instruction is to lift; 0.10 is success."""
    place_templates = (
        "put the {colour} cube on the {side} marker",
        "pick up the {colour} cube, place it {side}",
        "place the {colour} block on the {side} disc",
        "take the {colour} cube to the {side} marker",
    )
    lift_templates = ("lift the {colour} cube", "pick up the {colour} block", "raise the {colour} cube off the table")
    held_out_templates: ClassVar = {
        "place": (
            "carry the {colour} cube over to the {side} disc",
            "set the {colour} block down on the {side} marker",
        ),
        "lift": ("hold the {colour} cube up in the air", "get the {colour} block off the table"),
    }

    def sample(self, rng: np.random.Generator) -> Scene:
        """Two cubes on the middle line, a marker on either side; three in ten instructions say to lift."""
        colours = _colours(rng, 2)
        middle = rng.uniform(0.47, 0.51)
        half = self.edge / 2
        cubes = [
            (middle - rng.uniform(0.05, 0.08), rng.uniform(-0.05, 0.05), half),
            (middle + rng.uniform(0.05, 0.08), rng.uniform(-0.05, 0.05), half),
        ]
        if rng.random() < 0.5:
            cubes.reverse()
        markers = [(middle + rng.uniform(-0.03, 0.03), sign * rng.uniform(0.13, 0.155), 0.0) for sign in (-1.0, 1.0)]
        yaws = [*rng.uniform(-0.15, 0.15, 2).tolist(), 0.0, 0.0]
        start = _uniform(rng, (middle - 0.05, -0.06, 0.12), (middle + 0.05, 0.06, 0.20))
        meant, side = int(rng.integers(2)), int(rng.integers(2))
        items = self._items([*cubes, *markers], [*colours, "violet", "violet"], yaws)
        if rng.random() < 0.3:
            instruction = _pick(rng, self.lift_templates).format(colour=colours[meant])
            goal = (*cubes[meant][:2], self.lift_height)
            return Scene(items, start, 0.08, meant, goal, instruction, kind="lift")
        instruction = _pick(rng, self.place_templates).format(colour=colours[meant], side=("left", "right")[side])
        return Scene(items, start, 0.08, meant, (*markers[side][:2], half), instruction, kind="place")

    def success(self, scene: Scene, state: WorldState) -> bool:
        """Lift: the cube's centre is above 10 cm. Place: it rests on the table with its centre above the marker."""
        x, y, z = state.item_xyz[scene.meant].tolist()
        if scene.kind == "lift":
            return z > 0.10
        return math.hypot(x - scene.goal_xyz[0], y - scene.goal_xyz[1]) < self.radius and z < self.edge / 2 + 0.01

    def progress(self, scene: Scene, state: WorldState) -> dict[str, float]:
        """``approach`` the cube, ``grasp`` it, ``lift`` it (or have it above its marker), ``place`` it at the goal."""
        cube = state.item_xyz[scene.meant].tolist()
        distance = math.dist(state.ee_xyz.tolist(), cube)
        held = math.exp(-((distance / 0.025) ** 2)) * (1 - min(1.0, abs(state.opening - self.edge) / 0.035))
        lifted = min(1.0, max(0.0, (cube[2] - self.edge / 2) / 0.08))
        if scene.kind == "place":
            planar = math.hypot(cube[0] - scene.goal_xyz[0], cube[1] - scene.goal_xyz[1])
            lifted = max(lifted, math.exp(-((planar / 0.05) ** 2)))
        return {
            "approach": 1 - math.tanh(distance / 0.1),
            "grasp": held,
            "lift": lifted,
            "place": 1 - math.tanh(math.dist(cube, scene.goal_xyz) / 0.15),
        }

    def solved(self, scene: Scene) -> Scene:
        """Lift: the cube is in the closed gripper. Place: it is on the marker and the open gripper above it."""
        x, y, z = scene.goal_xyz
        if scene.kind == "lift":
            return replace(_moved(scene, scene.goal_xyz), ee_xyz=scene.goal_xyz, opening=self.edge)
        return replace(_moved(scene, scene.goal_xyz), ee_xyz=(x, y, z + 0.10), opening=0.08)


TASKS: dict[str, Task] = {task.name: task for task in (PandaReach(), PandaPush(), PandaPickPlace())}
"""Name -> task. A task holds no state, so one instance serves every environment."""


def _colours(rng: np.random.Generator, count: int) -> list[str]:
    return [NAMED[i] for i in rng.permutation(len(NAMED))[:count]]


def _pick(rng: np.random.Generator, templates: tuple[str, ...]) -> str:
    return templates[int(rng.integers(len(templates)))]


def _uniform(
    rng: np.random.Generator, low: tuple[float, float, float], high: tuple[float, float, float]
) -> tuple[float, float, float]:
    x, y, z = rng.uniform(low, high).tolist()
    return x, y, z


def _moved(scene: Scene, xyz: tuple[float, float, float]) -> Scene:
    """The scene with the meant item at ``xyz``, square to the table's edges."""
    items = list(scene.items)
    items[scene.meant] = replace(items[scene.meant], xyz=xyz, yaw=0.0)
    return replace(scene, items=tuple(items))
