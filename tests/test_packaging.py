"""Five folders, one package: in a wheel and from a bare checkout; and the set-up scripts' decisions."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import emu_embodied

ROOT = Path(__file__).parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = CONFIG["tool"]["setuptools"]["package-dir"]
ROOMS = [folder for folder in FOLDERS.values() if folder != "emu_embodied"]
LEFT_OUT = shutil.ignore_patterns("results", "__pycache__", "*.pyc", "*.tmp")


def package_files(root: Path) -> dict[str, Path]:
    """Path inside an installed package -> file in a checkout, for everything that belongs to the package."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (root / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
                found[f"{package.replace('.', '/')}/{path.relative_to(root / folder).as_posix()}"] = path
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without git, environments and results, so that builds leave nothing in the real one."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=LEFT_OUT)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def python(code: str, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_package_on_disk_is_listed() -> None:
    on_disk = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} has modules and no __init__.py"
            on_disk.add(".".join([package, *path.parent.relative_to(ROOT / folder).parts]))
    listed = CONFIG["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(on_disk) and len(set(listed)) == len(listed)


def test_versions_agree() -> None:
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert CONFIG["project"]["version"] == emu_embodied.__version__ == (cited and cited[1])


def test_shipped_weights_stay_small() -> None:
    models = [path for path in (ROOT / "emu_embodied" / "weights").iterdir() if path.is_dir()]
    sizes = [sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) for model in models]
    assert max(sizes) <= 16e6 and sum(sizes) <= 48e6


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imported_by_its_bare_name_says_what_to_do(room: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"import emu_embodied.{room}" in done.stderr


def test_bare_checkout_is_importable(checkout: Path, tmp_path: Path) -> None:
    code = "; ".join(
        ["import emu_embodied, importlib"]
        + [f"print(importlib.import_module('emu_embodied.{room}').__file__)" for room in ROOMS]
    )
    expected = [str(checkout / room / "__init__.py") for room in ROOMS]
    assert python(code, cwd=checkout).splitlines() == expected
    assert python(code, cwd=tmp_path, PYTHONPATH=str(checkout)).splitlines() == expected


@pytest.mark.slow
def test_wheel_holds_everything_and_imports_from_anywhere(checkout: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built, site, empty = tmp_path / "wheel", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", built, checkout], check=True)
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
        assert names == set(package_files(checkout))
        for name, path in package_files(checkout).items():
            assert archive.getinfo(name).file_size == path.stat().st_size, f"{name} differs from the checkout's"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    code = f"""
import importlib, importlib.util, json, pkgutil
import emu_embodied
rooms = {ROOMS}
files = [importlib.import_module("emu_embodied." + room).__file__ for room in rooms]
packages = [m.name for m in pkgutil.walk_packages(emu_embodied.__path__, "emu_embodied.") if m.ispkg]
leaked = [room for room in rooms if importlib.util.find_spec(room)]
print(json.dumps([[emu_embodied.__file__, *files], ["emu_embodied", *packages], leaked]))
"""
    files, packages, leaked = json.loads(python(code, cwd=empty, PYTHONPATH=str(site)))
    assert all(Path(file).is_relative_to(site) for file in files)
    assert sorted(packages) == sorted(CONFIG["tool"]["setuptools"]["packages"])
    assert not leaked, "an installed wheel must not put envs/ ... on everyone's path"


class Machine:
    """A machine of shell scripts: every program it has is a fake that writes down how it was called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        for tool in ("env", "touch"):
            (folder / tool).symlink_to(shutil.which(tool) or f"/usr/bin/{tool}")

    def has(self, name: str, body: str) -> None:
        (self.folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {self.calls}\n{body}\n')
        (self.folder / name).chmod(0o755)

    def run(self, script: str, *arguments: str) -> tuple[int, str, list[str]]:
        """Exit code, what it printed, and how it called apt-get."""
        done = subprocess.run(
            ["/bin/sh", str(ROOT / "scripts" / script), *arguments],
            env={"PATH": str(self.folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return done.returncode, done.stdout + done.stderr, [call for call in calls if call.startswith("apt-get ")]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "bin").mkdir()
    return Machine(tmp_path / "bin")


def draws_after_apt(machine: Machine) -> None:
    machine.has("py", f"[ -e {machine.folder}/mesa ]")
    machine.has("apt-get", f'case "$*" in *libegl1*) touch {machine.folder}/mesa;; esac')


def test_gl_set_up_touches_nothing_where_gl_draws(machine: Machine) -> None:
    machine.has("py", "exit 0")
    machine.has("apt-get", "exit 1")
    assert machine.run("setup_gl.sh", "py") == (0, "", [])


def test_gl_set_up_without_apt_says_what_is_missing(machine: Machine) -> None:
    machine.has("py", "exit 1")
    code, printed, _ = machine.run("setup_gl.sh", "py")
    assert code == 1 and "EGL" in printed and "OSMesa" in printed


def test_gl_set_up_installs_as_root(machine: Machine) -> None:
    draws_after_apt(machine)
    machine.has("id", "echo 0")
    code, _, calls = machine.run("setup_gl.sh", "py")
    assert code == 0 and any("install" in call and "libegl1" in call for call in calls)


@pytest.mark.parametrize(("sudo", "works"), [("exit 1", False), ('[ "$1" = -n ] && exit 0; exec "$@"', True)])
def test_gl_set_up_as_a_user_needs_sudo(machine: Machine, sudo: str, works: bool) -> None:
    draws_after_apt(machine)
    machine.has("id", "echo 1000")
    machine.has("sudo", sudo)
    code, printed, calls = machine.run("setup_gl.sh", "py")
    assert (code == 0) == works == any(call.startswith("apt-get install") for call in calls)
    assert works or "apt-get install libegl1" in printed


def test_gl_set_up_fails_if_nothing_draws_after_installing(machine: Machine) -> None:
    machine.has("py", "exit 1")
    machine.has("apt-get", "exit 0")
    machine.has("id", "echo 0")
    assert machine.run("setup_gl.sh", "py")[0] == 1


def test_install_names_the_python_it_needs(machine: Machine, tmp_path: Path) -> None:
    machine.has("python3", "exit 1")
    code, printed, _ = machine.run("install.sh", str(tmp_path / "venv"), ".")
    assert code == 1 and "3.11" in printed


def test_install_without_venv_names_the_package(machine: Machine, tmp_path: Path) -> None:
    machine.has("python3", '[ "$2" != venv ]')
    (machine.folder / "rm").symlink_to("/bin/rm")
    code, printed, _ = machine.run("install.sh", str(tmp_path / "venv"), ".")
    assert code == 1 and "python3-venv" in printed
