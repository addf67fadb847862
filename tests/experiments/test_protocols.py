"""Protocols: problems that can be solved and repeated, and a runner that loses nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_embodied.cli import main
from emu_embodied.envs.suites import catalog
from emu_embodied.envs.suites.catalog import SUITES, Suite
from emu_embodied.experiments import protocols
from emu_embodied.experiments.protocols import find_protocol, runner
from emu_embodied.experiments.protocols.goals import MOVED, SOLVED_AT_START, Replay, Still, make_problem
from emu_embodied.experiments.protocols.p1 import PushTRule
from emu_embodied.experiments.protocols.runner import Model, Run, format_rows, load_model, read_rows, run_protocol
from emu_embodied.metrics.intervals import wilson
from emu_embodied.policies.episode import run_episode
from emu_embodied.policies.registry import PolicySpec
from emu_embodied.records import Field, Meta
from emu_embodied.world_model import WorldModel
from tests import tiny
from tests.envs.fake_world import FakeWorld
from tests.experiments.fake_protocol import PROTOCOL, FakeRule, make_env, make_toy_env

META = Meta(command="bench")
QUICK = PROTOCOL.choose(["still", "random", "replay"])


@pytest.fixture
def env():
    made = make_env("Fake/A")
    yield made
    made.close()


# -- problems ---------------------------------------------------------------------------------------------------------


def test_a_problem_follows_from_its_number(env):
    once, again, other = (make_problem(env.simulator, FakeRule(), number, ahead=10) for number in (5, 5, 6))
    assert once.start == again.start and (once.places_D == again.places_D).all() and once.tags == again.tags
    assert (once.goal.frames["eye"] == again.goal.frames["eye"]).all()
    assert once.start != other.start


@pytest.mark.parametrize("number", range(6))
def test_the_recorded_actions_lead_from_the_start_to_exactly_the_goal(env, number):
    env.reset(seed=number)
    for block in range(2):
        env.step_block(env.problem.actions_TA[5 * block : 5 * block + 5])
    seen, goal = env.observe(), env.goal_observation()
    assert (seen.proprio == goal.proprio).all() and (seen.frames["eye"] == goal.frames["eye"]).all()
    assert env.success() and env.reward() == 1.0
    trace = run_episode(env, Replay(env), seed=number)
    assert trace.success and len(trace) <= 2


def test_tags_say_what_doing_nothing_is_worth(env):
    for number in range(12):
        env.reset(seed=number)
        solved = run_episode(env, Still(env), seed=number, render=False).success
        assert solved == (SOLVED_AT_START in env.tags) == (MOVED not in env.tags)


def test_episodes_that_are_too_short_are_replaced_and_hopeless_ones_refused(env):
    class Short(FakeRule):
        ends_at_success = True

    assert make_problem(env.simulator, Short(), 0, ahead=8).actions_TA.shape == (8, 2)
    with pytest.raises(RuntimeError, match="shorter than 31 env steps"):
        make_problem(env.simulator, Short(), 0, ahead=31)


def test_the_environment_keeps_the_contract_of_simulators(env):
    with pytest.raises(ValueError, match="reset"):
        env.goal_observation()
    env.reset(seed=3)
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 5, 2)).astype(np.float32)
    env.step_block(actions[0])
    present = env.snapshot()
    first = [env.step_block(block) for block in actions[1:]]
    assert [step.truncated for step in first] == [False, False, True]
    env.restore(present)
    second = [env.step_block(block, render=False) for block in actions[1:]]
    for one, two in zip(first, second, strict=True):
        assert (one.observation.proprio == two.observation.proprio).all() and (one.rewards_K == two.rewards_K).all()
        assert one.truncated == two.truncated and not two.observation.frames
        assert ((one.rewards_K > 0) & (one.rewards_K <= 1)).all()
    env.reset(seed=3)
    assert not env.step_block(actions[0]).truncated  # the clock starts anew


@given(st.floats(-30, 30), st.floats(-30, 30), st.floats(-40, 40), st.floats(0, math.tau), st.floats(-0.6, 0.6))
def test_push_t_counts_positions_together_and_angles_around_the_circle(dx, dy, bx, angle, turn):
    class World:
        def __init__(self, x, y, block_x, angle):
            self.x, self.y, self.block_x, self.angle = x, y, block_x, angle

        def proprio(self):
            return np.array([self.x, self.y, 0.0, 0.0])

        def objects(self):
            return np.array([self.block_x, 200.0, math.sin(self.angle), math.cos(self.angle)])

    rule = PushTRule()
    goal, here = (
        rule.places(World(100, 100, 200, angle)),
        rule.places(World(100 + dx, 100 + dy, 200 + bx, angle + turn)),
    )
    away = math.sqrt(dx * dx + dy * dy + bx * bx)
    counted, beside = rule.gaps(here, goal)
    assert counted == pytest.approx([away / 20, abs(turn) / math.radians(20)], abs=1e-6) and not len(beside)
    assert rule.moved(here, goal) == (abs(bx) >= 20 or abs(turn) >= math.radians(20)) or math.isclose(abs(bx), 20)


# -- running ----------------------------------------------------------------------------------------------------------


def test_controls_are_ordered_as_they_should_be(tmp_path):
    controls = [
        PROTOCOL.equip(control, PolicySpec(), {}) for control in PROTOCOL.choose(["still", "random", "replay", "true"])
    ]
    rows = run_protocol(PROTOCOL, controls, Run(), tmp_path / "t.json", META)
    assert len(rows) == 8 and {row.episodes for row in rows} == {8}
    by = {row.control: row for row in rows if row.env == "Fake/A"}
    assert by["replay"].success == 1.0 and by["true"].success == 1.0 > by["random"].success
    assert by["still"].success == by["still"].tags[SOLVED_AT_START]["episodes"] / 8
    assert by["still"].ci95 == wilson(round(8 * by["still"].success), 8) and len(by["still"].sets) == 2
    moved = by["still"].tags[MOVED]["episodes"]
    assert by["true"].tags[MOVED] == {"episodes": moved, "success": 1.0, "ci95": list(wilson(moved, moved))}
    assert by["true"].settings["budget"]["samples"] == 48 and by["true"].settings["objective"] == "objects"
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["meta"]["command"] == "bench" and content["rows"][0]["protocol"] == "fake"


def outcomes(path: Path) -> dict[tuple[str, int], tuple[bool, float]]:
    lines = [json.loads(line) for line in path.with_suffix(".episodes.jsonl").read_text().splitlines()]
    found = {(line["row"], line["seed"]): (line["success"], line["episode_return"]) for line in lines}
    assert len(found) == len(lines)  # no episode was run twice
    return found


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    rows = run_protocol(PROTOCOL, QUICK, Run(), whole, META)
    clock = iter(range(10_000))
    monkeypatch.setattr(runner.time, "monotonic", lambda: 20.0 * next(clock))
    stopped = run_protocol(PROTOCOL, QUICK, Run(max_minutes=1), parts, META)
    assert 0 < sum(row.episodes for row in stopped) < sum(row.episodes for row in rows)
    log = parts.with_suffix(".episodes.jsonl")
    log.write_text(log.read_text() + '{"row": "cut o')  # killed while it wrote
    assert run_protocol(PROTOCOL, QUICK, Run(episodes=3), parts, META)
    monkeypatch.undo()
    again = run_protocol(PROTOCOL, QUICK, Run(), parts, META)
    assert outcomes(parts) == outcomes(whole)
    assert [(row.key, row.success, row.tags) for row in again] == [(row.key, row.success, row.tags) for row in rows]
    assert read_rows(parts) == again
    before = log.read_bytes()
    run_protocol(PROTOCOL, QUICK, Run(), parts, META)
    assert log.read_bytes() == before


def test_an_interrupted_run_leaves_a_table(tmp_path):
    def impatient(simulator, seed):
        if seed == 2:
            raise KeyboardInterrupt
        return Still(simulator, seed)

    fast, path = replace(PROTOCOL, env_ids=("Fake/A",)), tmp_path / "t.json"
    with pytest.raises(KeyboardInterrupt):
        run_protocol(fast, [replace(QUICK[0], make=impatient)], Run(), path, META)
    assert [(row.episodes, row.asked) for row in read_rows(path)] == [(2, 8)]
    [_, late] = run_protocol(fast, QUICK[:2], Run(max_minutes=1e-9), path, META)
    assert (late.control, late.episodes, late.note) == ("random", 0, "not run: no time was left")


def test_workers_change_nothing_but_the_clock(tmp_path):
    fast = replace(PROTOCOL, env_ids=("Fake/A",))
    for workers in (1, 2):
        run_protocol(fast, QUICK, Run(episodes=3, workers=workers), tmp_path / f"{workers}.json", META)
    assert outcomes(tmp_path / "1.json") == outcomes(tmp_path / "2.json")


def test_rows_of_other_settings_stay_in_the_file(tmp_path):
    path, fast = tmp_path / "t.json", replace(PROTOCOL, env_ids=("Fake/A",))
    [true] = PROTOCOL.choose(["true"])
    for samples in (8, 12):
        control = PROTOCOL.equip(true, PolicySpec(), {"samples": samples})
        rows = run_protocol(fast, [control], Run(episodes=1), path, META)
    assert [row.settings["budget"]["samples"] for row in rows] == [8, 12]
    with pytest.raises(ValueError, match="holds a table of fake, not of other"):
        run_protocol(replace(fast, name="other"), QUICK, Run(episodes=1), path, META)
    later = run_protocol(fast, QUICK[:1], Run(episodes=1, seed=7), path, META)
    assert [(row.control, row.seed) for row in later] == [("still", 7), ("true", 0), ("true", 0)]
    path.write_text('{"rows": [{"env": 1}]}')
    with pytest.raises(ValueError, match="holds no table of a protocol"):
        run_protocol(fast, QUICK, Run(episodes=1), path, META)
    path.unlink()
    path.with_suffix(".episodes.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"line 1 is no episode"):
        run_protocol(fast, QUICK, Run(episodes=1), path, META)


def toy() -> WorldModel:
    """An untrained model for the fake world."""
    return tiny.make_world(
        proprio=FakeWorld.proprio_fields,
        objects=FakeWorld.object_fields,
        cameras=("eye",),
        env_ids=PROTOCOL.env_ids,
        text_length=16,
    )


def model(**changes: object) -> Model:
    return Model(config=replace(toy().config, **changes), parameters=123_456, acts=False)


def test_learned_rows_are_run_with_a_checkpoint_of_this_embodiment(tmp_path):
    toy().save_pretrained(tmp_path / "toy")
    (tmp_path / "toy" / "meta.json").write_text('{"policy": {}}')
    fast, found = replace(PROTOCOL, env_ids=("Fake/A",), make=make_toy_env), load_model(str(tmp_path / "toy"))
    template = PolicySpec(checkpoint=str(tmp_path / "toy"))
    names = ["true-picture", "shooting", "imagined", "imagined-objects", "token"]
    controls = [fast.equip(control, template, {"samples": 4, "iterations": 1}) for control in fast.choose(names)]
    rows = run_protocol(fast, controls, Run(episodes=1), tmp_path / "t.json", META, model=found)
    assert [row.control for row in rows] == names and [row.episodes for row in rows] == [1] * 5
    assert {row.parameters for row in rows} == {found.parameters} and {row.data_hash for row in rows} == {"0" * 64}
    assert [row.settings.get("objective") for row in rows] == ["goal", "goal", "goal", "objects", None]
    assert len({row.settings["weights"] for row in rows}) == 1
    assert " M, data 00000000 |" in format_rows(rows)


def test_rows_that_cannot_be_run_say_why(tmp_path):
    learned = PROTOCOL.choose(["imagined", "imagined-objects", "token"])
    rows = run_protocol(PROTOCOL, learned, Run(episodes=2), tmp_path / "t.json", META)
    assert {row.note for row in rows} == {"not run: no checkpoint was given"} and {row.success for row in rows} == {
        None
    }
    told = [runner._why_not(control, model(objects=())) for control in learned]
    assert told == [
        "",
        "the checkpoint knows of no objects",
        "the checkpoint's policy role was not trained (train policy)",
    ]
    assert "not run: no checkpoint was given" in format_rows(rows)
    [measured] = run_protocol(
        replace(PROTOCOL, env_ids=("Fake/A",)), PROTOCOL.choose(["still"]), Run(episodes=2), tmp_path / "u.json", META
    )
    assert "| Fake/A | still | 2 |" in format_rows([measured])
    assert "| 2 of 9 |" in format_rows([replace(measured, asked=9)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_dim": 3}, "does not fit Fake/A, action dimensions: 3 against 2"),
        ({"block": 4}, "env steps in a block: 4 against 2"),
        ({"cameras": ("wrist",)}, "it reads wrist, the environment draws eye"),
        ({"objects": (Field("block", "m", 0.0, 1.0),)}, r"objects: \['block'\] against \['goal_x', 'goal_y'\]"),
    ],
)
def test_a_checkpoint_for_another_embodiment_is_refused(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "policy_settings", lambda spec, seed: {"seed": seed})
    imagined = PROTOCOL.choose(["imagined"])
    with pytest.raises(ValueError, match=message):
        toys = replace(PROTOCOL, make=make_toy_env)
        run_protocol(toys, imagined, Run(episodes=1), tmp_path / "t.json", META, model=model(**changes))


# -- names and the command line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(protocols.PROTOCOLS))
def test_every_protocol_is_found_and_names_its_rule(name):
    found = find_protocol(name)
    assert found.name == name and len(set(found.env_ids)) == len(found.env_ids) and found.episodes >= 20
    module = protocols.import_module(f"emu_embodied.experiments.protocols.{name}")
    assert "The rule is" in module.__doc__ and "What differs" in module.__doc__
    names = [control.name for control in found.controls]
    assert {"still", "random", "true", "shooting", "imagined", "token"} <= set(names) and len(set(names)) == len(names)


def test_unknown_names_name_the_nearest():
    with pytest.raises(ValueError, match=r"unknown protocol 'P11': did you mean 'p1'\? known are p1 \(Push-T"):
        find_protocol("P11")
    with pytest.raises(ValueError, match="no control 'stil': did you mean 'still'"):
        PROTOCOL.choose(["stil"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--protocol", "p9"], "unknown protocol 'p9'"),
        (["--protocol", "p1", "--env", "PushT"], "leave --env and --suite out"),
        (["--protocol", "p1", "--max-minutes", "0"], "--max-minutes is 0"),
        (["--protocol", "p1", "--episodes", "0"], "--episodes is 0"),
        (["--env", "PandaReach-v0", "--policy", "random", "--max-minutes", "1"], "--max-minutes is for --protocol"),
        (["--env", "PandaReach-v0"], "give --policy, or --protocol"),
    ],
)
def test_what_is_wrong_is_said(flags, said, tmp_path, capsys):
    assert main(["bench", *flags, "--json", str(tmp_path / "t.json")]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_suite_is_one_pip_line(tmp_path, capsys, monkeypatch):
    absent = Suite(name="pusht", tasks={"PushT": "PushT"}, world="pusht:PushT", modules=("no_such_module_here",))
    monkeypatch.setitem(catalog.SUITES, "pusht", absent)
    assert main(["bench", "--protocol", "p1", "--json", str(tmp_path / "t.json")]) == 2
    assert "pip install 'emu-embodied[suites]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(protocols.PROTOCOLS))
def test_protocols_run_from_the_command_line(name, tmp_path):
    for suite in find_protocol(name).suites:
        if reason := SUITES[suite].missing():
            pytest.skip(reason)
    path = tmp_path / "t.json"
    best = "replay" if name in ("p1", "p2") else "expert"
    flags = ["--protocol", name, "--episodes", "1", "--workers", "1", "--policy", f"still,{best},imagined"]
    assert main(["bench", *flags, "--json", str(path)]) == 0
    rows = read_rows(path)
    assert {row.env for row in rows} == set(find_protocol(name).env_ids)
    assert {row.success for row in rows if row.control == best} == {1.0}
    assert {row.episodes for row in rows if row.control == "imagined"} == {0}
