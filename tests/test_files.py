"""Files are whole or absent, and readable for whom the umask says, whoever writes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from emu_embodied.files import write_atomically, write_json
from tests import tiny


@pytest.fixture(params=[0o022, 0o077, 0o002])
def allowed(request) -> Iterator[int]:
    """What files may be under an umask."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_modes_follow_the_umask(tmp_path, allowed) -> None:
    write_atomically(tmp_path / "a.safetensors", lambda aside: save_file({"x": torch.zeros(2)}, aside))
    write_json(tmp_path / "b.json", {"a": 1})
    assert {path.name: mode(path) for path in tmp_path.iterdir()} == {"a.safetensors": allowed, "b.json": allowed}


def test_every_file_of_a_checkpoint_does(tmp_path, allowed) -> None:
    world = tiny.make_world()
    for _ in range(2):  # written anew over the old ones, too
        world.save_pretrained(tmp_path)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert {path.name for path in files} >= {"model.safetensors", "config.json", "world.json"}
        assert {mode(path) for path in files} == {allowed}


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(aside: Path) -> None:
        aside.write_text("half")
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        write_atomically(path, fail)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "old"
