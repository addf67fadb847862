"""A point mass on a table, as a simulator and as a world model that knows it exactly: the smallest world to plan in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from emu_embodied.records import Belief, Field, Frames, Imagination, Observation, Subgoal, Transition

STEP = 0.04  # m of travel per env step at full action
REACHED = 0.03  # m
GRID = 8  # tokens per side; a frame is a one-hot picture of the cell the point is in
PIXELS = 32


def reward_of(position: np.ndarray, goal: np.ndarray) -> np.ndarray:
    return 1.0 - np.tanh(3.0 * np.linalg.norm(position - goal, axis=-1))


def draw(position: np.ndarray, goal: np.ndarray) -> np.ndarray:
    image = np.full((PIXELS, PIXELS, 3), 235, np.uint8)
    for point, colour, radius in ((goal, (60, 160, 90), 3), (position, (200, 60, 50), 2)):
        row, column = ((1.0 - np.array([point[1], -point[0]])) / 2 * (PIXELS - 1)).round().astype(int)
        image[max(row - radius, 0) : row + radius + 1, max(column - radius, 0) : column + radius + 1] = colour
    return image


@dataclass(frozen=True)
class State:
    position: np.ndarray
    goal: np.ndarray
    steps: int


class PointMass:
    """Simulator: action is a velocity in the plane, goal drawn by the seed."""

    proprio_fields = (
        Field("ee_x", "m", -1.0, 1.0),
        Field("ee_y", "m", -1.0, 1.0),
        Field("goal_x", "m", -1.0, 1.0),
        Field("goal_y", "m", -1.0, 1.0),
    )

    object_fields = ()
    block = 5
    cameras = ("front",)
    image_size = PIXELS
    env_id = "PointMass-v0"

    def __init__(self, max_episode_steps: int = 60):
        self.action_space = SimpleNamespace(shape=(2,))
        self.max_episode_steps = max_episode_steps
        self.rendered = 0
        self.fail_at: int | None = None
        self.reset(seed=0)

    def close(self) -> None: ...

    def reward(self) -> float:
        return float(reward_of(self.state.position, self.state.goal))

    def success(self) -> bool:
        return bool(np.linalg.norm(self.state.position - self.state.goal) < REACHED)

    def reset(self, *, seed: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        rng = np.random.default_rng(seed)
        angle = rng.uniform(0, 2 * np.pi)
        self.state = State(np.zeros(2), 0.7 * np.array([np.cos(angle), np.sin(angle)]), 0)
        return {}, {}

    def snapshot(self) -> State:
        return self.state

    def restore(self, snapshot: State) -> None:
        self.state = snapshot

    def observe(self, *, render: bool = True) -> Observation:
        self.rendered += render
        frames = {"front": draw(self.state.position, self.state.goal)} if render else {}
        proprio = np.concatenate([self.state.position, self.state.goal]).astype(np.float32)
        return Observation(frames, proprio, "move the red dot to the green square")

    def step_block(self, actions_KA: np.ndarray, *, render: bool = True) -> Transition:
        rewards, successes = [], []
        for action in actions_KA:
            if self.fail_at is not None and self.state.steps >= self.fail_at:
                raise RuntimeError("the simulator broke")
            position = np.clip(self.state.position + STEP * np.clip(action, -1, 1), -1, 1)
            self.state = replace(self.state, position=position, steps=self.state.steps + 1)
            rewards.append(self.reward())
            successes.append(self.success())
        return Transition(
            observation=self.observe(render=render),
            rewards_K=np.array(rewards, np.float32),
            terms={"reach": float(rewards[-1])},
            success=successes[-1],
            success_any=any(successes),
            truncated=self.state.steps >= self.max_episode_steps,
        )


def tokenize(frames: Frames) -> torch.Tensor:
    """Tokens [GRID * GRID]: 1 where red is, 0 elsewhere."""
    red = (frames["front"][..., 0] > 150) & (frames["front"][..., 1] < 100)
    cells = red.reshape(GRID, PIXELS // GRID, GRID, PIXELS // GRID).any(axis=(1, 3))
    return torch.from_numpy(cells.reshape(-1).astype(np.int64))


def keyframe(text: str, place: np.ndarray, goal: np.ndarray) -> Subgoal:
    """The point at a place, in words, tokens and proprio."""
    proprio = torch.from_numpy(np.concatenate([place, goal]).astype(np.float32))
    return Subgoal(text, tokenize({"front": draw(place, goal)}), proprio, float(reward_of(place, goal)), 0.0)


class PointMassModel:
    """World model with the true physics; ``drift`` is the error it makes per block [m]."""

    block = 5
    horizon = 4

    def __init__(self, drift: float = 0.0):
        self.drift = drift
        self.calls: list[str] = []
        self.imagined: list[int] = []

    def observe(self, history: Sequence[Observation], actions: Sequence[np.ndarray] = ()) -> Belief:
        self.calls.append("observe")
        last = history[-1]
        proprio, nothing = torch.tensor(last.proprio), torch.zeros(0)
        return Belief(None, tokenize(last.frames), proprio, nothing, tuple(history), tuple(actions))

    def extend(self, belief: Belief, action_KA: np.ndarray, observation: Observation) -> Belief:
        self.calls.append("extend")
        return Belief(
            None,
            tokenize(observation.frames),
            torch.tensor(observation.proprio),
            torch.zeros(0),
            (*belief.history, observation),
            (*belief.actions, action_KA),
        )

    def imagine(
        self, belief: Belief, actions_SHKA: torch.Tensor, generator: torch.Generator | None = None
    ) -> Imagination:
        self.imagined.append(len(actions_SHKA))
        goal = belief.proprio_P[2:].numpy()
        moves = (STEP * actions_SHKA).sum(dim=2).cumsum(dim=1).numpy()
        steps = np.arange(1, moves.shape[1] + 1)[None, :, None]
        positions = np.clip(belief.proprio_P[:2].numpy() + moves + self.drift * steps, -1, 1)
        goals = np.broadcast_to(goal, positions.shape)
        frames = [[draw(p, goal) for p in plan] for plan in positions]
        return Imagination(
            tokens_SHN=torch.stack([torch.stack([tokenize({"front": f}) for f in plan]) for plan in frames]),
            proprio_SHP=torch.from_numpy(np.concatenate([positions, goals], axis=-1).astype(np.float32)),
            reward_SH=torch.from_numpy(reward_of(positions, goal).astype(np.float32)),
            success_SH=torch.from_numpy((np.linalg.norm(positions - goal, axis=-1) < REACHED).astype(np.float32)),
        )

    @property
    def frames(self) -> PointMassModel:
        """Its own frame tokenizer."""
        return self

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(codes, 2).float()

    def encode_frames(self, frames: Frames) -> torch.Tensor:
        return tokenize(frames)

    def propose(
        self, observation: Observation, steps: int, generator: torch.Generator | None = None
    ) -> tuple[Subgoal, ...]:
        """Half way to the goal and to the goal; nothing where it is."""
        position, goal = observation.proprio[:2], observation.proprio[2:]
        away = float(np.linalg.norm(goal - position))
        if away < REACHED:
            return ()
        places = [goal] if away < 0.2 else [(position + goal) / 2, goal]
        names = ["move onto the green square"] if away < 0.2 else ["move half way", "move onto the green square"]
        return tuple(keyframe(name, place, goal) for name, place in zip(names, places, strict=True))[:steps]

    def render(self, imagination: Imagination, plans: Sequence[int], horizons: Sequence[int]) -> Frames:
        proprio = imagination.proprio_SHP.numpy()
        return {"front": np.stack([[draw(proprio[s, h, :2], proprio[s, h, 2:]) for h in horizons] for s in plans])}


def make_point_mass(env_id: str) -> PointMass:
    return PointMass()
