"""The record beside every result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from emu_embodied.provenance import code_revision, current_command, make_meta, meta_dict


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_meta_is_json_and_complete() -> None:
    meta = make_meta("emu-embodied train world", 7, "abc", preset="nano")
    again = json.loads(json.dumps(meta_dict(meta), allow_nan=False))
    assert (again["command"], again["seed"], again["data_hash"]) == ("emu-embodied train world", 7, "abc")
    assert again["extra"] == {"preset": "nano"}
    assert {"python", "emu-embodied", "torch", "numpy", "mujoco"} <= set(again["versions"])
    assert again["hardware"]["cores"] >= 1


@pytest.mark.parametrize("program", ["/somewhere/bin/emu-embodied", "/somewhere/emu_embodied/cli.py"])
def test_command_can_be_typed_again(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(sys, "argv", [program, "collect", "--out", "my data"])
    assert current_command() == make_meta().command == "emu-embodied collect --out 'my data'"


def test_revision_is_the_checkouts_own(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "pyproject.toml").write_text("a")
    assert code_revision(tmp_path) is None, "no commit yet"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert code_revision(tmp_path) == head
    (tmp_path / "notes").write_text("untracked files change no result")
    assert code_revision(tmp_path) == head
    (tmp_path / "pyproject.toml").write_text("b")
    assert code_revision(tmp_path) == f"{head}-dirty"
    inside = tmp_path / ".venv" / "site-packages"
    inside.mkdir(parents=True)
    (inside / "pyproject.toml").write_text("c")
    assert code_revision(inside) is None, "a repository around an installed package is not its own"
