"""The dot of ``tests.tiny`` as a simulator: it drifts as its actions say, and has arrived at the right edge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.records import Episode, Observation, Transition
from tests import tiny

TO_THE_RIGHT = np.repeat(np.array([[[1.0, -0.5]]], np.float32), tiny.BLOCK, 1)


class Table:
    """Simulator that tiny models fit."""

    env_id = "Dot-v0"
    block = tiny.BLOCK
    cameras = tiny.CAMERAS
    image_size = tiny.SIZE
    proprio_fields = tiny.FIELDS
    object_fields = tiny.OBJECTS

    def __init__(self, max_episode_steps: int = 12) -> None:
        self.action_space = SimpleNamespace(shape=(tiny.ACTIONS,))
        self.max_episode_steps = max_episode_steps
        self.reset(seed=0)

    def close(self) -> None: ...

    def reset(self, *, seed: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        self.place, self.steps = np.random.default_rng(seed).uniform(0.1, 0.4, 2), 0
        return {}, {}

    def snapshot(self) -> tuple[np.ndarray, int]:
        return self.place, self.steps

    def restore(self, snapshot: tuple[np.ndarray, int]) -> None:
        self.place, self.steps = snapshot

    def reward(self) -> float:
        return float(self.place[0])

    def success(self) -> bool:
        return bool(self.place[0] > 0.8)

    def observe(self, *, render: bool = True) -> Observation:
        frames = tiny.draw(*self.place) if render else {}
        proprio = np.array([*self.place, 0.0], np.float32)
        return Observation(frames, proprio, "go right 0", self.place.astype(np.float32))

    def step_block(self, actions_KA: np.ndarray, *, render: bool = True) -> Transition:
        rewards, successes = [], []
        for action in actions_KA:
            self.place = np.clip(self.place + 0.1 * np.clip(action, -1, 1), 0, 1)
            self.steps += 1
            rewards.append(self.reward())
            successes.append(self.success())
        return Transition(
            self.observe(render=render), np.array(rewards, np.float32), {"right": rewards[-1]}, successes[-1],
            any(successes), self.steps >= self.max_episode_steps,
        )  # fmt: skip


def make_table(env_id: str, image_size: int = tiny.SIZE) -> Table:
    return Table()


def expert_episode(seed: int, blocks: int = 5) -> Episode:
    """To the right and a little up, until it is there, and stays."""
    table = Table()
    table.reset(seed=seed)
    states, actions, rewards, success = [table.observe()], [], [table.reward()], [table.success()]
    for _ in range(blocks):
        action = np.zeros_like(TO_THE_RIGHT[0]) if success[-1] else TO_THE_RIGHT[0]
        table.step_block(action)
        actions.append(action)
        states.append(table.observe())
        rewards.append(table.reward())
        success.append(table.success())
    return replace(
        tiny.make_episode(seed, blocks),
        instruction="go right 0",
        frames={camera: np.stack([state.frames[camera] for state in states]) for camera in tiny.CAMERAS},
        proprio_TP=np.stack([state.proprio for state in states]),
        actions_TKA=np.stack(actions),
        rewards_TK=np.repeat(np.array(rewards[1:], np.float32)[:, None], tiny.BLOCK, 1),
        reward_T=np.array(rewards, np.float32),
        success_T=np.array(success),
        objects_TO=np.stack([state.objects for state in states]),
    )


def expert_store(folder: Path, episodes: int = 8) -> EpisodeStore:
    """A dataset of experts alone."""
    store = tiny.make_store(folder, episodes=0)
    for seed in range(episodes):
        store.append(expert_episode(seed))
    return store
