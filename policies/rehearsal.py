"""Behaviours for suites: experts and play that choose single env steps, made into action blocks.

An oracle of a suite looks at the state before every env step; a policy here has to name a whole block. So the block is
rehearsed: the oracle runs in the simulator itself from a snapshot, which is then restored. Snapshots are exact, hence
so is the rehearsal.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from emu_embodied.envs.suites.world import Oracle, SuiteEnv
from emu_embodied.policies.random import RandomPolicy
from emu_embodied.records import Observation


class _MakeOracle(Protocol):
    def __call__(self, simulator: SuiteEnv, rng: np.random.Generator, /) -> Oracle: ...


class Rehearsed:
    """A block of what an oracle does.

    Args:
        simulator: the environment to act in.
        make_oracle: makes the oracle of an episode.
        rng: where its random numbers come from.
    """

    def __init__(self, simulator: SuiteEnv, make_oracle: _MakeOracle, rng: np.random.Generator) -> None:
        self._simulator, self._make_oracle, self._rng = simulator, make_oracle, rng
        self._oracle = make_oracle(simulator, rng)
        self.phase = "start"

    def reset(self, observation: Observation) -> None:
        """Start an episode."""
        self._oracle = self._make_oracle(self._simulator, self._rng)
        self.phase = "start"

    def act(self, observation: Observation) -> np.ndarray:
        """The next action block, float32 [K, A]."""
        simulator = self._simulator
        before = simulator.snapshot()
        actions = []
        try:
            for _ in range(simulator.block):
                # As float32 from the start: it is what will be executed.
                actions.append(np.clip(self._oracle.act(), -1.0, 1.0).astype(np.float32))
                simulator.step_block(actions[-1][None], render=False)
        finally:
            simulator.restore(before)
        self.phase = self._oracle.phase
        return np.stack(actions)


class Astray:
    """An oracle with noise that lasts, and now and then a few blocks of something else.

    Args:
        simulator: the environment.
        oracle: what to stray from.
        rng: where the noise comes from; its strength is drawn anew for every episode.
    """

    _MEMORY = 0.9
    """Correlation of the noise from env step to env step."""

    def __init__(self, simulator: SuiteEnv, oracle: Oracle, rng: np.random.Generator) -> None:
        self._oracle, self._rng = oracle, rng
        self._block = simulator.block
        self._dims = simulator.action_dim
        self._strength = rng.uniform(0.05, 0.5)
        self._noise = self._strength * rng.standard_normal(self._dims)
        self._random, self._left = np.zeros(self._dims), 0
        self.phase = "start"

    def act(self) -> np.ndarray:
        """See ``Oracle``."""
        fresh = math.sqrt(1 - self._MEMORY**2) * self._strength * self._rng.standard_normal(self._dims)
        self._noise = self._MEMORY * self._noise + fresh
        if self._left == 0 and self._rng.random() < 0.02:
            self._left = self._block * int(self._rng.integers(1, 4))
            self._random = self._rng.uniform(-1, 1, self._dims)
        if self._left > 0:
            self._left -= 1
            self.phase = "random"
            return self._random
        action = self._oracle.act()
        self.phase = self._oracle.phase
        return action + self._noise


def make_expert(simulator: SuiteEnv, rng: np.random.Generator) -> Rehearsed:
    """The suite's own scripted expert.

    Raises:
        ValueError: if it has none.
    """
    if simulator.world.oracle(np.random.default_rng(0)) is None:
        raise ValueError(f"{simulator.env_id} comes without a scripted expert: try random, or --mixture random=1")
    return Rehearsed(simulator, _oracle, rng)


def make_noisy(simulator: SuiteEnv, rng: np.random.Generator) -> Rehearsed:
    """The expert with noise and detours.

    Raises:
        ValueError: if there is no expert.
    """
    make_expert(simulator, rng)
    return Rehearsed(simulator, _astray, rng)


def make_play(simulator: SuiteEnv, rng: np.random.Generator) -> Rehearsed | RandomPolicy:
    """Contact without a goal; random actions where a suite does not know what there is to touch."""
    if simulator.world.player(np.random.default_rng(0)) is None:
        return RandomPolicy(simulator.block, simulator.action_dim, rng)
    return Rehearsed(simulator, _play, rng)


def _oracle(simulator: SuiteEnv, rng: np.random.Generator) -> Oracle:
    oracle = simulator.world.oracle(rng)
    assert oracle is not None, "make_expert looks for it first"
    return oracle


def _astray(simulator: SuiteEnv, rng: np.random.Generator) -> Oracle:
    return Astray(simulator, _oracle(simulator, rng), rng)


def _play(simulator: SuiteEnv, rng: np.random.Generator) -> Oracle:
    player = simulator.world.player(rng)
    assert player is not None, "make_play looks for it first"
    return player
