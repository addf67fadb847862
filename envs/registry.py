"""Environment ids and what they stand for. Light: engines and suites are imported when an environment is made."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import gymnasium

from emu_embodied.envs.suites.catalog import SUITES, find_suite
from emu_embodied.envs.tasks import TASKS

if TYPE_CHECKING:
    from emu_embodied.envs.panda import PandaEnv
    from emu_embodied.envs.suites.world import SuiteEnv


@dataclass(frozen=True, slots=True)
class EnvSpec:
    """What an environment id stands for."""

    entry_point: str
    """``module:callable`` that makes it."""
    kwargs: dict[str, str]
    """Its arguments."""
    suite: str = "panda"
    """``panda`` for our own worlds, otherwise a key of ``SUITES``."""


_OWN: dict[str, EnvSpec] = {
    f"{task}{suffix}-v0": EnvSpec("emu_embodied.envs.panda:PandaEnv", {"task": task, "engine": engine})
    for engine, suffix in (("mujoco", ""), ("bullet", "Bullet"))
    for task in TASKS
}
_SPECS: dict[str, EnvSpec] = {
    **_OWN,
    **{
        env_id: EnvSpec("emu_embodied.envs.suites.catalog:make_suite_env", {"suite": suite.name}, suite.name)
        for suite in SUITES.values()
        for env_id in suite.env_ids
    },
}


def env_ids() -> tuple[str, ...]:
    """The ids of our own worlds, MuJoCo's first."""
    return tuple(_OWN)


def suite_ids(suite: str) -> tuple[str, ...]:
    """The ids of a benchmark suite; ``panda`` are our own worlds in MuJoCo.

    Raises:
        ValueError: if there is no such suite; the message names the nearest one.
    """
    if suite == "panda":
        return tuple(env_id for env_id, spec in _OWN.items() if spec.kwargs["engine"] == "mujoco")
    return find_suite(suite).env_ids


def check_env_id(env_id: str) -> EnvSpec:
    """What an id stands for, without importing an engine.

    Raises:
        ValueError: if there is no such id; the message names the nearest one.
        ImportError: if its suite is not installed, or with versions that do not go together; with the pip line.
    """
    if env_id in _SPECS:
        spec = _SPECS[env_id]
        if spec.suite in SUITES and (reason := SUITES[spec.suite].missing()):
            raise ImportError(reason)
        return spec
    by_lower = {known.lower(): known for known in _SPECS}
    near = difflib.get_close_matches(env_id.lower(), by_lower, n=1, cutoff=0.4)
    hint = f"did you mean {by_lower[near[0]]!r}? " if near else ""
    suites = ", ".join(f"{suite.env_ids[0]} ({len(suite.env_ids)} of {suite.name})" for suite in SUITES.values())
    raise ValueError(f"unknown environment {env_id!r}; {hint}known: {', '.join(_OWN)}; {suites}")


def make(env_id: str, **kwargs: Any) -> PandaEnv | SuiteEnv:
    """Make an environment without Gymnasium's wrappers, so that it is a ``Simulator``.

    Args:
        env_id: one of ``env_ids()`` or ``suite_ids(...)``.
        **kwargs: see ``PandaEnv`` and ``SuiteEnv``.

    Raises:
        ValueError: if there is no such id; the message names the nearest one.
        ImportError: see ``check_env_id``.
    """
    spec = check_env_id(env_id)
    module, _, name = spec.entry_point.partition(":")
    return getattr(import_module(module), name)(**{**spec.kwargs, "env_id": env_id, **kwargs})


def register_all() -> None:
    """Tell Gymnasium about every id; time limits live inside the environments, where snapshots reach them."""
    for env_id, spec in _SPECS.items():
        if env_id not in gymnasium.registry:
            gymnasium.register(id=env_id, entry_point=spec.entry_point, kwargs={**spec.kwargs, "env_id": env_id})
