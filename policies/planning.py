"""A policy that searches at every decision, over the learned model or over the true simulator."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from emu_embodied.planners.costs import averaged, penalised
from emu_embodied.planners.dynamics import ImaginedDynamics, Tokenize, TrueDynamics, evaluator
from emu_embodied.planners.objectives import GoalImage, GoalObjects, GoalProprio, WeightedSum
from emu_embodied.planners.proposals import Proposals, ProposedPlanner
from emu_embodied.planners.sampling import carry
from emu_embodied.protocols import Dynamics, Objective, Simulator, WorldModel
from emu_embodied.records import Field, Imagination, Observation
from emu_embodied.viz.trace import Decision, Future


class DynamicsSource(Protocol):
    """Follows an episode and gives the dynamics from its present state."""

    lasting: bool
    """Whether dynamics given earlier still start from their own state when the episode has gone on."""

    @property
    def device(self) -> torch.device:
        """Where imagination draws its random numbers."""
        ...

    def reset(self, observation: Observation) -> None:
        """An episode starts."""
        ...

    def advance(self, action_KA: np.ndarray, observation: Observation) -> None:
        """A block was executed and led to ``observation``."""
        ...

    def dynamics(self) -> ImaginedDynamics | TrueDynamics:
        """Dynamics from the present state."""
        ...


class ImaginedSource:
    """The learned model: keeps the belief and appends to it what really happened."""

    lasting = True

    def __init__(self, world_model: WorldModel):
        self.world_model = world_model
        self._dynamics: ImaginedDynamics | None = None

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return torch.device(getattr(self.world_model, "device", "cpu"))

    def reset(self, observation: Observation) -> None:
        """Observe the first state."""
        self._dynamics = ImaginedDynamics(self.world_model, self.world_model.observe([observation]))

    def advance(self, action_KA: np.ndarray, observation: Observation) -> None:
        """Extend the belief."""
        belief = self.world_model.extend(self.dynamics().belief, action_KA, observation)
        self._dynamics = ImaginedDynamics(self.world_model, belief)

    def dynamics(self) -> ImaginedDynamics:
        """Imagination from the present belief.

        Raises:
            ValueError: before the first ``reset``.
        """
        if self._dynamics is None:
            raise ValueError("reset the policy with the first observation before it acts")
        return self._dynamics


class TrueSource:
    """The simulator that the episode runs in; candidates are tried in it and undone.

    Args:
        simulator: that of the episode.
        tokenize: makes tokens of the states reached, for objectives that look at them.
    """

    lasting = False

    def __init__(self, simulator: Simulator, tokenize: Tokenize | None = None):
        self._dynamics = TrueDynamics(simulator, tokenize)

    @property
    def device(self) -> torch.device:
        """The CPU: a simulator draws nothing."""
        return torch.device("cpu")

    def reset(self, observation: Observation) -> None:
        """Nothing to follow: the simulator is the state."""

    def advance(self, action_KA: np.ndarray, observation: Observation) -> None:
        """Nothing to follow: the simulator is the state."""

    def dynamics(self) -> TrueDynamics:
        """The simulator from the state it is in."""
        return self._dynamics


class Guide(Protocol):
    """A policy that follows an episode and has a say in its plans."""

    def reset(self, observation: Observation) -> None:
        """An episode starts."""
        ...

    def advance(self, action_KA: np.ndarray, observation: Observation) -> None:
        """A block was executed and led to ``observation``."""
        ...

    def proposals(self, dynamics: Dynamics, generator: torch.Generator) -> Proposals:
        """What it would do from the present state; ``generator`` is of the noise of ``dynamics``."""
        ...

    def strangeness(self, actions_SHKA: torch.Tensor) -> torch.Tensor:
        """How unlikely it finds plans, float32 [S]; see ``emu_embodied.planners.costs``."""
        ...


class GoalSimulator(Protocol):
    """A simulator that can show its task solved."""

    @property
    def proprio_fields(self) -> tuple[Field, ...]:
        """Names, units and ranges of the proprio vector."""
        ...

    @property
    def object_fields(self) -> tuple[Field, ...]:
        """The same of ``Observation.objects``; empty where nothing is told."""
        ...

    def goal_observation(self) -> Observation:
        """The scene of the present episode with the task solved."""
        ...


class GoalOfEpisode:
    """Objective: be in the goal state of the episode at hand.

    The weighted sum of ``GoalImage``, ``GoalObjects`` and ``GoalProprio``, the last of fields that are positions (units
    m and px). Picture and proprio is how DINO-WM plans (Zhou et al. 2024).

    Args:
        simulator: shows the goal.
        world_model: its tokens and code vectors are what pictures are compared by, and it reads the objects out of the
            goal's picture; without it the simulator tells where they are, and pictures cannot be compared.
        picture_weight: of the picture; 0 leaves it out.
        objects_weight: of the objects; 0 leaves them out.
        proprio_weight: of proprio.

    Raises:
        ValueError: if a picture is asked for without a model, or objects of an environment that tells of none.
    """

    def __init__(
        self,
        simulator: GoalSimulator,
        world_model: WorldModel | None,
        *,
        picture_weight: float = 1.0,
        objects_weight: float = 0.0,
        proprio_weight: float = 2.0,
    ):
        self.simulator = simulator
        self.world_model = world_model
        self.picture_weight = picture_weight
        self.objects_weight = objects_weight
        self.proprio_weight = proprio_weight
        self._goal: Objective | None = None
        if picture_weight and world_model is None:
            raise ValueError("a goal picture is compared by a world model's tokens: give a checkpoint")
        if objects_weight and not simulator.object_fields:
            raise ValueError("this environment tells of no objects: plan for its goal picture (--objective goal)")

    def reset(self) -> None:
        """Look at the goal of the episode that has begun."""
        self.aim(self.simulator.goal_observation())

    def aim(self, goal: Observation) -> None:
        """Be in this state.

        Raises:
            ValueError: if objects are asked for that the model knows nothing of.
        """
        terms: list[tuple[float, Objective]] = []
        model, fields = self.world_model, self.simulator.proprio_fields
        if self.picture_weight and model is not None:
            picture = GoalImage(model.frames.embed, model.encode_frames(goal.frames))
            terms.append((self.picture_weight, picture))
        if self.objects_weight:
            seen_O = torch.from_numpy(goal.objects) if model is None else model.observe([goal]).objects_O
            if not len(seen_O):
                raise ValueError("the checkpoint knows of no objects: train on data that tells them, or plan for goal")
            terms.append((self.objects_weight, GoalObjects(seen_O.cpu(), self.simulator.object_fields)))
        places = {f.name: float(v) for f, v in zip(fields, goal.proprio, strict=True) if f.unit in ("m", "px")}
        if places:
            terms.append((self.proprio_weight, GoalProprio(places, fields)))
        self._goal = WeightedSum(tuple(terms))

    def __call__(self, imagination: Imagination) -> torch.Tensor:
        """Cost float32 [S]; see ``GoalImage``.

        Raises:
            ValueError: before the first ``reset``.
        """
        if self._goal is None:
            raise ValueError("reset the policy with the first observation before it acts")
        return self._goal(imagination)


class PlanningPolicy:
    """Plans, executes the first blocks of the plan, and starts the next search from what is left of it.

    Args:
        planner: searches.
        objective: what it searches for.
        source: what candidates are evaluated with.
        seed: of all random numbers; every episode starts from it, so the same episode gives the same actions.
        replan_every: blocks of a plan that are executed before the next search.
        guide: proposes candidates to the planner; how many is the planner's to say.
        strangeness: weight, beside the objective, of how unlikely the guide finds a plan.
        decodes: imaginations of each candidate, whose costs are averaged.
        record: keep what each plan was expected to lead to, and what the model foretells of the executed actions
            (``decisions`` and ``hindsight``), with frames. Costs a few more imagined futures, none of them counted in
            ``Decision.seconds``.
    """

    def __init__(
        self,
        planner: ProposedPlanner,
        objective: Objective,
        source: DynamicsSource,
        *,
        seed: int = 0,
        replan_every: int = 1,
        guide: Guide | None = None,
        strangeness: float = 0.0,
        decodes: int = 1,
        record: bool = False,
    ):
        if replan_every < 1:
            raise ValueError(f"replan_every must be at least 1 block, got {replan_every}")
        if strangeness < 0 or (strangeness > 0 and guide is None):
            raise ValueError(f"strangeness={strangeness} must not be negative, and needs a guide to judge it")
        self.planner = planner
        self.objective = objective
        self.source = source
        self.seed = seed
        self.replan_every = replan_every
        self.guide = guide
        self.strangeness = strangeness
        self.decodes = decodes
        self.record = record
        self.decisions: list[Decision] = []
        self.hindsight: list[Future] = []
        self._search_generator = torch.Generator()
        self._model_generator = torch.Generator(source.device)
        self._executed: list[np.ndarray] = []
        self._anchor: tuple[int, ImaginedDynamics | TrueDynamics] | None = None
        self._fresh = False

    def reset(self, observation: Observation) -> None:
        """Start an episode."""
        self.decisions, self.hindsight, self._executed, self._anchor = [], [], [], None
        self._fresh = False
        self._search_generator.manual_seed(self.seed)
        self._model_generator.manual_seed(self.seed)
        self.source.reset(observation)
        if self.guide is not None:
            self.guide.reset(observation)
        if isinstance(self.objective, GoalOfEpisode):
            self.objective.reset()

    def act(self, observation: Observation) -> np.ndarray:
        """The next block float32 [K, A]; the one returned before is taken to have led to ``observation``."""
        if self._executed:
            self.source.advance(self._executed[-1], observation)
            if self.guide is not None:
                self.guide.advance(self._executed[-1], observation)
        block = len(self._executed)
        if self._fresh or not self.decisions or block - self.decisions[-1].block >= self._blocks_per_plan():
            self._decide(block)
        plan = self.decisions[-1].plan
        action_KA = plan.actions_HKA[block - self.decisions[-1].block].cpu().numpy()
        self._executed.append(action_KA)
        return action_KA

    def start_afresh(self) -> None:
        """The objective has changed: search anew at the next block, from nothing."""
        self._fresh = True

    def finish(self) -> None:
        """The episode is over: complete the record."""
        if self._anchor is not None and self._anchor[0] < len(self._executed):
            start, dynamics = self._anchor
            self.hindsight.append(self._foresee(dynamics, start, self._executed[start:]))
        self._anchor = None

    def _blocks_per_plan(self) -> int:
        return min(self.replan_every, len(self.decisions[-1].plan.actions_HKA))

    def _decide(self, block: int) -> None:
        began = time.perf_counter()
        dynamics = self.source.dynamics()
        warm_start = None
        if self.decisions and not self._fresh:
            previous = self.decisions[-1]
            warm_start = carry(previous.plan, block - previous.block)
        evaluate = averaged(evaluator(dynamics, self.objective, self._model_generator), self.decodes)
        proposals = None
        if self.guide is not None:
            proposals = self.guide.proposals(dynamics, self._model_generator)
            if self.strangeness > 0:
                evaluate = penalised(evaluate, self.guide.strangeness, self.strangeness)
        plan = self.planner.plan(evaluate, warm_start, self._search_generator, proposals)
        self._fresh = False
        seconds = time.perf_counter() - began
        future = None
        if self.record:
            future = self._foresee(dynamics, block, list(plan.actions_HKA.cpu().numpy()))
            self._remember(dynamics, block, len(plan.actions_HKA))
        self.decisions.append(Decision(block, plan, seconds, future))

    def _remember(self, dynamics: ImaginedDynamics | TrueDynamics, block: int, horizon: int) -> None:
        """Let one stretch of hindsight end here and the next begin, once it is as long as a plan."""
        if not self.source.lasting:
            return
        if self._anchor is not None and block - self._anchor[0] >= horizon:
            self.finish()
        if self._anchor is None:
            self._anchor = (block, dynamics)

    def _foresee(self, dynamics: ImaginedDynamics | TrueDynamics, start: int, actions: Sequence[np.ndarray]) -> Future:
        actions_HKA = np.stack(actions)
        # Its own generator, so that recording an episode does not change it.
        generator = torch.Generator(self.source.device).manual_seed(self.seed)
        imagination, frames = dynamics.foresee(torch.from_numpy(actions_HKA), generator)
        return Future(
            start=start,
            actions_HKA=actions_HKA,
            frames=frames,
            proprio_HP=imagination.proprio_SHP[0].cpu().numpy(),
            reward_H=imagination.reward_SH[0].float().cpu().numpy(),
            success_H=imagination.success_SH[0].float().cpu().numpy(),
        )
