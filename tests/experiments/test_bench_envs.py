"""Rows of worlds measured one after another end up in one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emu_embodied.experiments import bench_envs
from emu_embodied.experiments.bench_envs import BenchConfig, Row, main


def fake_bench(env_id: str, config: BenchConfig) -> Row:
    return Row(
        env=env_id,
        steps_per_second=float(config.steps),
        steps_per_second_block=2.0,
        steps_per_second_64px=1.0,
        frame_ms=1.0,
        default_frame_ms=None,
        default_ratio=None,
    )


def test_rows_of_other_environments_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_envs, "bench", fake_bench)
    rows = tmp_path / "rows.json"
    main(BenchConfig(env="A,B", steps=1, json=rows))
    main(BenchConfig(env="B,C", steps=2, json=rows))
    found = {row["env"]: row["steps_per_second"] for row in json.loads(rows.read_text())["rows"]}
    assert found == {"A": 1.0, "B": 2.0, "C": 2.0}
    rows.write_text('["something else"]')
    with pytest.raises(ValueError, match="give another --json"):
        main(BenchConfig(env="A", json=rows))


def test_one_world_is_measured() -> None:
    row = bench_envs.bench("PandaReach-v0", BenchConfig(steps=5, default_frames=1, repeats=1))
    assert row.steps_per_second > row.steps_per_second_block > row.steps_per_second_64px > 0
    assert row.default_ratio is not None and row.default_ratio > 1
