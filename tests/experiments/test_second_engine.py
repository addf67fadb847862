"""MuJoCo's model in PyBullet: measured in both, adapted, measured again, and gone on with."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from emu_embodied.experiments import second_engine
from emu_embodied.experiments.second_engine import SecondEngine, main, run, success_lines
from emu_embodied.policies.registry import PlanningBudget
from emu_embodied.train.loop import LoopConfig
from emu_embodied.train.pretrain import WorldTraining
from emu_embodied.world_config import WorldModelConfig
from tests.panda_checkpoint import small_checkpoint

TRAINING = WorldTraining(
    loop=LoopConfig(steps=3, warmup_steps=1, log_every=1, eval_every=10, save_every=10, threads=1, dtype="float32"),
    batch=2, held_out=0.25, subgoal_share=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(small_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model"))


def config(checkpoint, out, **changes) -> SecondEngine:
    values = {
        "checkpoint": checkpoint, "tasks": "PandaReach", "out": out, "policies": "imagined,random", "episodes": 1,
        "budget": PlanningBudget(samples=2, iterations=1, horizon=1), "recorded": 2, "horizon": 2, "collected": 4,
        "minutes": 1.0, "training": TRAINING, "device": "cpu",
    }  # fmt: skip
    return SecondEngine(**(values | changes))


def test_both_engines_before_and_after(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    main(config(checkpoint, tmp_path))
    rows = json.loads((tmp_path / "second_engine.json").read_text())["rows"]
    kinds = [(row["key"]["kind"], row["key"]["engine"], row["key"].get("policy")) for row in rows]
    before = [("success", "imagined"), ("success", "random"), ("imagination", None)]
    expected = [(kind, engine, policy) for engine in ("mujoco", "bullet") for kind, policy in before]
    # A random policy does not change with the weights, so it is measured once.
    expected += [(k, engine, p) for engine in ("mujoco", "bullet") for k, p in before if p != "random"]
    assert kinds == expected
    assert {row["key"]["env"] for row in rows} == {"PandaReach-v0", "PandaReachBullet-v0"}
    adapted = WorldModelConfig.load(tmp_path / "adapted" / "world.json")
    assert adapted.env_ids == ("PandaReach-v0", "PandaReachBullet-v0")
    weights = {row["key"]["weights"] for row in rows if "weights" in row["key"]}
    assert len(weights) == 2
    for row in rows:
        if row["key"]["kind"] == "imagination":
            assert row["psnr"] > 0 and row["errors_cm"]["ee"] > 0 and row["action_sensitivity_db"] is not None
    printed = capsys.readouterr().out
    assert "4 episodes of PyBullet" in printed and (tmp_path / "second_engine.md").read_text() in printed
    # Nothing is done twice.
    for name in ("run_episodes", "score_horizons", "collect", "train_dida"):
        monkeypatch.setattr(second_engine, name, lambda *a, **k: pytest.fail("done again"))
    assert len(run(config(checkpoint, tmp_path))) == len(rows)


def test_an_interrupted_adaptation_is_not_taken_for_a_finished_one(checkpoint, tmp_path, monkeypatch) -> None:
    small = config(checkpoint, tmp_path, policies="random", recorded=0)
    train = second_engine.train_dida

    def interrupted(*arguments, **kwargs):
        return replace(train(*arguments, **kwargs), stopped="signal")

    monkeypatch.setattr(second_engine, "train_dida", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(small)
    resumed = []
    monkeypatch.setattr(second_engine, "train_dida", lambda *a, **k: resumed.append(k["resume"]) or train(*a, **k))
    run(small)
    assert resumed == [True]


def test_the_gap_is_a_difference_with_an_interval() -> None:
    def row(engine, successes, state="as trained"):
        env = "PandaReach-v0" if engine == "mujoco" else "PandaReachBullet-v0"
        key = {"kind": "success", "engine": engine, "env": env, "policy": "imagined", "episodes": 20}
        return {"key": key, "state": state, "successes": successes, "success": successes / 20, "ci95": (0.1, 0.9)}

    lines = success_lines([
        row("mujoco", 16), row("bullet", 6), row("mujoco", 15, "after"), row("bullet", 12, "after")
    ])  # fmt: skip
    assert [line[0] for line in lines] == ["PandaReach-v0, imagined, as trained", "PandaReach-v0, imagined, after"]
    assert lines[0][3].startswith("+50 (") and lines[0][4] == ""
    assert lines[1][3].startswith("+15 (") and lines[1][4].startswith("+30 (")


def test_a_model_that_knows_both_engines_is_refused(tmp_path) -> None:
    both = small_checkpoint(tmp_path / "model", env_ids=("PandaReach-v0", "PandaReachBullet-v0"))
    with pytest.raises(ValueError, match="was trained on PandaReachBullet-v0"):
        run(config(str(both), tmp_path / "out"))
