import csv
import json
from dataclasses import replace

import pytest

from emu_embodied.experiments import compare_planners
from emu_embodied.experiments.compare_planners import ComparePlanners, compare, format_rows, main
from emu_embodied.policies.registry import PlanningBudget
from tests.point_mass import PointMass


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Two searches in the smallest world, two episodes of three blocks."""
    monkeypatch.setattr(compare_planners, "make", lambda env_id, image_size: PointMass())
    return ComparePlanners(
        env="PointMass-v0",
        planners="icem,beam",
        budgets="6x1,6x2",
        budget=PlanningBudget(horizon=2, answer="best"),
        blocks=3,
        episodes=2,
        out=tmp_path,
    )


def test_every_search_meets_the_same_episodes(config):
    rows = compare(config)
    assert [(row.planner, row.budget["iterations"]) for row in rows] == [
        ("icem", 1),
        ("beam", 1),
        ("icem", 2),
        ("beam", 2),
    ]
    for row in rows:
        assert [result.seed for result in row.results] == [1000, 1001]
        assert all(result.decisions == 3 or result.success for result in row.results)
    small, large = rows[0].summary(), rows[2].summary()
    assert small["candidates"] == 6 and small["evaluations"] == 18
    assert large["first_cost"] <= small["first_cost"] < 0
    assert "icem" in format_rows(rows) and "6x2, 2 blocks" in format_rows(rows)


def test_goes_on_where_it_was_stopped(config, monkeypatch):
    stopped = compare(replace(config, episodes=1))
    asked = []
    real = compare_planners._episode
    monkeypatch.setattr(
        compare_planners, "_episode", lambda simulator, spec, seed: asked.append(seed) or real(simulator, spec, seed)
    )
    rows = compare(replace(config, episodes=3))
    assert asked == [1001] * 4 + [1002] * 4  # all searches meet a seed before the next one
    assert [row.results[0] for row in rows] == [row.results[0] for row in stopped]
    asked.clear()
    assert compare(replace(config, budget=replace(config.budget, init_std=0.3), minutes=0.0)) == []
    assert len(compare(replace(config, minutes=0.0))) == 4 and not asked
    changed = compare(replace(config, planners="icem", budgets="6x1", budget=replace(config.budget, init_std=0.3)))
    assert asked == [1000, 1001] and changed[0].label == "icem init_std=0.3 answer=best"


def test_files(config, capsys):
    main(config)
    printed = capsys.readouterr().out
    with (config.out / "compare_planners.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4 and {row["search"] for row in table} == {"icem answer=best", "beam answer=best"}
    for kind in ("svg", "png"):
        figure = config.out / f"compare_planners_PointMass-v0_true.{kind}"
        assert figure.stat().st_size > 1000 and str(figure) in printed
    assert json.loads((config.out / "compare_planners.json").read_text())["meta"]["seed"] == 1000


def test_refusals(config):
    with pytest.raises(ValueError, match="'64' is not candidates x iterations"):
        list(replace(config, budgets="64").specs())
    with pytest.raises(ValueError, match="did you mean 'icem'"):
        compare(replace(config, planners="icen"))
    (config.out / "compare_planners.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no comparison"):
        compare(config)
