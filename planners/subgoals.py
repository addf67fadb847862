"""Reaching subgoals one after another: what is pursued, when it is reached, when to ask again and when to give up.

A ``SubgoalModel`` says what to do next in words and as the state that completes it; a planner searches for actions that
lead there. This file is what stands between: it never sees a planner or a simulator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from emu_embodied.planners.objectives import GoalImage, GoalProprio, WeightedSum
from emu_embodied.protocols import Objective, SubgoalModel, WorldModel
from emu_embodied.records import Field, Frames, Imagination, Observation, Subgoal
from emu_embodied.viz.trace import SubgoalTrace


@dataclass(frozen=True, kw_only=True, slots=True)
class SubgoalSettings:
    """How subgoals are pursued."""

    steps: int = 2
    """Subtasks asked for at a time; those after the first start from an imagined state [subtasks]."""
    blocks: int = 4
    """Blocks that one subtask may take; experts take 1 to 4 [blocks]."""
    retries: int = 2
    """How often in a row it may ask again without having come nearer, before it gives up."""
    near: float = 0.03
    """A keyframe's place is reached within this distance over the proprio fields in metres [m]."""
    alike: float = 0.7
    """A keyframe's picture is reached within this distance of code vectors, see ``GoalImage``; in [0, 4]."""
    progress: float = 0.2
    """Share of the way to a keyframe that counts as having come nearer to it."""
    proprio_weight: float = 10.0
    """Of a keyframe's place beside its picture, in what plans are searched for. More than of a true goal: an imagined
    picture is rougher than an imagined place, and the search stops where its noise does."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: naming the field and its range.
        """
        for name in ("steps", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it has to be at least 1")
        if self.retries < 0:
            raise ValueError(f"retries is {self.retries}, it has to be at least 0")
        for name in ("near", "alike"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, it has to be positive")
        if not 0 <= self.progress < 1:
            raise ValueError(f"progress is {self.progress}, it has to lie in [0, 1)")


@dataclass(frozen=True, slots=True)
class Gap:
    """How far an observation is from a keyframe.

    Attributes:
        place: Euclidean distance over the proprio fields in metres [m]; None if the keyframe has no proprio.
        picture: distance of the pictures' code vectors, in [0, 4].
        share: the larger of both in units of what counts as reached; 1 or less is reached.
    """

    place: float | None
    picture: float
    share: float

    @property
    def reached(self) -> bool:
        """Whether the keyframe is reached."""
        return self.share <= 1


class Keyframe:
    """A subgoal as an objective and as something to measure against.

    Args:
        subgoal: what is to be reached.
        world_model: its code vectors are what pictures are compared by.
        fields: the environment's ``proprio_fields``; the velocities among them are not part of a keyframe.
        settings: weights and thresholds.
    """

    def __init__(
        self, subgoal: Subgoal, world_model: WorldModel, fields: Sequence[Field], settings: SubgoalSettings
    ) -> None:
        self.subgoal = subgoal
        self._world_model, self._settings = world_model, settings
        self._picture = GoalImage(world_model.frames.embed, subgoal.tokens_N)
        self._places = [i for i, field in enumerate(fields) if field.unit == "m"]
        terms: list[tuple[float, Objective]] = [(1.0, self._picture)]
        if subgoal.proprio_P is not None:
            goal = {fields[i].name: float(subgoal.proprio_P[i]) for i in self._places}
            terms.append((settings.proprio_weight, GoalProprio(goal, fields)))
        self._cost = WeightedSum(tuple(terms))

    def cost(self, imagination: Imagination) -> torch.Tensor:
        """Cost float32 [S] of futures, as of a goal picture and place."""
        return self._cost(imagination)

    def gap(self, observation: Observation) -> Gap:
        """How far an observation is from it."""
        settings = self._settings
        picture = float(self._picture.distance(self._world_model.encode_frames(observation.frames)))
        share, place = picture / settings.alike, None
        if self.subgoal.proprio_P is not None:
            away = torch.as_tensor(observation.proprio)[self._places] - self.subgoal.proprio_P.cpu()[self._places]
            place = float(away.norm())
            share = max(share, place / settings.near)
        return Gap(place, picture, share)


@dataclass(slots=True)
class _Attempt:
    """The subgoal that is pursued."""

    keyframe: Keyframe
    start: int
    first: Gap
    best: float


class Pursuit:
    """The objective of the subgoal at hand, and the way from one to the next.

    Asks the model for subtasks, pursues them in order, each for at most ``blocks`` blocks; asks again from where it is
    when one is missed or none is left. It ends when the model says that nothing is left to do, or after ``retries``
    more proposals in a row without progress: one that is missed without coming nearer (``progress``), or one that
    is reached and is proposed again.

    Args:
        model: proposes.
        world_model: measures distances between pictures, and draws keyframes.
        fields: the environment's ``proprio_fields``.
        settings: budgets and thresholds.
        record: keep pictures of keyframes and of what was reached.

    Attributes:
        traces: what came of each subgoal, in order.
        ended: why it ended; empty while it goes on.
    """

    def __init__(
        self,
        model: SubgoalModel,
        world_model: WorldModel,
        fields: Sequence[Field],
        settings: SubgoalSettings | None = None,
        *,
        record: bool = False,
    ) -> None:
        self.model, self.world_model, self.fields = model, world_model, tuple(fields)
        self.settings = settings or SubgoalSettings()
        self.record = record
        self.reset()

    def reset(self) -> None:
        """An episode starts."""
        self.traces: list[SubgoalTrace] = []
        self.ended = ""
        self._agenda: deque[Subgoal] = deque()
        self._attempt: _Attempt | None = None
        self._failures = 0
        self._asked = ""

    @property
    def doing(self) -> str:
        """The sentence of the subgoal at hand; empty if there is none."""
        return "" if self._attempt is None else self._attempt.keyframe.subgoal.text

    def __call__(self, imagination: Imagination) -> torch.Tensor:
        """Cost float32 [S] of futures with regard to the subgoal at hand.

        Raises:
            ValueError: if there is none.
        """
        if self._attempt is None:
            raise ValueError("no subgoal is pursued: show the present observation first")
        return self._attempt.keyframe.cost(imagination)

    def look(self, observation: Observation, block: int, generator: torch.Generator) -> bool:
        """Take in what is seen after ``block`` blocks, and decide what is pursued from here.

        Returns:
            Whether that is another subgoal than before.
        """
        if self.ended:
            return False
        if self._attempt is not None and not self._over(observation, block):
            return False
        while not self.ended and self._attempt is None:
            if not self._agenda and not self._ask(observation, generator):
                return True
            self._begin(observation, block)
        return True

    def finish(self, observation: Observation, block: int, *, solved: bool) -> None:
        """The episode is over: close what is open."""
        if self._attempt is not None:
            gap = self._attempt.keyframe.gap(observation)
            self._close(observation, block, gap, "reached" if solved or gap.reached else "unfinished")

    def _over(self, observation: Observation, block: int) -> bool:
        """Whether the attempt at hand is over, reached or missed."""
        attempt = self._attempt
        assert attempt is not None
        gap = attempt.keyframe.gap(observation)
        attempt.best = min(attempt.best, gap.share)
        if gap.reached:
            self._close(observation, block, gap, "reached")
            return True
        if block - attempt.start < self.settings.blocks:
            return False
        nearer = attempt.best <= (1 - self.settings.progress) * attempt.first.share
        self._failures = 0 if nearer else self._failures + 1
        self._agenda.clear()
        self._asked = ""
        self._close(observation, block, gap, "missed")
        if self._failures > self.settings.retries:
            self.ended = f"gave up: {self._failures} times in a row no nearer to it, last: {self.traces[-1].text!r}"
        return True

    def _ask(self, observation: Observation, generator: torch.Generator) -> bool:
        """Ask what to do from here; False if that is nothing, or the same as ever."""
        found = self.model.propose(observation, self.settings.steps, generator)
        if not found:
            self.ended = "the model says that nothing is left to do"
            return False
        if self._asked:  # all of the last proposal was reached
            self._failures = self._failures + 1 if found[0].text == self._asked else 0
        if self._failures > self.settings.retries:
            self.ended = f"gave up: {found[0].text!r} was reached {self._failures} times, and the model says it again"
            return False
        self._asked = found[0].text
        self._agenda.extend(found)
        return True

    def _begin(self, observation: Observation, block: int) -> None:
        """Pursue the first of the agenda that is not reached already; the last in any case, for a block at least."""
        while True:
            keyframe = Keyframe(self._agenda.popleft(), self.world_model, self.fields, self.settings)
            gap = keyframe.gap(observation)
            self._attempt = _Attempt(keyframe, block, gap, gap.share)
            if not gap.reached or not self._agenda:
                return
            self._close(observation, block, gap, "reached")

    def _close(self, observation: Observation, block: int, gap: Gap, outcome: str) -> None:
        attempt = self._attempt
        assert attempt is not None
        subgoal = attempt.keyframe.subgoal
        self.traces.append(
            SubgoalTrace(
                text=subgoal.text,
                start=attempt.start,
                blocks=block - attempt.start,
                outcome=outcome,
                place=gap.place,
                picture=gap.picture,
                first_place=attempt.first.place,
                first_picture=attempt.first.picture,
                keyframe=self._draw(subgoal) if self.record else {},
                achieved=dict(observation.frames) if self.record else {},
            )
        )
        self._attempt = None

    def _draw(self, subgoal: Subgoal) -> Frames:
        if subgoal.frames:
            return subgoal.frames
        proprio = torch.zeros(len(self.fields)) if subgoal.proprio_P is None else subgoal.proprio_P
        nothing = torch.zeros(1, 1)
        still = Imagination(subgoal.tokens_N[None, None], proprio[None, None], nothing, nothing)
        return {camera: frames[0, 0] for camera, frames in self.world_model.render(still, [0], [0]).items()}
