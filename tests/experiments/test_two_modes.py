import csv
import json

import pytest
import torch

from emu_embodied.experiments.two_modes import PRESET, TwoModes, make_scene, mode_shares, train, write_rows
from emu_embodied.experiments.untrained import untrained

CONFIG = TwoModes(steps=250, samples=256)


@pytest.fixture(scope="module")
def scene_and_world():
    torch.set_num_threads(1)
    world = untrained(PRESET, paths=("uniform",))
    scene = make_scene(world, 0)
    train(world, scene, CONFIG)
    return scene, world


def shares(scene_and_world, decoding: str, passes: int):
    scene, world = scene_and_world
    other = world.with_decoding(decoding, passes=passes, temperature=1.0)
    return mode_shares(other, scene, decoding, passes, CONFIG.samples, 0)


def test_the_two_frames_differ_in_half_of_their_tokens(scene_and_world):
    scene, _ = scene_and_world
    assert int(scene.differs_N.sum()) == 8
    drawn = scene.batch(400, torch.Generator().manual_seed(0)).codes_BTN[:, 1]
    both = [(drawn == frame).all(-1) for frame in scene.frames_2N]
    assert bool((both[0] ^ both[1]).all()) and 150 < int(both[0].sum()) < 250


def test_sampling_in_parallel_keeps_both_futures_and_more_passes_keep_them_apart(scene_and_world):
    sequential = shares(scene_and_world, "autoregressive", 1)
    one, many = shares(scene_and_world, "dida", 1), shares(scene_and_world, "dida", 16)
    for row in (sequential, one, many):
        assert row.rarer > 0.3  # no collapse
        assert row.first + row.second + row.mixed == pytest.approx(1)
    assert sequential.mixed < 0.3 and one.mixed > 0.8  # tokens of one pass do not know of each other
    assert many.mixed < one.mixed - 0.2 and min(many.first, many.second) > 0.1


def test_rows_are_written(scene_and_world, tmp_path):
    rows = [shares(scene_and_world, "dida", 1)]
    write_rows(tmp_path, rows, CONFIG)
    with (tmp_path / "two_modes.csv").open() as file:
        assert float(next(csv.DictReader(file))["mixed"]) == rows[0].mixed
    assert json.loads((tmp_path / "two_modes.json").read_text())["rows"][0]["method"] == "dida"
