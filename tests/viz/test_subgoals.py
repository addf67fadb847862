"""What a plan by subgoals leaves: pictures side by side, a page and numbers."""

import json

import numpy as np
import pytest
from PIL import Image

from emu_embodied.metrics.foresight import foretold
from emu_embodied.policies.episode import run_episode
from emu_embodied.policies.registry import PlanningBudget, PolicySpec, make_policy
from emu_embodied.records import Meta
from emu_embodied.viz.compare import MARGIN
from emu_embodied.viz.report import write_plan_report
from emu_embodied.viz.subgoals import CAPTION, HEAD, PANEL, subgoals_markdown, subgoals_picture
from tests.point_mass import PIXELS, PointMass, PointMassModel


@pytest.fixture(scope="module")
def trace():
    return pursue(record=True)


def pursue(record: bool, name: str = "subgoals", seed: int = 1):
    simulator = PointMass()
    budget = PlanningBudget(samples=16, iterations=2, horizon=2, answer="best")
    policy = make_policy(
        PolicySpec(name=name, budget=budget), simulator, world_model=PointMassModel(), record=record, seed=seed
    )
    return run_episode(simulator, policy, seed=seed, env_id="PointMass-v0", policy_name=name)


def test_a_report_of_subgoals(trace, tmp_path):
    files = write_plan_report(trace, tmp_path, Meta(command="plan"))
    names = [file.name for file in files]
    assert names == ["plan.mp4", "imagined_vs_real.png", "subgoals.png", "subgoals.md", "result.json"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert [s["text"] for s in result["subgoals"]] == [s.text for s in trace.subgoals] and result["ended"] == ""
    page = (tmp_path / "subgoals.md").read_text()
    assert "![before, imagined, achieved](subgoals.png)" in page
    for subgoal in trace.subgoals:
        assert f"| {subgoal.text} | {subgoal.start} | {subgoal.blocks} | {subgoal.outcome} |" in page


def test_the_picture_shows_before_imagined_and_achieved(trace, tmp_path):
    image = subgoals_picture(trace)
    scale = PANEL // PIXELS
    tall = PIXELS * scale
    for index, subgoal in enumerate(trace.subgoals):
        top = HEAD + index * (CAPTION + tall + 8) + CAPTION
        shown = (trace.frames["front"][subgoal.start], subgoal.keyframe["front"], subgoal.achieved["front"])
        for column, frame in enumerate(shown):
            left = MARGIN + column * (PIXELS * scale + MARGIN)
            found = image[top : top + tall : scale, left : left + PIXELS * scale : scale]
            assert np.array_equal(found, frame)
    assert Image.fromarray(image).size[1] > HEAD + len(trace.subgoals) * tall


def test_without_recorded_pictures_there_is_a_page(tmp_path):
    trace = pursue(record=False)
    with pytest.raises(ValueError, match="record=True"):
        subgoals_picture(trace)
    assert "![" not in subgoals_markdown(trace) and trace.subgoals[0].text in subgoals_markdown(trace)
    assert "subgoals.md" in [file.name for file in write_plan_report(trace, tmp_path, Meta(command="plan"))]


@pytest.mark.parametrize("name", ["subgoals", "true_subgoals"])
@pytest.mark.parametrize("asked", [0, 1])
def test_a_report_of_a_policy_that_stops_before_the_episode_is_over(tmp_path, monkeypatch, name, asked):
    original, calls = PointMassModel.propose, []

    def tired(self, observation, steps, generator=None):
        calls.append(steps)
        return original(self, observation, 1, generator) if len(calls) <= asked else ()

    monkeypatch.setattr(PointMassModel, "propose", tired)
    trace = pursue(record=True, name=name)
    assert trace.ended and trace.planned_blocks < len(trace) and len(trace.subgoals) == asked
    assert all(future.start + len(future) <= trace.planned_blocks for future in foretold(trace)) or trace.hindsight
    files = write_plan_report(trace, tmp_path, Meta(command="plan"))
    assert (tmp_path / "subgoals.md").exists() and (tmp_path / "subgoals.png").exists() == bool(asked)
    assert trace.ended in (tmp_path / "subgoals.md").read_text() and files[-1].name == "result.json"


def test_the_same_subgoals_in_the_true_world():
    trace = pursue(record=True, name="true_subgoals")
    assert trace.subgoals and trace.subgoals[0].keyframe and not trace.hindsight
