"""Imports point one way: core <- envs, planners <- policies <- experiments. And the front door opens quickly."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = "emu_embodied"
ROOMS = ("envs", "policies", "planners", "experiments")
ENGINES = {"mujoco", "pybullet", "pybullet_data"}
MAY_IMPORT = {
    "emu_embodied": set(),
    "envs": set(),
    "planners": set(),
    "policies": {"envs", "planners"},
    "experiments": {"envs", "policies", "planners"},
}
COMPOSITION_ROOT = tuple(
    ROOT / CORE / name for name in ("cli.py", "cli_inspect.py", "cli_plan.py", "cli_rl.py", "cli_train.py")
)


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Absolute names of all modules that a source imports, wherever in it; ``package`` resolves relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "require") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def room_of(module: str) -> str | None:
    """The room a module name lies in, or None for another package's."""
    parts = module.split(".")
    if parts[0] != CORE:
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else CORE


def violations(source: str, room: str, package: str) -> list[str]:
    """Names that a source of ``room`` must not import."""
    found = []
    for name in imported(ast.parse(source), package):
        top, there = name.split(".")[0], room_of(name)
        against_the_arrow = there is not None and there not in {CORE, room} | MAY_IMPORT[room]
        if against_the_arrow or top in ROOMS or (top in ENGINES and room not in ("envs", "experiments")):
            found.append(name)
    return found


def sources() -> list[tuple[Path, str]]:
    return [(path, room) for room in (CORE, *ROOMS) for path in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("room", [CORE, *ROOMS])
def test_imports_point_one_way(room: str) -> None:
    wrong = {}
    for path, its_room in sources():
        if its_room != room or path in COMPOSITION_ROOT:
            continue
        package = ".".join([CORE, *([room] if room != CORE else []), *path.parent.relative_to(ROOT / room).parts])
        # What a type checker alone sees makes two rooms depend on each other all the same, so it counts.
        if names := violations(path.read_text(), room, package):
            wrong[str(path.relative_to(ROOT))] = names
    assert not wrong


@pytest.mark.parametrize(
    ("room", "source", "wrong"),
    [
        (CORE, "import emu_embodied.envs.registry", True),
        (CORE, "def f():\n    from emu_embodied.planners import cem", True),
        (CORE, "from emu_embodied import policies", True),
        (CORE, "from .. import envs", True),
        (CORE, "importlib.import_module('emu_embodied.envs')", True),
        (CORE, "import mujoco", True),
        (CORE, "from ..records import Episode", False),
        (CORE, "import numpy", False),
        ("envs", "from emu_embodied.planners.cem import CEM", True),
        ("envs", "from ..policies import random", True),
        ("envs", "import mujoco", False),
        ("envs", "import envs.tasks", True),
        ("planners", "from emu_embodied.envs.registry import make", True),
        ("planners", "from emu_embodied.protocols import Simulator", False),
        ("policies", "from emu_embodied.envs.registry import make", False),
        ("policies", "from emu_embodied.experiments import table", True),
        ("experiments", "from emu_embodied.policies import random", False),
        ("experiments", "import mujoco", False),
        ("policies", "import mujoco", True),
    ],
)
def test_the_check_sees_what_it_must(room: str, source: str, wrong: bool) -> None:
    package = f"{CORE}.data" if room == CORE else f"{CORE}.{room}"
    assert bool(violations(source, room, package)) == wrong


@pytest.mark.parametrize("path", COMPOSITION_ROOT, ids=lambda path: path.stem)
def test_the_command_line_imports_outer_rooms_only_when_a_command_runs(path: Path) -> None:
    tree = ast.parse(path.read_text())
    at_import = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not [name for name in imported(at_import, CORE) if room_of(name) in ROOMS]


def test_nothing_imports_the_rooms_by_their_bare_names() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path != Path(__file__):
            names = imported(ast.parse(path.read_text()), "tests")
            assert not [name for name in names if name.split(".")[0] in ROOMS], path


def loaded_by(statement: str) -> tuple[float, set[str]]:
    """Seconds that a statement takes in a new process, and the top-level modules it brings."""
    code = (
        "import sys, time; t = time.perf_counter()\n"
        f"{statement}\n"
        "t = time.perf_counter() - t; print(t, *{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, *modules = done.stdout.split()
    return float(seconds), set(modules)


def test_the_front_door_opens_quickly() -> None:
    runs = [loaded_by("import emu_embodied") for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < 0.3
    assert not runs[0][1] & {"torch", "transformers", "numpy", "tyro", "gymnasium", *ENGINES}


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("emu_embodied.protocols", {"torch", "transformers", *ENGINES}),
        ("emu_embodied.hardware", {"torch", *ENGINES}),
        ("emu_embodied.provenance", {"torch", *ENGINES}),
        ("emu_embodied.data.collect", {"torch", "gymnasium", *ENGINES}),
        ("emu_embodied.envs", {"torch", "transformers", *ENGINES}),
        ("emu_embodied.policies.behaviours", {"torch", "transformers"}),
        ("emu_embodied.cli", {"torch", "transformers", *ENGINES}),
    ],
)
def test_light_modules_bring_nothing_heavy(module: str, without: set[str]) -> None:
    _, modules = loaded_by(f"import {module}")
    assert not modules & without
