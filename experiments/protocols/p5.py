"""P5: Meta-World's reach and reach-wall, planned to the picture of the task solved; 100 env steps.

The rule is JEPA-WMs' (Meta FAIR 2025, github.com/facebookresearch/jepa-wms): the goal is what the scripted expert sees
in the end, plans are 6 blocks of 5 env steps long and 3 blocks are executed, CEM searches with 300 candidates in each
of 15 iterations, an episode has 100 env steps, and 48 episodes are judged by Meta-World's own success (hand within 5 cm
of the mark).

What differs:

- Success counts at any env step, as Meta-World itself counts; theirs is judged after the last executed stretch.
- Goals are from a list that no dataset of ``collect`` draws from (reset seeds below 100,000).
- The goal picture is the expert's with the highest reward among solved states, at most 20 env steps after the first.
- Pictures are our own (a closer camera, a larger mark, 64 px), and the mark of the goal is in them, as it is in theirs.
- The true-simulator control searches for Meta-World's own reward with the budget of the learned rows: a small part of
  4,500 candidates a decision.
"""

from __future__ import annotations

from emu_embodied.envs.registry import make
from emu_embodied.experiments.protocols.protocol import (
    EXPERT,
    IMAGINED,
    RANDOM,
    SHOOTING,
    STILL,
    TOKEN,
    TRUE_PICTURE,
    TRUE_REWARD,
    Protocol,
)
from emu_embodied.policies.episode import EpisodeSimulator
from emu_embodied.policies.registry import PlanningBudget


def make_env(env_id: str, *, image_size: int = 64) -> EpisodeSimulator:
    """Meta-World with the protocol's budget."""
    return make(env_id, image_size=image_size, max_episode_steps=100)


PROTOCOL = Protocol(
    name="p5",
    title="Meta-World reach and reach-wall, goal picture",
    suites=("metaworld",),
    env_ids=("MetaWorld/reach-v3", "MetaWorld/reach-wall-v3"),
    episodes=48,
    make=make_env,
    search=PlanningBudget(samples=32, iterations=2, horizon=4, replan_every=2),
    controls=(STILL, RANDOM, EXPERT, TRUE_REWARD, TRUE_PICTURE, SHOOTING, IMAGINED, TOKEN),
)
