"""A policy that asks a model what to do next and plans its way to each answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from emu_embodied.planners.proposals import ProposedPlanner
from emu_embodied.planners.subgoals import Pursuit
from emu_embodied.policies.planning import DynamicsSource, PlanningPolicy
from emu_embodied.records import Observation
from emu_embodied.viz.trace import SubgoalTrace


class SubgoalPolicy(PlanningPolicy):
    """Plans towards one subgoal after another; holds still once the pursuit has ended.

    Args:
        planner: searches.
        pursuit: which subgoal is at hand, and what plans are searched for.
        source: what candidates are evaluated with.
        still_KA: the block that holds still.
        options: of ``PlanningPolicy``; a new subgoal starts a search at once, whatever ``replan_every`` says.
    """

    def __init__(
        self,
        planner: ProposedPlanner,
        pursuit: Pursuit,
        source: DynamicsSource,
        still_KA: np.ndarray,
        **options: Any,
    ):
        super().__init__(planner, pursuit, source, **options)
        self.pursuit = pursuit
        self.still_KA = still_KA
        self._proposals = torch.Generator()

    @property
    def subgoals(self) -> tuple[SubgoalTrace, ...]:
        """What came of each subgoal so far."""
        return tuple(self.pursuit.traces)

    @property
    def doing(self) -> str:
        """The sentence of the subtask at hand, or why there is none."""
        return self.pursuit.doing or self.pursuit.ended

    @property
    def ended(self) -> str:
        """Why it stopped pursuing subgoals; empty if it did not."""
        return self.pursuit.ended

    def reset(self, observation: Observation) -> None:
        """Start an episode."""
        super().reset(observation)
        self._proposals.manual_seed(self.seed)
        self.pursuit.reset()

    def act(self, observation: Observation) -> np.ndarray:
        """The next block float32 [K, A]; ``still_KA`` once the pursuit has ended."""
        if self.pursuit.look(observation, len(self._executed), self._proposals):
            self.start_afresh()
        if not self.pursuit.ended:
            return super().act(observation)
        self._executed.append(self.still_KA)
        return self.still_KA

    def conclude(self, observation: Observation, *, solved: bool) -> None:
        """The episode is over, in this state: complete the record of subgoals."""
        self.pursuit.finish(observation, len(self._executed), solved=solved)
