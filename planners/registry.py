"""Planners and objectives by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from emu_embodied.planners.beam import BeamConfig, BeamSearch
from emu_embodied.planners.cem import CEM, CategoricalConfig, CEMConfig, ICEMConfig
from emu_embodied.planners.mppi import MPPI, MPPIConfig
from emu_embodied.planners.objectives import PredictedReward, PredictedSuccess, WeightedSum
from emu_embodied.planners.proposals import ProposedPlanner
from emu_embodied.planners.sampling import PlanSpace, SearchConfig
from emu_embodied.planners.shooting import RandomShooting
from emu_embodied.protocols import Objective

PLANNERS: dict[str, tuple[type[SearchConfig], type[Any]]] = {
    "cem": (CEMConfig, CEM),
    "icem": (ICEMConfig, CEM),
    "categorical": (CategoricalConfig, CEM),
    "mppi": (MPPIConfig, MPPI),
    "beam": (BeamConfig, BeamSearch),
    "shooting": (SearchConfig, RandomShooting),
}
"""Name -> (config class, planner class); every planner is made as ``planner(space, config)``."""


def has_setting(name: str, setting: str) -> bool:
    """Whether a planner of that name has a setting.

    Raises:
        ValueError: for an unknown name; the nearest one is named.
    """
    _check_known(name, PLANNERS, "planner")
    return setting in {field.name for field in fields(PLANNERS[name][0])}


def make_planner(name: str, space: PlanSpace, **settings: Any) -> ProposedPlanner:
    """Make a planner by name, with settings of its config class.

    Raises:
        ValueError: for an unknown name (the nearest one is named) or setting.
    """
    _check_known(name, PLANNERS, "planner")
    config_class, planner_class = PLANNERS[name]
    for setting in settings:
        _check_known(setting, dict.fromkeys(field.name for field in fields(config_class)), f"setting of {name}")
    return planner_class(space, config_class(**settings))


OBJECTIVES: dict[str, Objective] = {
    "reward": PredictedReward(last_weight=2.0),
    "success": PredictedSuccess(),
    "both": WeightedSum(((1.0, PredictedReward(last_weight=2.0)), (1.0, PredictedSuccess()))),
}
"""Name -> objective that needs no goal."""


def find_objective(name: str) -> Objective:
    """An objective by name; ``goal`` and ``objects`` are not among them, they belong to an episode (``GoalOfEpisode``).

    Raises:
        ValueError: for an unknown name; the nearest one is named.
    """
    _check_known(name, {**OBJECTIVES, "goal": None, "objects": None}, "objective")
    return OBJECTIVES[name]


def _check_known(name: str, known: Mapping[str, object], kind: str) -> None:
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown {kind} {name!r}: {hint}known are {', '.join(known)}")
