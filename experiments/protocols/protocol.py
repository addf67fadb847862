"""What a protocol is: environments, how many episodes, what may be spent, and the rows of its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any
from typing import Protocol as Seam

from emu_embodied.experiments.protocols.goals import Replay, Still
from emu_embodied.policies.episode import EpisodeSimulator
from emu_embodied.policies.evaluate import MakePolicy
from emu_embodied.policies.registry import PlanningBudget, PolicySpec


class MakeProtocolEnv(Seam):
    """Makes the simulator of a protocol; a function of a module, since it crosses into worker processes."""

    def __call__(self, env_id: str, /, *, image_size: int = 64) -> EpisodeSimulator:
        """A new simulator."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """A row of the table, in every environment of the protocol: a learned one, or what these are compared with."""

    name: str
    """As ``--policy`` knows it."""
    what: str
    """A sentence for readers of the table."""
    spec: PolicySpec | None = None
    """A policy of the registry; checkpoint, solver and budget are filled in when it is run."""
    make: MakePolicy | None = None
    """Any other policy; it sees no frames."""

    @property
    def needs_model(self) -> bool:
        """Whether a world model has to be given."""
        return self.spec is not None and self.spec.needs_model


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """A benchmark with its rule."""

    name: str
    """As ``--protocol`` knows it."""
    title: str
    """What is asked, in a few words."""
    suites: tuple[str, ...]
    """Suites that must be installed."""
    env_ids: tuple[str, ...]
    """Environments, each with a row for every control."""
    episodes: int
    """Episodes of an environment, in each of ``sets`` [episodes]."""
    sets: int = 1
    """Disjoint sets of episodes, as others repeat a measurement with several seeds."""
    make: MakeProtocolEnv
    """Makes a simulator that holds the rule: its success and its step budget."""
    search: PlanningBudget = field(default_factory=PlanningBudget)
    """What a planner may spend unless another budget is asked for."""
    controls: tuple[Control, ...]
    """The rows."""
    caution: str = ""
    """What has to be said beside learned rows."""

    def choose(self, names: Sequence[str]) -> tuple[Control, ...]:
        """Some of the controls; all where no name is given.

        Raises:
            ValueError: if there is none of a name; the message names the nearest one.
        """
        known = {control.name: control for control in self.controls}
        for name in names:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"{self.name} has no control {name!r}: {hint}known are {', '.join(known)}")
        return tuple(known[name] for name in names) or self.controls

    def equip(self, control: Control, template: PolicySpec, budget: Mapping[str, Any]) -> Control:
        """The control as it is to be run.

        Args:
            control: one of this protocol's.
            template: its checkpoint, device, solver and way of acting are taken over.
            budget: entries of ``PlanningBudget`` that shall not be the protocol's.
        """
        if control.spec is None:
            return control
        own, search = control.spec, replace(self.search, **budget)
        return replace(control, spec=replace(template, name=own.name, objective=own.objective, budget=search))


STILL = Control(name="still", what="does nothing", make=Still)
RANDOM = Control(name="random", what="uniformly random blocks", spec=PolicySpec(name="random"))
REPLAY = Control(
    name="replay",
    what="plays the recorded actions: every goal can be reached",
    make=Replay,  # type: ignore[arg-type]  # of problems, as in every protocol that has this row
)
EXPERT = Control(name="expert", what="the suite's scripted expert", spec=PolicySpec(name="scripted"))
TRUE_OBJECTS = Control(
    name="true",
    what="the solver in the true simulator, told where things are",
    spec=PolicySpec(name="true", objective="objects"),
)
TRUE_REWARD = Control(
    name="true",
    what="the solver in the true simulator, searching for the suite's own reward",
    spec=PolicySpec(name="true", objective="reward"),
)
TRUE_PICTURE = Control(
    name="true-picture",
    what="the solver in the true simulator, searching for the goal picture in the checkpoint's codes",
    spec=PolicySpec(name="true", objective="goal"),
)
SHOOTING = Control(
    name="shooting",
    what="random shooting in imagination with the same budget, for the goal picture",
    spec=PolicySpec(name="shooting", objective="goal"),
)
IMAGINED = Control(
    name="imagined",
    what="the solver in imagination, for the goal picture and place",
    spec=PolicySpec(name="imagined", objective="goal"),
)
SHOOTING_REWARD = Control(
    name="shooting",
    what="random shooting in imagination with the same budget, for predicted reward",
    spec=PolicySpec(name="shooting", objective="reward"),
)
IMAGINED_REWARD = Control(
    name="imagined",
    what="the solver in imagination, for predicted reward",
    spec=PolicySpec(name="imagined", objective="reward"),
)
IMAGINED_OBJECTS = Control(
    name="imagined-objects",
    what="the solver in imagination, for where the model sees things in the goal picture, and place",
    spec=PolicySpec(name="imagined", objective="objects"),
)
TOKEN = Control(
    name="token",
    what="the backbone acts: cloned behaviour, which is shown no goal picture",
    spec=PolicySpec(name="token"),
)
