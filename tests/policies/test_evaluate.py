import json
from dataclasses import replace

import pytest

from emu_embodied.metrics.intervals import wilson
from emu_embodied.policies.episode import run_episode
from emu_embodied.policies.evaluate import (
    EpisodeResult,
    bench,
    format_table,
    read_results,
    run_episodes,
    summarise,
    untouched,
    write_results,
)
from emu_embodied.policies.registry import PlanningBudget, PolicySpec
from emu_embodied.records import Meta
from tests.point_mass import PointMass, make_point_mass

TRUE = PolicySpec(name="true", budget=PlanningBudget(samples=12, iterations=2, horizon=3, answer="best"))
RANDOM = PolicySpec(name="random")


def outcome(results) -> list[tuple]:
    return [(r.seed, r.success, r.episode_return, r.decisions) for r in results]


def test_workers_change_nothing_but_the_clock():
    alone, crew = (
        run_episodes(
            "PointMass-v0", TRUE.build, seeds=range(5), make_simulator=make_point_mass, render=False, workers=workers
        )
        for workers in (1, 2)
    )
    assert outcome(alone) == outcome(crew)
    assert [result.seed for result in alone] == list(range(5))


def test_planning_beats_random():
    rows = bench(["PointMass-v0"], [RANDOM, TRUE], episodes=6, seed=10, make_simulator=make_point_mass)
    random, true = rows
    assert (random.policy, true.policy) == ("random", "true")
    assert true.success == 1.0 > random.success
    assert true.return_mean > random.return_mean
    assert true.ci95 == wilson(6, 6)
    assert true.seconds_per_action > random.seconds_per_action > 0


def test_episode_ends_at_the_first_success_and_the_return_counts_on():
    simulator = PointMass()
    trace = run_episode(simulator, TRUE.build(simulator, 0), seed=0, render=False)
    assert trace.success and len(trace) < 12 and not trace.frames
    steps = 5 * len(trace)
    assert trace.episode_return > 0.9 * (simulator.max_episode_steps - steps)
    assert trace.episode_return < simulator.max_episode_steps
    hopeless = run_episode(simulator, RANDOM.build(simulator, 0), seed=0, render=False)
    assert not hopeless.success and len(hopeless) == 12
    assert hopeless.episode_return < 0.6 * simulator.max_episode_steps


def test_success_anywhere_in_a_block_counts():
    class Passing(PointMass):
        def step_block(self, actions_KA, *, render=True):
            return replace(super().step_block(actions_KA, render=render), success=False, success_any=True)

    trace = run_episode(Passing(), RANDOM.build(PointMass(), 0), seed=0)
    assert trace.success and len(trace) == 1


def test_rows_are_reused_only_with_the_same_settings():
    saved = []
    run = {"episodes": 2, "make_simulator": make_point_mass}
    rows = bench(["PointMass-v0"], [RANDOM, TRUE], seed=0, on_row=saved.append, **run)
    assert [len(state) for state in saved] == [1, 2]
    marked = [replace(row, return_mean=-1.0) for row in rows]
    assert bench(["PointMass-v0"], [RANDOM, TRUE], seed=0, kept=marked, **run) == marked
    saved.clear()
    bench(["PointMass-v0"], [RANDOM, TRUE], seed=0, kept=marked[1:], on_row=saved.append, **run)
    assert [[row.policy for row in state] for state in saved] == [["random", "true"]]  # a kill loses no kept row
    dearer = replace(TRUE, budget=replace(TRUE.budget, samples=13))
    again = bench(["PointMass-v0"], [RANDOM, dearer], seed=0, kept=marked, **run)
    assert [row.return_mean == -1.0 for row in again] == [True, False]
    moved = bench(["PointMass-v0"], [RANDOM], seed=1, kept=marked, **run)
    assert moved[0].return_mean != -1.0


def test_rows_of_other_settings_stay_in_the_file():
    dearer = replace(TRUE, budget=replace(TRUE.budget, samples=13))
    rows = bench(["PointMass-v0"], [RANDOM, TRUE, dearer], episodes=1, seed=0, make_simulator=make_point_mass)
    trained_before = [replace(row, settings=row.settings | {"weights": "before"}) for row in rows]
    assert untouched(trained_before, ["PointMass-v0"], [TRUE], 0) == [trained_before[0], trained_before[2]]
    assert untouched(rows, ["PointMass-v0"], [TRUE], 1) == untouched(rows, ["Other-v0"], [TRUE], 0) == rows


def test_a_table_tells_guided_rows_from_others():
    [row] = bench(["PointMass-v0"], [TRUE], episodes=1, seed=0, make_simulator=make_point_mass)
    settings = row.settings | {"acting": {}, "budget": row.settings["budget"] | {"proposals": 0.5}}
    table = format_table([row, replace(row, settings=settings)])
    assert table.count("50 % proposed") == 1


def test_results_survive_the_file(tmp_path):
    rows = bench(["PointMass-v0"], [TRUE], episodes=2, seed=0, make_simulator=make_point_mass)
    path = tmp_path / "deep" / "bench.json"
    write_results(path, rows, Meta(command="bench", seed=0))
    content = json.loads(path.read_text())
    keys = {"env", "policy", "episodes", "success", "ci95", "return_mean", "seconds_per_action"}
    assert keys <= set(content["rows"][0])
    assert content["meta"]["command"] == "bench"
    assert read_results(path) == rows
    path.write_text('{"rows": [{"env": 1}]}')
    with pytest.raises(ValueError, match="holds no benchmark results"):
        read_results(path)


def test_table_reads_well():
    results = [EpisodeResult(seed, seed < 3, 10.0 + seed, 4, 2.0) for seed in range(4)]
    row = summarise("PandaPush-v0", "imagined", results, {"objective": "goal"})
    table = format_table([row]).splitlines()
    assert len({len(line) for line in table}) == 1
    assert table[-1].split("|")[1:-1] == [
        " PandaPush-v0 ", " imagined ", " goal ", "        4 ", "    75 % ", "    30 to 95 % ", "   11.5 ",
        "        0.500 ",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="at least one episode"):
        summarise("PandaPush-v0", "imagined", [])


def test_a_broken_episode_is_an_error_not_a_failure():
    class Broken(PointMass):
        def step_block(self, actions_KA, *, render=True):
            raise RuntimeError("the simulator broke")

    with pytest.raises(RuntimeError, match="broke"):
        run_episodes("PointMass-v0", RANDOM.build, seeds=[0], make_simulator=lambda env_id: Broken())
