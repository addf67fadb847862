"""One episode: a policy in a simulator, until the first success or the end of the step budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from emu_embodied.data.recording import RecordedSimulator
from emu_embodied.policies.planning import PlanningPolicy
from emu_embodied.policies.subgoals import SubgoalPolicy
from emu_embodied.protocols import Policy
from emu_embodied.records import Observation, Transition
from emu_embodied.viz.trace import EpisodeTrace


class EpisodeSimulator(RecordedSimulator, Protocol):
    """A simulator that policies are made for and judged in."""

    env_id: str
    """Environment id."""
    action_space: Any
    """Box whose shape is ``(A,)``."""
    block: int
    """K, env steps in an action block [env steps]."""
    max_episode_steps: int
    """Step budget of an episode [env steps]."""
    cameras: tuple[str, ...]
    """Names of the pictures in an observation."""
    image_size: int
    """Side of a picture [pixels]."""

    def goal_observation(self) -> Observation:
        """The scene of the present episode with the task solved."""
        ...


def run_episode(
    simulator: EpisodeSimulator,
    policy: Policy,
    *,
    seed: int,
    env_id: str = "",
    policy_name: str = "",
    render: bool = True,
    on_block: Callable[[Transition], None] | None = None,
) -> EpisodeTrace:
    """Reset the simulator and let the policy act until the first success or the end of the budget.

    Args:
        simulator: where it happens; the policy may have been made for it.
        policy: what acts.
        seed: reset seed.
        env_id: label of the trace.
        policy_name: label of the trace.
        render: draw every state; a policy that looks at frames needs them.
        on_block: called after every block, for progress bars.
    """
    simulator.reset(seed=seed)
    observation = simulator.observe(render=render)
    policy.reset(observation)
    observations, rewards_T = [observation], [simulator.reward()]
    actions, rewards, seconds = [], [], []
    over = success = False
    while not over:
        began = time.perf_counter()
        action_KA = np.asarray(policy.act(observation), np.float32)
        seconds.append(time.perf_counter() - began)
        transition = simulator.step_block(action_KA, render=render)
        observation, success = transition.observation, transition.success_any
        over = success or transition.truncated
        observations.append(observation)
        actions.append(action_KA)
        rewards.append(np.asarray(transition.rewards_K, np.float32))
        rewards_T.append(float(transition.rewards_K[-1]))
        if on_block is not None:
            on_block(transition)
    planning = policy if isinstance(policy, PlanningPolicy) else None
    if planning is not None:
        planning.finish()
    pursuing = policy if isinstance(policy, SubgoalPolicy) else None
    if pursuing is not None:
        pursuing.conclude(observation, solved=success)
    return EpisodeTrace(
        env_id=env_id,
        policy=policy_name,
        seed=seed,
        instruction=observations[0].instruction,
        proprio_fields=tuple(simulator.proprio_fields),
        frames={name: np.stack([seen.frames[name] for seen in observations]) for name in observations[0].frames},
        proprio_TP=np.stack([seen.proprio for seen in observations]).astype(np.float32),
        actions_TKA=np.stack(actions),
        reward_T=np.asarray(rewards_T, np.float32),
        success=success,
        episode_return=_return(np.concatenate(rewards), success, simulator.max_episode_steps),
        act_seconds_T=np.asarray(seconds),
        decisions=() if planning is None else tuple(planning.decisions),
        hindsight=() if planning is None else tuple(planning.hindsight),
        subgoals=() if pursuing is None else pursuing.subgoals,
        ended="" if pursuing is None else pursuing.ended,
    )


def _return(rewards: np.ndarray, success: bool, budget: int) -> float:
    """Sum over the whole budget: without the part after a success, the quicker policy would have the lower return."""
    solved = float(rewards.max()) if success else 0.0
    return float(rewards.sum()) + solved * max(0, budget - len(rewards))
