"""Pushes a block in the plane: a model of one push, a search over two of them, and the way around the block.

Contacts are without friction and the block has no momentum (Push-T damps all of it), so a push along the inward normal
n at r from the centre of mass moves it by n and turns it by (r x n) / inertia, scaled so that the contact follows the
disc.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

AGENT_RADIUS = 15.0
"""[px]"""
_AROUND = 128.0
"""[px] from the middle of the block: no part of it is this far, disc included."""
_LENGTHS = (6.0, 14.0, 28.0, 55.0)
"""[px] lengths of pushes that are considered."""
_LOW, _HIGH = AGENT_RADIUS + 8.0, 512.0 - AGENT_RADIUS - 8.0


@dataclass(frozen=True, slots=True)
class Block:
    """Convex parts of a rigid body and where it is."""

    parts: tuple[np.ndarray, ...]
    """Corners float64 [M, 2] of each part, in the body's own frame [px]."""
    centre: np.ndarray
    """float64 [2] centre of mass, in the same frame [px]."""
    inertia: float
    """Moment of inertia over mass [px^2]."""
    position: np.ndarray
    """float64 [2] where the frame's origin is [px]."""
    angle: float
    """[rad]"""

    @property
    def middle(self) -> np.ndarray:
        """float64 [2], where the centre of mass is [px]."""
        return self.to_world(self.centre[None])[0]

    @property
    def corners(self) -> np.ndarray:
        """float64 [N, 2], all parts' corners where they are [px]."""
        return self.to_world(np.concatenate(self.parts))

    def to_world(self, points: np.ndarray) -> np.ndarray:
        """Points [N, 2] of the body's frame -> where they are [px]."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return self.position + points @ np.array([[cos, sin], [-sin, cos]])

    def turned(self, normals: np.ndarray) -> np.ndarray:
        """Directions [N, 2] of the body's frame -> the world's."""
        return self.to_world(normals) - self.position

    def distance(self, points: np.ndarray) -> np.ndarray:
        """float64 [N]: how far points [N, 2] in the world are from the block [px]; 0 within."""
        return np.min([_outside(self.to_world(part), points) for part in self.parts], axis=0)

    def contacts(self, spacing: float = 14.0) -> tuple[np.ndarray, np.ndarray]:
        """Places on the outline that the disc can touch, and the outward normals there: [N, 2] each, own frame."""
        places: list[np.ndarray] = []
        normals: list[np.ndarray] = []
        for part in self.parts:
            middle = part.mean(0)
            for start, end in zip(part, np.roll(part, -1, axis=0), strict=True):
                along = end - start
                length = float(np.linalg.norm(along))
                outward = np.array([along[1], -along[0]]) / length
                if outward @ (start - middle) < 0:
                    outward = -outward
                shares = (np.arange(max(1, round(length / spacing))) + 0.5) / max(1, round(length / spacing))
                places.extend(start + share * along for share in shares)
                normals.extend([outward] * len(shares))
        places_N2, normals_N2 = np.array(places), np.array(normals)
        own = replace(self, position=np.zeros(2), angle=0.0)
        free = own.distance(places_N2 + (AGENT_RADIUS + 1) * normals_N2) > AGENT_RADIUS
        return places_N2[free], normals_N2[free]


class Scene(Protocol):
    """What a pusher sees."""

    @property
    def agent(self) -> np.ndarray:
        """float64 [2] [px]."""
        ...

    def block(self) -> Block:
        """The block where it is."""
        ...

    def goal_block(self) -> Block:
        """The block where it should be."""
        ...


class Pusher:
    """An oracle: finds the two pushes that bring the block closest to the goal, makes the first, looks again.

    Args:
        scene: what it sees.
        rng: draws pushes at random where ``playful``.
        playful: push anywhere from any side instead, as far as it comes; for data, not for success.
    """

    def __init__(self, scene: Scene, rng: np.random.Generator, *, playful: bool = False) -> None:
        self._scene, self._rng, self._playful = scene, rng, playful
        self._script: Iterator[np.ndarray] = iter(())
        self.phase = "start"

    def act(self) -> np.ndarray:
        """See ``Oracle``: the move towards the next place, in units of 100 px."""
        while True:
            for action in self._script:
                return action
            self._script = self._push()

    def _push(self) -> Iterator[np.ndarray]:
        """One push: around the block, up to it, and through; then it is time to choose again."""
        block = self._scene.block()
        place, normal, length = self._choose(block)
        before = place + (AGENT_RADIUS + 6) * normal
        yield from self._travel(block, before, normal)
        self.phase = "push"
        yield from self._go(place + (AGENT_RADIUS - length) * normal, near=1.0, most=8)
        self.phase = "retreat"
        yield from self._go(self._scene.agent + 12 * normal, near=6.0, most=3)

    def _choose(self, block: Block) -> tuple[np.ndarray, np.ndarray, float]:
        """Where to push [px] (world), the outward normal there, and how far [px]."""
        contacts, normals = block.contacts()
        places, outward = block.to_world(contacts), block.turned(normals)
        starts = places + (AGENT_RADIUS + 6) * outward
        reachable = np.flatnonzero(((starts > _LOW) & (starts < _HIGH)).all(1))
        if len(reachable) == 0:
            reachable = np.arange(len(places))
        if self._playful:
            pick = int(self._rng.choice(reachable))
            length = float(self._rng.uniform(5.0, 90.0))
            if self._rng.random() < 0.15:
                length = -4.0  # come near and turn away
            return places[pick], outward[pick], length
        goal = self._scene.goal_block().corners
        lengths = np.array(_LENGTHS)
        pushes = np.stack(np.meshgrid(np.arange(len(contacts)), np.arange(len(lengths)), indexing="ij"), -1)
        pushes = pushes.reshape(-1, 2)
        shift_P3 = _displacement(block, contacts[pushes[:, 0]], normals[pushes[:, 0]], lengths[pushes[:, 1]])
        first = np.flatnonzero(np.isin(pushes[:, 0], reachable))
        points = np.concatenate(block.parts) - block.centre
        poses = _moved(np.array([[*block.middle, block.angle]]), shift_P3[first])[0]
        cost_F = _corner_error(poses, points, goal)
        best = np.argsort(cost_F)[:40]  # a second push is tried after the most promising, and after some others
        tried = np.unique(np.concatenate([best, self._rng.choice(len(first), min(40, len(first)), replace=False)]))
        second = _moved(poses[tried], shift_P3)
        cost_T = np.minimum(cost_F[tried], _corner_error(second, points, goal).min(1) + 1.5)
        # The way around costs time: of pushes that are about as good, take the nearer.
        way = np.linalg.norm(starts[pushes[first[tried], 0]] - self._scene.agent, axis=1)
        pick, size = pushes[first[tried[int(np.argmin(cost_T + 0.004 * way))]]]
        return places[pick], outward[pick], float(lengths[size])

    def _travel(self, block: Block, target: np.ndarray, normal: np.ndarray) -> Iterator[np.ndarray]:
        """Go to a place beside the block without touching it."""
        self.phase = "approach"
        if not self._is_free(block, self._scene.agent, target):
            middle = block.middle
            out = self._scene.agent - middle
            yield from self._go(_ring(middle, math.atan2(out[1], out[0])), near=20.0, most=6)
            door = target + normal * _way_out(target - middle, normal)
            end = math.atan2(*(door - middle)[::-1])
            for _ in range(12):
                if self._is_free(block, self._scene.agent, door):
                    break
                out = self._scene.agent - middle
                angle = math.atan2(out[1], out[0])
                turn = (end - angle + math.pi) % (2 * math.pi) - math.pi
                if not _inside(_ring_end(middle, angle, turn)):
                    turn += -2 * math.pi if turn > 0 else 2 * math.pi
                yield from self._go(_ring(middle, angle + float(np.clip(turn, -0.7, 0.7))), near=25.0, most=3)
            yield from self._go(door, near=12.0, most=6)
        yield from self._go(target, near=3.0, most=6)

    def _is_free(self, block: Block, start: np.ndarray, end: np.ndarray) -> bool:
        steps = np.linspace(0.0, 1.0, 24)[1:, None]
        return bool((block.distance(start + steps * (end - start)) > AGENT_RADIUS + 1).all())

    def _go(self, target: np.ndarray, *, near: float, most: int) -> Iterator[np.ndarray]:
        """At most ``most`` env steps towards a place; fewer where the disc comes within ``near`` [px] of it."""
        target = np.clip(target, _LOW, _HIGH)
        for _ in range(most):
            move = target - self._scene.agent
            if float(np.linalg.norm(move)) < near:
                return
            yield move / max(100.0, float(np.abs(move).max()))


def _displacement(block: Block, contacts: np.ndarray, normals: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """What pushes do to the block, in its own frame: float64 [P, 3], move of the centre of mass [px] and turn [rad]."""
    inward = -normals
    lever = contacts - block.centre
    torque = lever[:, 0] * inward[:, 1] - lever[:, 1] * inward[:, 0]
    impulse = lengths / (1 + torque**2 / block.inertia)
    return np.column_stack([impulse[:, None] * inward, impulse * torque / block.inertia])


def _moved(poses_T3: np.ndarray, shifts_P3: np.ndarray) -> np.ndarray:
    """Poses (centre of mass, angle) after pushes: float64 [T, P, 3]."""
    angle = poses_T3[:, None, 2] + shifts_P3[None, :, 2] / 2  # halfway: the block turns while it moves
    cos, sin = np.cos(angle), np.sin(angle)
    x = poses_T3[:, None, 0] + cos * shifts_P3[None, :, 0] - sin * shifts_P3[None, :, 1]
    y = poses_T3[:, None, 1] + sin * shifts_P3[None, :, 0] + cos * shifts_P3[None, :, 1]
    return np.stack([x, y, poses_T3[:, None, 2] + shifts_P3[None, :, 2]], axis=-1)


def _corner_error(poses: np.ndarray, points_N2: np.ndarray, goal_N2: np.ndarray) -> np.ndarray:
    """Mean distance of the corners from where they belong [px], for poses [..., 3]."""
    cos, sin = np.cos(poses[..., 2, None]), np.sin(poses[..., 2, None])
    x = poses[..., 0, None] + cos * points_N2[:, 0] - sin * points_N2[:, 1] - goal_N2[:, 0]
    y = poses[..., 1, None] + sin * points_N2[:, 0] + cos * points_N2[:, 1] - goal_N2[:, 1]
    return np.hypot(x, y).mean(-1)


def _outside(polygon: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distance of points [N, 2] from a convex polygon [M, 2] [px]; 0 within."""
    start, along = polygon, np.roll(polygon, -1, axis=0) - polygon
    away = points[:, None] - start
    share = np.clip((away * along).sum(-1) / (along**2).sum(-1), 0.0, 1.0)
    nearest = np.linalg.norm(away - share[..., None] * along, axis=-1).min(1)
    cross = along[:, 0] * away[..., 1] - along[:, 1] * away[..., 0]
    within = (cross >= 0).all(1) | (cross <= 0).all(1)
    return np.where(within, 0.0, nearest)


def _ring(middle: np.ndarray, angle: float) -> np.ndarray:
    return middle + _AROUND * np.array([math.cos(angle), math.sin(angle)])


def _ring_end(middle: np.ndarray, angle: float, turn: float) -> np.ndarray:
    return _ring(middle, angle + turn / 2)


def _inside(point: np.ndarray) -> bool:
    return bool(((point > _LOW - 40) & (point < _HIGH + 40)).all())


def _way_out(offset: np.ndarray, direction: np.ndarray) -> float:
    """How far along a unit direction from ``offset`` (from the middle) to the ring [px]."""
    b = float(offset @ direction)
    c = float(offset @ offset) - _AROUND**2
    return max(0.0, -b + math.sqrt(max(b * b - c, 0.0)))
