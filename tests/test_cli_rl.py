"""``rl`` from the command line: what it refuses, and one short run of the shipped weights from start to bench."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from emu_embodied.cli import main
from emu_embodied.cli_rl import RL, RL_PRESETS
from emu_embodied.viz.rl_report import smoothed_success, write_report
from emu_embodied.world_config import WEIGHTS

pytest.importorskip("mujoco")


def rl(out: Path, *flags: str) -> int:
    return main(["rl", "--env", "PandaReach-v0", "--out", str(out), *flags])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--group", "1"), "--group 2 or more"),
        (("--rollouts", "3"), "holds no group of 8"),
        (("--preset", "grpo-panda-puhs"), "did you mean 'grpo-panda-push'"),
        (("--env", "PandaReech-v0"), "did you mean 'PandaReach-v0'"),
        (("--reward", "sucess=1"), "did you mean 'success'"),
        (("--reward", "success"), "is not term=weight"),
        (("--checkpoint", "nanoo"), "did you mean 'nano'"),
        (("--report",), "holds no round"),
        (("--variant", "ppo"), "variant"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, flags, said):
    try:
        code = rl(tmp_path / "out", *flags)
    except SystemExit as stopped:  # tyro's own, for choices
        code = int(stopped.code or 0)
    assert code == 2 and said in capsys.readouterr().err


def test_a_checkpoint_without_action_tokens(tmp_path, capsys, monkeypatch):
    def refuse(self: object, world: object) -> None:
        raise ValueError("these weights have no action tokens")

    monkeypatch.setattr("emu_embodied.acting.Actor.__init__", refuse)
    assert rl(tmp_path / "out") == 2
    assert "no action tokens" in capsys.readouterr().err and not (tmp_path / "out" / "world.json").exists()


def test_out_is_not_the_start(tmp_path, capsys):
    shutil.copytree(WEIGHTS / "nano", tmp_path / "start")
    assert rl(tmp_path / "start", "--checkpoint", str(tmp_path / "start")) == 2
    assert "another --out" in capsys.readouterr().err


@pytest.mark.parametrize("preset", RL_PRESETS)
def test_presets_are_settings(preset):
    settings = RL(preset=preset, out=Path("unused"), rollouts=16).settings()
    assert settings.env_ids == (RL_PRESETS[preset]["env"],) and settings.config.rollouts == 16
    assert settings.config.objective.group == RL_PRESETS[preset]["group"]


def test_a_run_from_start_to_bench(tmp_path, capsys):
    out = tmp_path / "out"
    small = ("--rollouts", "4", "--group", "2", "--groups", "2", "--seed", "0", "--workers", "1")
    assert rl(out, *small) == 0
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"rollouts", "success", "reward", "kl", "env_steps_per_s"} <= line.keys() and line["rollouts"] == 4
    assert (out / "report.png").stat().st_size > 1000 and "4 real rollouts" in (out / "report.md").read_text()
    with (out / "report.csv").open() as file:
        assert [float(row["rollouts"]) for row in csv.DictReader(file)] == [4]
    meta = json.loads((out / "meta.json").read_text())
    assert meta["rl"]["extra"]["rollouts"] == 4 and "world" in meta, "where it started is kept"
    assert rl(out, *small) == 2 and "--resume" in capsys.readouterr().err
    bench = ["bench", "--env", "PandaReach-v0", "--policy", "token", "--checkpoint", str(out), "--episodes", "1"]
    assert main([*bench, "--seed", "1000", "--json", str(tmp_path / "bench.json")]) == 0


def test_the_smooth_curve_is_an_average_over_rollouts(tmp_path):
    lines = [{"round": i, "rollouts": 32.0 * (i + 1), "success": float(i % 2)} for i in range(4)]
    rollouts, smooth = smoothed_success(lines)
    assert rollouts.tolist() == [32, 64, 96, 128] and smooth.tolist() == [0, 0.5, 0.5, 0.5]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "50 %" in write_report(tmp_path).read_text()
