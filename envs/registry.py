"""Environment ids and what they stand for. Light: engines are imported when an environment is made."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium

from emu_embodied.envs.tasks import TASKS

if TYPE_CHECKING:
    from emu_embodied.envs.panda import PandaEnv


@dataclass(frozen=True, slots=True)
class EnvSpec:
    """What an environment id stands for."""

    task: str
    """Key of ``TASKS``."""
    engine: str
    """``"mujoco"`` or ``"bullet"``."""


_SPECS: dict[str, EnvSpec] = {
    f"{task}{suffix}-v0": EnvSpec(task, engine)
    for engine, suffix in (("mujoco", ""), ("bullet", "Bullet"))
    for task in TASKS
}


def env_ids() -> tuple[str, ...]:
    """All environment ids, MuJoCo's first."""
    return tuple(_SPECS)


def check_env_id(env_id: str) -> EnvSpec:
    """What an id stands for, without importing an engine.

    Raises:
        ValueError: if there is no such id; the message names the nearest one.
    """
    if env_id in _SPECS:
        return _SPECS[env_id]
    by_lower = {known.lower(): known for known in _SPECS}
    near = difflib.get_close_matches(env_id.lower(), by_lower, n=1, cutoff=0.4)
    hint = f"did you mean {by_lower[near[0]]!r}? " if near else ""
    raise ValueError(f"unknown environment {env_id!r}; {hint}known: {', '.join(_SPECS)}")


def make(env_id: str, **kwargs: Any) -> PandaEnv:
    """Make an environment without Gymnasium's wrappers, so that it is a ``Simulator``.

    Args:
        env_id: one of ``env_ids()``.
        **kwargs: see ``PandaEnv``.

    Raises:
        ValueError: if there is no such id; the message names the nearest one.
    """
    spec = check_env_id(env_id)
    from emu_embodied.envs.panda import PandaEnv

    return PandaEnv(**{"task": spec.task, "engine": spec.engine, "env_id": env_id, **kwargs})


def register_all() -> None:
    """Tell Gymnasium about every id; time limits live inside the environments, where snapshots reach them."""
    for env_id, spec in _SPECS.items():
        if env_id not in gymnasium.registry:
            gymnasium.register(
                id=env_id,
                entry_point="emu_embodied.envs.panda:PandaEnv",
                kwargs={"task": spec.task, "engine": spec.engine, "env_id": env_id},
            )
