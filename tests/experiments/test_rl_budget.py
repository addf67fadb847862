"""The budget table: cells one by one, gone on with, and what was not run is written as such."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from emu_embodied.experiments import rl_budget
from emu_embodied.experiments.rl_budget import METHODS, Budget, Cell, main, wanted
from emu_embodied.experiments.rl_budget_figure import pooled, table
from emu_embodied.world_config import WEIGHTS


def cell(method: str, seed: int, rollouts: int, solved: int = 6) -> Cell:
    return Cell(method=method, seed=seed, rollouts=rollouts, solved=solved, episodes=10, minutes=1.0, verified=3)


@pytest.fixture
def budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Budget:
    ran: list[tuple[str, int, int]] = []

    def run(_: Budget, method: str, seed: int, rollouts: int) -> Cell:
        ran.append((method, seed, rollouts))
        run_folder = tmp_path / f"PandaReach-v0-{method}-{seed}"
        run_folder.mkdir(exist_ok=True)
        lines = [{"round": i, "rollouts": 8 * (i + 1), "success": i / 8} for i in range(6)]
        (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return cell(method, seed, rollouts)

    monkeypatch.setattr(rl_budget, "run_cell", run)
    monkeypatch.setattr(rl_budget, "_measured", lambda *_: cell("base", 0, 0, 3))
    monkeypatch.setattr(rl_budget.WorldModel, "from_pretrained", lambda *_: None)
    monkeypatch.setattr(tmp_path.__class__, "ran", ran, raising=False)
    return Budget(
        env="PandaReach-v0", checkpoint=WEIGHTS / "nano", runs=tmp_path, out=tmp_path / "out", seeds="0,1",
        budgets="8,16", methods="policy,cloning", verify="PandaReachBullet-v0",
    )  # fmt: skip


def test_cells_are_gone_on_with(budget, capsys):
    main(replace(budget, cells=3))
    first = list(budget.runs.ran)
    main(budget)
    assert first == [("policy", 0, 8), ("policy", 1, 8), ("cloning", 0, 8)]
    assert budget.runs.ran == list(wanted(budget)), "each once, small budgets first"
    out = budget.out
    content = json.loads((out / "budget_PandaReach-v0.json").read_text())
    assert len(content["cells"]) == 1 + 8 and content["settings"]["env"] == "PandaReach-v0"
    page = (out / "budget_PandaReach-v0.md").read_text()
    assert "| imagined | 30 % (11 to 60) | not run | not run |" in page
    assert "| policy | 30 % (11 to 60) | 60 % (39 to 78; seeds 60, 60) |" in page
    assert "policy, in PandaReachBullet-v0 | 30 %" in page
    assert (out / "budget_PandaReach-v0.png").stat().st_size > 1000
    assert (
        sum(line.startswith("training,") for line in (out / "budget_PandaReach-v0.csv").read_text().splitlines()) == 24
    )


def test_another_checkpoint_is_another_table(budget):
    main(replace(budget, cells=1))
    with pytest.raises(ValueError, match="another --out"):
        main(replace(budget, episodes=7))


def test_a_table_without_anything():
    assert table([], tuple(METHODS), (128,), "").count("not run") == 2 * len(METHODS)
    assert pooled([], "policy", 128) == "not run"
