"""``--suite`` from the command line: refusals that say what to do, and whole runs where a suite is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emu_embodied.cli import main
from emu_embodied.envs.suites import catalog
from emu_embodied.envs.suites.catalog import SUITES, Suite


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give --env or --suite"),
        (["--suite", "pusht", "--env", "PushT"], "give --env or --suite"),
        (["--suite", "metawrld"], "did you mean 'metaworld'"),
        (["--env", "MetaWorld/reech-v3"], "did you mean 'MetaWorld/reach-v3'"),
    ],
)
@pytest.mark.parametrize("command", ["collect", "bench"])
def test_what_is_wrong_is_said(
    command: str, flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = (
        ["--out", str(tmp_path / "d")]
        if command == "collect"
        else ["--json", str(tmp_path / "r"), "--policy", "random"]
    )
    assert main([command, *flags, *rest]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_suite_is_one_pip_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = Suite(name="pusht", tasks={"PushT": "PushT"}, world="pusht:PushT", modules=("no_such_module_here",))
    monkeypatch.setitem(catalog.SUITES, "pusht", absent)
    assert main(["collect", "--suite", "pusht", "--out", str(tmp_path / "d")]) == 2
    assert "pip install 'emu-embodied[suites]'" in capsys.readouterr().err


def test_bench_and_collect_run_a_suite(tmp_path: Path) -> None:
    if reason := SUITES["pusht"].missing():
        pytest.skip(reason)
    rows = tmp_path / "rows.json"
    flags = ["--suite", "pusht", "--policy", "scripted", "--episodes", "2", "--workers", "1", "--json", str(rows)]
    assert main(["bench", *flags]) == 0
    [row] = json.loads(rows.read_text())["rows"]
    assert (row["env"], row["policy"], row["episodes"], row["success"]) == ("PushT", "scripted", 2, 1.0)
    out = tmp_path / "data"
    assert main(["collect", "--suite", "pusht", "--episodes", "2", "--workers", "1", "--out", str(out)]) == 0
    assert json.loads((out / "dataset.json").read_text())["env_ids"] == ["PushT"]
