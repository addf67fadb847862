"""One recorded episode: what a simulator and a behaviour must offer, and the loop between them."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from emu_embodied.protocols import Simulator
from emu_embodied.records import Episode, Observation


class RecordedSimulator(Simulator, Protocol):
    """A simulator whose episodes can be recorded."""

    block: int
    """K, env steps in one action block [env steps]."""
    action_space: Any
    """Gymnasium box of shape [A]."""

    def reset(self, *, seed: int | None = None) -> Any:
        """Start the episode that ``seed`` determines."""
        ...

    def reward(self) -> float:
        """Reward of the current state, in [0, 1]."""
        ...

    def success(self) -> bool:
        """Whether the current state solves the task."""
        ...

    def close(self) -> None:
        """Free the renderer."""
        ...


class SimulatorFactory(Protocol):
    """Makes the simulator of an id."""

    def __call__(self, env_id: str, /) -> RecordedSimulator:
        """A new simulator."""
        ...


class Behaviour(Protocol):
    """A policy that also says what it is doing. It may look into the simulator it was made for."""

    @property
    def phase(self) -> str:
        """Label of the block that ``act`` gave last: ``approach``, ``grasp`` ..."""
        ...

    def reset(self, observation: Observation) -> None:
        """Start an episode."""
        ...

    def act(self, observation: Observation) -> np.ndarray:
        """The next action block, float32 [K, A] in [-1, 1]."""
        ...


class BehaviourFactory(Protocol):
    """Makes a behaviour for one episode."""

    def __call__(self, simulator: Any, rng: np.random.Generator, /) -> Behaviour:
        """A behaviour that draws all its randomness from ``rng``; it gives blocks of ``simulator.block`` env steps."""
        ...


def record_episode(
    simulator: RecordedSimulator, behaviour: Behaviour, *, env_id: str, seed: int, source: str
) -> Episode:
    """Reset the simulator and let the behaviour act until the episode's step budget is used up.

    Args:
        simulator: where it happens.
        behaviour: what acts; its phases are recorded.
        env_id: id of the simulator.
        seed: reset seed.
        source: name of the behaviour.
    """
    simulator.reset(seed=seed)
    observation = simulator.observe()
    behaviour.reset(observation)
    observations, rewards, successes = [observation], [simulator.reward()], [simulator.success()]
    actions, rewards_TK, phases = [], [], []
    truncated = False
    while not truncated:
        actions_KA = np.asarray(behaviour.act(observation), np.float32)
        transition = simulator.step_block(actions_KA)
        observation, truncated = transition.observation, transition.truncated
        observations.append(observation)
        actions.append(actions_KA)
        rewards_TK.append(transition.rewards_K)
        rewards.append(float(transition.rewards_K[-1]))
        successes.append(transition.success)
        phases.append(behaviour.phase)
    return Episode(
        env_id=env_id,
        seed=seed,
        source=source,
        instruction=observations[0].instruction,
        frames={name: np.stack([seen.frames[name] for seen in observations]) for name in observations[0].frames},
        proprio_TP=np.stack([seen.proprio for seen in observations]).astype(np.float32),
        actions_TKA=np.stack(actions),
        rewards_TK=np.stack(rewards_TK).astype(np.float32),
        reward_T=np.asarray(rewards, np.float32),
        success_T=np.asarray(successes, np.bool_),
        phases=tuple(phases),
        objects_TO=np.stack([seen.objects for seen in observations]).astype(np.float32),
    )
