"""Policies by name, and the one budget that all planning policies share."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from emu_embodied.planners.proposals import ProposedPlanner
from emu_embodied.planners.registry import find_objective, has_setting, make_planner
from emu_embodied.planners.sampling import PlanSpace
from emu_embodied.planners.subgoals import Pursuit, SubgoalSettings
from emu_embodied.policies.episode import EpisodeSimulator
from emu_embodied.policies.planning import (
    DynamicsSource,
    GoalOfEpisode,
    Guide,
    ImaginedSource,
    PlanningPolicy,
    TrueSource,
)
from emu_embodied.policies.random import RandomPolicy
from emu_embodied.policies.subgoals import SubgoalPolicy
from emu_embodied.policies.token import ActingSettings, TokenPolicy
from emu_embodied.protocols import Objective, Policy, SubgoalModel, WorldModel
from emu_embodied.records import Stream

if TYPE_CHECKING:
    from emu_embodied.acting import Actor

POLICIES: dict[str, str] = {
    "random": "uniformly random blocks",
    "scripted": "the task's state machine, which sees the true state",
    "token": "the backbone itself, which emits action tokens",
    "shooting": "random shooting in imagination: the same candidates to spend, no refinement",
    "imagined": "a planner in imagination",
    "true": "the same planner in the true simulator: what a perfect model would give",
    "subgoals": "the planner in imagination, towards subtasks that the model names and pictures one after another",
    "true_subgoals": "the same subtasks, planned in the true simulator: what is lost by the subtasks alone",
}
"""Name -> what it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanningBudget:
    """What a search may cost: one budget for shooting, imagined and true, so that their rows can be compared."""

    samples: int = 32
    """Candidates per iteration."""
    iterations: int = 2
    """Iterations per decision; shooting spends them on fresh candidates."""
    horizon: int = 2
    """Length of a plan [blocks]."""
    knots_per_block: int = 1
    """Free actions per block; each is held for its share of the block."""
    replan_every: int = 1
    """Blocks of a plan that are executed before the next search [blocks]."""
    init_std: float = 0.6
    """Standard deviation of the first candidates [action units; the box is 2 wide]. What matters most: it should be
    about that of the actions that a task takes."""
    correlation: float = 0.5
    """Correlation of neighbouring knots' noise, in [0, 1)."""
    beta: float | None = None
    """Exponent of coloured noise, in place of ``correlation``: 0 is white, 2 drifts. The planner's own if left out."""
    decodes: int = 1
    """Imaginations of each candidate, whose costs are averaged; each costs as much as a candidate."""
    proposals: float = 0.0
    """Share of the first candidates (of the blocks that beam tries) that the checkpoint's token policy proposes, in
    [0, 1]."""
    proposal_temperature: float = 1.0
    """Of what the token policy proposes."""
    strangeness: float = 0.0
    """Weight, beside the objective, of how unlikely the token policy finds a plan's first block: 0 for what it would do
    for sure, 1 where all blocks are alike to it."""
    answer: Literal["best", "mean"] = "mean"
    """What a planner that refines returns: the cheapest candidate, or its last mean (one candidate more), which a noisy
    model flatters less."""

    def __post_init__(self) -> None:
        if self.decodes < 1:
            raise ValueError(f"decodes is {self.decodes}, it has to be at least 1")
        if not 0.0 <= self.proposals <= 1.0:
            raise ValueError(f"proposals is {self.proposals}, it has to lie in [0, 1]")
        if not self.strangeness >= 0:
            raise ValueError(f"strangeness is {self.strangeness}, it has to be at least 0")

    @property
    def evaluations(self) -> int:
        """Imagined futures per decision, those behind proposals not counted."""
        return self.samples * self.iterations * self.decodes


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicySpec:
    """A policy and all it needs, small enough to cross into worker processes, which build their own."""

    name: str = "imagined"
    """One of ``POLICIES``."""
    checkpoint: str = "nano"
    """World model of the imagining policies and of ``token``: a shipped name or a folder."""
    planner: str = "cem"
    """Planner of ``imagined`` and ``true``: one of ``PLANNERS``."""
    objective: str = "reward"
    """What planning policies search for: reward, success, both of these, goal (the goal picture and place), or objects
    (where the model sees things in the goal picture, and place)."""
    budget: PlanningBudget = field(default_factory=PlanningBudget)
    """What a search may cost."""
    subgoals: SubgoalSettings = field(default_factory=SubgoalSettings)
    """How ``subgoals`` and ``true_subgoals`` go from one subtask to the next."""
    stream: Stream = "pictures"
    """What is imagined: frames and numbers, or numbers alone, at a fifth of the cost, where the weights know them."""
    acting: ActingSettings = field(default_factory=ActingSettings)
    """How ``token`` decides, and how much of the past it looks at where it proposes."""
    device: str = "cpu"
    """Device of the world model."""

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            near = get_close_matches(self.name, POLICIES, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown policy {self.name!r}: {hint}known are {', '.join(POLICIES)}")

    @property
    def plans(self) -> bool:
        """Whether it searches."""
        return self.name not in ("random", "scripted", "token")

    @property
    def imagines(self) -> bool:
        """Whether it imagines what its actions lead to."""
        return self.name in ("shooting", "imagined", "subgoals")

    @property
    def guided(self) -> bool:
        """Whether the token policy has a say in its plans; shooting is a control and stays unguided."""
        return self.plans and self.name != "shooting" and (self.budget.proposals > 0 or self.budget.strangeness > 0)

    @property
    def looks(self) -> bool:
        """Whether it looks at frames."""
        return self.imagines or self.names_subtasks or self.guided or self.name == "token"

    @property
    def names_subtasks(self) -> bool:
        """Whether it pursues subgoals, which take the place of ``objective``."""
        return self.name in ("subgoals", "true_subgoals")

    @property
    def needs_model(self) -> bool:
        """Whether it needs a world model: to act, to imagine, or to measure how far a frame is from the goal's."""
        return self.looks or (self.plans and self.objective == "goal")

    def build(self, simulator: EpisodeSimulator, seed: int) -> Policy:
        """The policy for one episode; the world model is loaded once in a process.

        Raises:
            ValueError: if the checkpoint cannot be loaded or was made for another embodiment.
        """
        world_model = None
        if self.needs_model:
            world_model = _load_world_model(self.checkpoint, self.device, self.stream)
            check_fits(world_model, simulator)
        return make_policy(self, simulator, seed=seed, world_model=world_model)


def make_policy(
    spec: PolicySpec,
    simulator: EpisodeSimulator,
    *,
    seed: int = 0,
    world_model: WorldModel | None = None,
    subgoal_model: SubgoalModel | None = None,
    record: bool = False,
) -> Policy:
    """Make a policy for a simulator.

    Args:
        spec: which policy; its checkpoint is not looked at.
        simulator: where it will act; has ``block`` and ``action_space``.
        seed: of all its random numbers.
        world_model: what acts as ``token``, what ``shooting`` and ``imagined`` imagine with, and what the ``goal``
            objective measures with.
        subgoal_model: what ``subgoals`` and ``true_subgoals`` are told by; the world model itself if left out.
        record: keep what a planning policy imagined (see ``PlanningPolicy``).

    Raises:
        ValueError: if a world model is needed and missing, or has another block size than the simulator.
    """
    action_dim = simulator.action_space.shape[0]
    if spec.name == "random":
        # Not the bare seed: an environment draws its scene from that stream, and a policy must not follow it.
        return RandomPolicy(simulator.block, action_dim, np.random.default_rng([seed, 1]))
    if spec.name == "scripted":
        # Not above: not everyone who plans has an engine at hand.
        from emu_embodied.envs.panda import PandaEnv
        from emu_embodied.envs.suites.world import SuiteEnv
        from emu_embodied.policies.behaviours import make_behaviour

        if not isinstance(simulator, PandaEnv | SuiteEnv):
            raise ValueError(f"there is no scripted expert for {simulator.env_id}; try another policy")
        return make_behaviour("expert", simulator, np.random.default_rng([seed, 2]))
    if spec.needs_model and world_model is None:
        how = f" with objective {spec.objective}" if spec.plans else ""
        raise ValueError(f"the {spec.name} policy{how} needs a world model: give a checkpoint")
    if spec.stream == "numbers" and spec.plans and (spec.objective == "goal" or spec.names_subtasks):
        raise ValueError("numbers cannot be compared with a goal picture: plan for objects, reward or success")
    if spec.name == "token":
        return TokenPolicy(_actor(world_model, spec.acting), temperature=spec.acting.temperature, seed=seed)
    objective: Objective
    source: DynamicsSource
    if spec.names_subtasks and world_model is not None:
        teller = world_model if subgoal_model is None else subgoal_model
        if not isinstance(teller, SubgoalModel):
            raise ValueError(f"{type(teller).__name__} names no subtasks: give a model that does")
        objective = Pursuit(teller, world_model, simulator.proprio_fields, spec.subgoals, record=record)
        source = TrueSource(simulator, world_model.encode_frames)
    elif spec.objective == "goal" and world_model is not None:
        objective = GoalOfEpisode(simulator, world_model)
        source = TrueSource(simulator, world_model.encode_frames)
    elif spec.objective == "objects":
        # In the true simulator nothing has to be seen: it tells where things are.
        model = world_model if spec.imagines else None
        objective = GoalOfEpisode(simulator, model, picture_weight=0.0, objects_weight=1.0, proprio_weight=1.0)
        source = TrueSource(simulator)
    else:
        objective = find_objective(spec.objective)
        source = TrueSource(simulator)
    if spec.imagines and world_model is not None:
        if world_model.block != simulator.block:
            raise ValueError(
                f"the world model has blocks of {world_model.block} env steps, the environment of {simulator.block}"
            )
        source = ImaginedSource(world_model)
    budget = spec.budget
    planner = _planner("shooting" if spec.name == "shooting" else spec.planner, budget, simulator)
    guide: Guide | None = None
    if spec.guided:
        from emu_embodied.policies.guides import TokenGuide  # slow to import, and few need it

        guide = TokenGuide(_actor(world_model, spec.acting), temperature=budget.proposal_temperature)
        if not spec.imagines and world_model is not None:
            source = TrueSource(simulator, world_model.encode_frames)
    options: dict[str, Any] = {
        "seed": seed,
        "replan_every": budget.replan_every,
        "guide": guide,
        "strangeness": budget.strangeness if guide is not None else 0.0,
        "decodes": budget.decodes,
        "record": record,
    }
    if isinstance(objective, Pursuit):
        still_KA = np.zeros((simulator.block, action_dim), np.float32)
        return SubgoalPolicy(planner, objective, source, still_KA, **options)
    return PlanningPolicy(planner, objective, source, **options)


def _planner(name: str, budget: PlanningBudget, simulator: EpisodeSimulator) -> ProposedPlanner:
    """The planner of that name with as much of the budget as it knows."""
    space = PlanSpace(
        horizon=budget.horizon,
        block=simulator.block,
        action_dim=simulator.action_space.shape[0],
        knots_per_block=budget.knots_per_block,
    )
    settings: dict[str, Any] = {
        "samples": budget.samples,
        "iterations": budget.iterations,
        "init_std": budget.init_std,
        "correlation": budget.correlation,
        "proposal_share": budget.proposals,
    }
    if budget.beta is not None:
        settings["beta"] = budget.beta
    if has_setting(name, "answer"):
        settings["answer"] = budget.answer
    return make_planner(name, space, **settings)


def _actor(world_model: WorldModel | None, settings: ActingSettings) -> Actor:
    """The policy role of a world model."""
    from emu_embodied.acting import Actor  # slow to import, as is the next
    from emu_embodied.world_model import WorldModel as TrainedWorldModel

    if not isinstance(world_model, TrainedWorldModel):
        raise ValueError(f"{type(world_model).__name__} emits no action tokens: give a checkpoint")
    return Actor(world_model, context_states=settings.context_states)


def check_fits(world_model: Any, simulator: EpisodeSimulator) -> None:
    """Refuse a world model that was made for another embodiment than the simulator's.

    Raises:
        ValueError: naming both values of what differs.
    """
    config = world_model.config
    pairs = {
        "action dimensions": (config.action_dim, simulator.action_space.shape[0]),
        "env steps in a block": (config.block, simulator.block),
        "proprio fields": ([f.name for f in config.proprio], [f.name for f in simulator.proprio_fields]),
        "pixels a side": (config.image_size, simulator.image_size),
    }
    if config.objects and simulator.object_fields:
        pairs["objects"] = ([f.name for f in config.objects], [f.name for f in simulator.object_fields])
    for what, (trained, given) in pairs.items():
        if trained != given:
            raise ValueError(f"the checkpoint does not fit {simulator.env_id}, {what}: {trained} against {given}")
    missing = [camera for camera in config.cameras if camera not in simulator.cameras]
    if missing:
        raise ValueError(
            f"the checkpoint does not fit {simulator.env_id}, cameras: it reads {', '.join(config.cameras)}, "
            f"the environment draws {', '.join(simulator.cameras)}"
        )
    if simulator.env_id not in config.env_ids:
        trained_on = ", ".join(config.env_ids)
        warnings.warn(f"{simulator.env_id} is not among what the checkpoint was trained on: {trained_on}", stacklevel=2)


@lru_cache(maxsize=2)
def _load_world_model(checkpoint: str, device: str, stream: Stream) -> WorldModel:
    from emu_embodied.hardware import pick_dtype
    from emu_embodied.world_model import WorldModel as TrainedWorldModel

    if device.startswith("cuda"):  # imagination alone: nothing is trained in this precision
        world = TrainedWorldModel.from_pretrained(checkpoint, device=device, dtype=pick_dtype("auto", device))
    else:
        world = TrainedWorldModel.from_pretrained(checkpoint, device=device)
    return world.with_stream(stream)
