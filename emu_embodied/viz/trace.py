"""What happened in one planned episode, and what was imagined of it: everything a picture or a verdict is made from.

Shape letters: T blocks executed, H blocks of one future, K env steps in a block, A action dims, P proprio dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emu_embodied.records import Field, Frames, Plan


@dataclass(frozen=True, slots=True)
class Future:
    """What was expected of H action blocks.

    Attributes:
        start: blocks executed before the first of them; state ``start + h + 1`` of the episode is what ``h`` foretells.
        actions_HKA: float32 [H, K, A], the actions it was expected of.
        frames: camera -> uint8 [H, height, width, 3].
        proprio_HP: float32 [H, P] in the units of the environment.
        reward_H: float32 [H].
        success_H: float32 [H], probability that the state reached solves the task.
    """

    start: int
    actions_HKA: np.ndarray
    frames: Frames
    proprio_HP: np.ndarray
    reward_H: np.ndarray
    success_H: np.ndarray

    def __len__(self) -> int:
        """Number of blocks H."""
        return len(self.actions_HKA)


@dataclass(frozen=True, slots=True)
class Decision:
    """One search of a planner.

    Attributes:
        block: blocks executed before it.
        plan: what was decided.
        seconds: wall time of the search [s].
        future: what was expected of the plan; None where that was not recorded.
    """

    block: int
    plan: Plan
    seconds: float
    future: Future | None


@dataclass(frozen=True, slots=True)
class SubgoalTrace:
    """What came of one subgoal.

    Attributes:
        text: its sentence.
        start: blocks executed before it was pursued.
        blocks: blocks executed while it was.
        outcome: ``reached``, ``missed`` (its blocks were used up) or ``unfinished`` (the episode was over).
        place: distance from its place when it was left [m]; None if it has none.
        picture: distance of the pictures' code vectors then.
        first_place: ``place`` when it was taken up.
        first_picture: ``picture`` when it was taken up.
        keyframe: its imagined pictures, camera -> uint8 [height, width, 3]; empty where that was not recorded.
        achieved: what was seen when it was left, likewise.
    """

    text: str
    start: int
    blocks: int
    outcome: str
    place: float | None
    picture: float
    first_place: float | None
    first_picture: float
    keyframe: Frames
    achieved: Frames


@dataclass(frozen=True, slots=True)
class EpisodeTrace:
    """One episode of T blocks (T + 1 states).

    Attributes:
        env_id: environment id.
        policy: name of the policy.
        seed: reset seed of the environment.
        instruction: what was asked.
        proprio_fields: names, units and ranges of the P proprio entries.
        frames: camera -> uint8 [T + 1, height, width, 3]; empty if the episode ran without rendering.
        proprio_TP: float32 [T + 1, P].
        actions_TKA: float32 [T, K, A].
        reward_T: float32 [T + 1], reward of each state between blocks.
        success: whether any env step of the episode solved the task.
        episode_return: sum of the rewards of all env steps the budget allows; those after the first success, which ends
            the episode, count with the solved state's reward.
        act_seconds_T: float [T], wall time of the policy per block [s].
        decisions: the planner's searches, in order; empty for policies that do not plan.
        hindsight: what the model foretells of the actions that were *executed*, in stretches that cover the episode.
        subgoals: what was pursued, in order; empty for policies that name no subtasks.
        ended: why no further subgoal was pursued; empty where that did not happen.
    """

    env_id: str
    policy: str
    seed: int
    instruction: str
    proprio_fields: tuple[Field, ...]
    frames: Frames
    proprio_TP: np.ndarray
    actions_TKA: np.ndarray
    reward_T: np.ndarray
    success: bool
    episode_return: float
    act_seconds_T: np.ndarray
    decisions: tuple[Decision, ...] = ()
    hindsight: tuple[Future, ...] = ()
    subgoals: tuple[SubgoalTrace, ...] = ()
    ended: str = ""

    def __len__(self) -> int:
        """Number of blocks T."""
        return len(self.actions_TKA)

    @property
    def planned_blocks(self) -> int:
        """Blocks until the policy stopped planning, all T if it did not."""
        if not self.ended:
            return len(self)
        return max((subgoal.start + subgoal.blocks for subgoal in self.subgoals), default=0)

    @property
    def compared_cameras(self) -> tuple[str, ...]:
        """Cameras that were drawn and imagined; all that were drawn where nothing was imagined."""
        futures = [*self.hindsight, *(decision.future for decision in self.decisions if decision.future is not None)]
        return tuple(name for name in self.frames if all(name in future.frames for future in futures))

    @property
    def verdict(self) -> str:
        """One line: whether it succeeded, when, and at what price."""
        outcome = "solved" if self.success else "not solved"
        blocks = "1 block" if len(self) == 1 else f"{len(self)} blocks"
        mean = float(self.act_seconds_T.mean()) if len(self) else 0.0
        return f"{self.env_id} seed {self.seed}, {self.policy}: {outcome} after {blocks}, {mean:.2f} s a decision"
