"""Planners by name."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from emu_embodied.planners.cem import CEM, CEMConfig
from emu_embodied.planners.mppi import MPPI, MPPIConfig
from emu_embodied.planners.sampling import PlanSpace, SearchConfig
from emu_embodied.planners.shooting import RandomShooting
from emu_embodied.protocols import Planner

PLANNERS: dict[str, tuple[type[SearchConfig], type[Any]]] = {
    "cem": (CEMConfig, CEM),
    "mppi": (MPPIConfig, MPPI),
    "shooting": (SearchConfig, RandomShooting),
}
"""Name -> (config class, planner class); every planner is made as ``planner(space, config)``."""


def make_planner(name: str, space: PlanSpace, **settings: Any) -> Planner:
    """Make a planner by name, with settings of its config class.

    Raises:
        ValueError: for an unknown name (the nearest one is named) or setting.
    """
    if name not in PLANNERS:
        near = get_close_matches(name, PLANNERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown planner {name!r}: {hint}known are {', '.join(PLANNERS)}")
    config_class, planner_class = PLANNERS[name]
    return planner_class(space, config_class(**settings))
