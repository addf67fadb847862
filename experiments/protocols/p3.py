"""P3: six of Meta-World's tasks with what was learned from 100,000 env steps of them.

The rule is iVideoGPT's (Wu et al. 2024, arXiv:2405.15223; github.com/thuml/iVideoGPT, ``mbrl``): model-based
reinforcement learning in button-press-topdown-wall, coffee-push, door-lock, hammer, handle-pull-side and plate-slide,
5 demonstrations, 100,000 env steps in all, episodes of 200 env steps (100 actions, each repeated), 64 px, success at
any step, 20 evaluation episodes.

What differs:

- Version 3 of the tasks, where theirs is version 2, and our own pictures.
- Goals of evaluation are from a list that no dataset of ``collect`` draws from.
- A learned row keeps the rule if its checkpoint saw no more than 100,000 env steps of a task (``--checkpoint``; the row
  names the hash of its data, whose ``collect`` command says how many those are). Without a checkpoint the row is not
  run. Planning takes the place of their reinforcement learning in imagination.
- The controls need no training: the scripted expert, and planning in the true simulator for the suite's reward.
"""

from __future__ import annotations

from emu_embodied.envs.registry import make
from emu_embodied.experiments.protocols.protocol import (
    EXPERT,
    IMAGINED_REWARD,
    RANDOM,
    SHOOTING_REWARD,
    STILL,
    TOKEN,
    TRUE_REWARD,
    Protocol,
)
from emu_embodied.policies.episode import EpisodeSimulator
from emu_embodied.policies.registry import PlanningBudget

TASKS = ("button-press-topdown-wall", "coffee-push", "door-lock", "hammer", "handle-pull-side", "plate-slide")


def make_env(env_id: str, *, image_size: int = 64) -> EpisodeSimulator:
    """Meta-World with the protocol's budget."""
    return make(env_id, image_size=image_size, max_episode_steps=200)


PROTOCOL = Protocol(
    name="p3",
    title="six Meta-World tasks at 100,000 env steps",
    suites=("metaworld",),
    env_ids=tuple(f"MetaWorld/{task}-v3" for task in TASKS),
    episodes=20,
    make=make_env,
    search=PlanningBudget(samples=32, iterations=2, horizon=4, replan_every=2),
    controls=(STILL, RANDOM, EXPERT, TRUE_REWARD, SHOOTING_REWARD, IMAGINED_REWARD, TOKEN),
    caution="the rule allows 100,000 env steps of a task",
)
