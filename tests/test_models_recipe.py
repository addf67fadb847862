"""Every shipped checkpoint has a recipe of commands that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro

from emu_embodied.cli import Command, unknown_word
from emu_embodied.world_config import shipped

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "models.sh"
NAMES = shipped()


def commands(name: str) -> list[list[str]]:
    """The recipe as it would be run."""
    done = subprocess.run([SCRIPT, "-n", "bin", name], capture_output=True, text=True, check=True, cwd=ROOT)
    return [shlex.split(line)[1:] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_goes_from_nothing_to_a_card(name: str) -> None:
    found = commands(name)
    assert found[0][0] == "collect" and found[-1][0] == "card"
    assert {"tokenizer", "world", "dida"} <= {line[1] for line in found if line[0] == "train"}
    for line in found:
        assert unknown_word(line) is None, line
        tyro.cli(Command, args=line, config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes,
                                             tyro.conf.FlagCreatePairsOff))  # fmt: skip
    # A run that was stopped goes on; one that was finished is not begun again.
    assert all("--resume" in line for line in found if line[0] == "train")


def test_make_knows_every_model() -> None:
    [listed] = re.findall(r"^MODELS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed.split() == list(NAMES)


def test_an_unknown_model_is_refused() -> None:
    done = subprocess.run([SCRIPT, "-n", "bin", "nanu"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "no recipe for 'nanu': known are metaworld, nano" in done.stderr


def test_what_is_finished_is_not_done_again(tmp_path) -> None:
    """With a program that only notes what it is asked."""
    program = tmp_path / "bin" / "emu-embodied"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$1 $2" >> asked\n[ "$2" != world ] || [ -e let ]\n')
    program.chmod(0o755)

    def make() -> int:
        return subprocess.run([SCRIPT, program.parent, "nano"], cwd=tmp_path, capture_output=True).returncode

    assert make() != 0  # the stage `world` fails
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "train world"
    before = len((tmp_path / "asked").read_text().splitlines())
    (tmp_path / "let").touch()
    assert make() == 0
    asked = (tmp_path / "asked").read_text().splitlines()[before:]
    assert asked[0] == "train world" and asked[-1].startswith("card")
    assert make() == 0 and len((tmp_path / "asked").read_text().splitlines()) == before + len(asked)
