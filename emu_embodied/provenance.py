"""Where a result comes from: the record that is written beside every checkpoint, dataset and table."""

from __future__ import annotations

import dataclasses
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from emu_embodied import __version__
from emu_embodied.hardware import describe_hardware
from emu_embodied.records import Meta

PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "pybullet", "transformers", "safetensors")
"""Those whose versions can change a result."""


def make_meta(command: str | None = None, seed: int | None = None, data_hash: str | None = None, **extra: Any) -> Meta:
    """The provenance of a result made now, here.

    Args:
        command: what was run; this process's command line if None.
        seed: the seed that was given.
        data_hash: ``EpisodeStore.data_hash`` of the dataset used.
        **extra: anything else a reader needs, JSON-ready.
    """
    return Meta(
        command=current_command() if command is None else command,
        seed=seed,
        data_hash=data_hash,
        revision=code_revision(),
        versions=package_versions(),
        hardware=describe_hardware().to_dict(),
        extra=extra,
    )


def meta_dict(meta: Meta) -> dict[str, Any]:
    """A JSON-ready form."""
    return dataclasses.asdict(meta)


def current_command() -> str:
    """This process's command line as one could type it, without the folder of the program."""
    name = Path(sys.argv[0]).name or "python"
    # `python -m emu_embodied.cli` is the installed command by another name.
    return shlex.join(["emu-embodied" if name == "cli.py" else name, *sys.argv[1:]])


def package_versions() -> dict[str, str]:
    """Versions of Python, this package and those that results depend on; nothing is imported for it."""
    versions = {"python": platform.python_version(), "emu-embodied": __version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def code_revision(root: Path | None = None) -> str | None:
    """The git commit of the checkout this package runs from, with ``-dirty`` if files differ from it.

    None for an installed package: a repository around it (a virtual environment often lies in one) is not its own.
    """
    root = Path(__file__).resolve().parent.parent if root is None else root
    if not (root / ".git").exists() or not (root / "pyproject.toml").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git, or a repository without a commit
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()
