import json
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from emu_embodied.metrics.foresight import foresight, foretold
from emu_embodied.metrics.image import psnr
from emu_embodied.policies.episode import run_episode
from emu_embodied.policies.registry import PlanningBudget, PolicySpec, make_policy
from emu_embodied.records import Meta
from emu_embodied.viz.compare import GAP, HEAD, MARGIN, SPLIT, plan_video
from emu_embodied.viz.figures import MAX_COLUMNS, imagined_vs_real_figure, save_figure
from emu_embodied.viz.report import write_plan_report
from emu_embodied.viz.video import write_video
from tests.point_mass import PointMass, PointMassModel

BUDGET = PlanningBudget(samples=16, iterations=2, horizon=3, answer="best")


def planned(name: str = "imagined", drift: float = 0.02, seed: int = 1, **changes):
    simulator = PointMass()
    spec = PolicySpec(name=name, budget=replace(BUDGET, **changes))
    policy = make_policy(spec, simulator, world_model=PointMassModel(drift), record=True)
    return run_episode(simulator, policy, seed=seed, env_id="PointMass-v0", policy_name=name)


@pytest.fixture(scope="module")
def trace():
    return planned()


def test_report_writes_everything(trace, tmp_path):
    files = write_plan_report(trace, tmp_path / "out", Meta(command="plan", seed=1))
    assert [file.name for file in files] == ["plan.mp4", "imagined_vs_real.png", "result.json"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(file.name for file in files)
    result = json.loads(files[2].read_text())
    assert result["success"] is trace.success and result["blocks"] == len(trace)
    assert result["meta"]["command"] == "plan"
    assert len(result["decisions"]) == len(trace.decisions)
    assert result["decisions"][0]["evaluations"] == BUDGET.evaluations
    assert result["imagined_vs_real"]["block"] == list(range(1, len(trace) + 1))
    assert trace.verdict == result["verdict"]
    film = iio.imread(files[0], plugin="pyav")
    assert film.shape == plan_video(trace).shape
    assert iio.immeta(files[0], plugin="pyav")["codec"] == "h264"
    figure = np.asarray(Image.open(files[1]))
    assert min(figure.shape[:2]) > 800 and figure.std() > 10


def test_report_of_a_policy_that_does_not_plan(tmp_path):
    simulator = PointMass()
    policy = make_policy(PolicySpec(name="random"), simulator)
    trace = run_episode(simulator, policy, seed=0)
    files = write_plan_report(trace, tmp_path, Meta(command="plan"))
    assert [file.name for file in files] == ["plan.mp4", "result.json"]
    assert json.loads(files[1].read_text())["imagined_vs_real"] is None
    with pytest.raises(ValueError, match="nothing to compare"):
        foresight(trace)


def test_report_of_the_true_planner(tmp_path):
    trace = planned("true")
    assert np.isinf(foresight(trace).psnr_M).all()
    files = write_plan_report(trace, tmp_path, Meta(command="plan"))
    assert json.loads(files[2].read_text())["imagined_vs_real"]["psnr_db"] == [None] * len(trace)


def test_film_shows_the_plan_and_then_what_came_of_it(trace):
    film = plan_video(trace, act_frames=2, end_frames=5)
    future = trace.decisions[0].future
    assert len(film) == len(trace) * (3 + 2) + 3
    scale = 16  # 540 // 32

    def panel(frame: int, left: int) -> np.ndarray:
        return film[frame][HEAD : HEAD + 32 * scale : scale, left : left + 32 * scale : scale]

    right = MARGIN + 32 * scale + SPLIT
    for ahead in range(3):
        assert np.array_equal(panel(ahead, MARGIN), trace.frames["front"][0])
        assert np.array_equal(panel(ahead, right), future.frames["front"][ahead])
    for frame in (3, 4):
        assert np.array_equal(panel(frame, MARGIN), trace.frames["front"][1])
        assert np.array_equal(panel(frame, right), future.frames["front"][0])
    assert np.array_equal(panel(-1, MARGIN), trace.frames["front"][-1])
    assert np.array_equal(film[-1], film[-5])


def test_film_of_an_old_plan_keeps_step_with_it():
    trace = planned(replan_every=3)
    film = plan_video(trace, act_frames=1, end_frames=1)
    assert len(film) == len(trace) + 3 * len(trace.decisions)
    side = 32 * 16
    right = MARGIN + side + SPLIT
    second = film[4][HEAD : HEAD + side : 16, right : right + side : 16]  # 3 frames of planning, block 1, block 2
    assert np.array_equal(second, trace.decisions[0].future.frames["front"][1])


def test_film_has_room_for_every_camera_that_both_sides_have(trace):
    def twice(frames):
        return {"front": frames["front"], "wrist": frames["front"]}

    drawn = replace(trace, frames=twice(trace.frames))
    assert drawn.compared_cameras == ("front",)
    assert plan_video(drawn).shape == plan_video(trace).shape
    decisions = tuple(replace(d, future=replace(d.future, frames=twice(d.future.frames))) for d in trace.decisions)
    hindsight = tuple(replace(future, frames=twice(future.frames)) for future in trace.hindsight)
    both = replace(drawn, decisions=decisions, hindsight=hindsight)
    assert both.compared_cameras == ("front", "wrist")
    side = 2 * 8 * 32 + GAP
    assert plan_video(both).shape[2] == 2 * side + SPLIT + 2 * MARGIN
    assert len(imagined_vs_real_figure(both).subfigs[1].axes) == 2 * len(imagined_vs_real_figure(drawn).subfigs[1].axes)


def test_foresight_measures_what_it_says(trace):
    errors = foresight(trace)
    drift = 100 * 0.02 * np.sqrt(2)  # cm per block, along both axes
    assert np.allclose(errors.tool_error_M, drift * errors.ahead_M, atol=0.01)
    assert errors.ahead_M.tolist()[:4] == [1, 2, 3, 1]
    future = foretold(trace)[0]
    frames = trace.frames["front"]
    assert errors.psnr_M[1] == psnr(future.frames["front"][1], frames[2])
    assert errors.copy_psnr_M[1] == psnr(frames[0], frames[2])
    assert np.isclose(errors.reward_error_M[1], abs(future.reward_H[1] - trace.reward_T[2]))


def test_figure_of_a_long_episode_leaves_states_out():
    simulator = PointMass(max_episode_steps=200)
    spec = PolicySpec(name="imagined", objective="success", budget=replace(BUDGET, samples=4, iterations=1))
    policy = make_policy(spec, simulator, world_model=PointMassModel(), record=True)
    trace = run_episode(simulator, policy, seed=3)
    assert len(trace) == 40
    strip = imagined_vs_real_figure(trace).subfigs[1]
    titles = [axes.get_title() for axes in strip.axes if axes.get_title()]
    assert len(titles) <= MAX_COLUMNS and titles[0] == "start" and titles[-1] == "block 40"


def test_figure_is_the_same_twice(trace, tmp_path):
    for name in ("a.png", "b.png"):
        save_figure(tmp_path / name, imagined_vs_real_figure(trace))
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png")))


def test_videos_are_even_and_whole(tmp_path):
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.normal(0, 2, (6, 33, 47, 3)), axis=0) + 128
    frames = np.broadcast_to(smooth.mean(axis=(1, 2), keepdims=True), smooth.shape).clip(0, 255).astype(np.uint8)
    write_video(tmp_path / "odd.mp4", frames, fps=4)
    read = iio.imread(tmp_path / "odd.mp4", plugin="pyav")
    assert read.shape == (6, 34, 48, 3)
    assert np.abs(read[:, :33, :47].astype(int) - frames).max() <= 6
    assert iio.immeta(tmp_path / "odd.mp4", plugin="pyav")["fps"] == 4
    with pytest.raises(ValueError, match="a video needs frames"):
        write_video(tmp_path / "none.mp4", frames[:0], fps=4)
    assert [file.name for file in tmp_path.iterdir()] == ["odd.mp4"]
