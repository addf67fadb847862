"""The checkpoints inside the package: they load, are small, and a robot can be driven with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from emu_embodied.cli import main
from emu_embodied.envs.registry import make
from emu_embodied.envs.suites.catalog import SUITES
from emu_embodied.records import Observation
from emu_embodied.world_config import WEIGHTS, shipped
from emu_embodied.world_model import WorldModel

NAMES = shipped()
RECORDED = Path(__file__).parent / "recorded"


STEERED = {"Panda": ("ee_y", 1, 0.10), "PushT": ("agent_x", 0, 50.0), "MetaWorld/": ("ee_y", 1, 0.016)}
"""Beginning of an environment's id -> proprio entry, the action dimension that moves it, and how far apart opposite
blocks must at least be imagined: about 0.4 of what the simulator says."""


def test_what_is_promised_ships() -> None:
    assert set(NAMES) >= {"metaworld", "nano", "panda", "pusht"}


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_checkpoint_is_small_and_says_where_it_comes_from(name: str) -> None:
    files = [path for path in (WEIGHTS / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    meta = json.loads((WEIGHTS / name / "meta.json").read_text())
    for stage in ("world", "dida"):
        assert meta[stage]["data_hash"] and meta[stage]["command"].startswith("emu-embodied train")


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_checkpoint_knows_where_actions_take_the_arm(name: str) -> None:
    """Not a benchmark: opposite actions must lead to clearly different, rightly ordered imagined places."""
    world = WorldModel.from_pretrained(name)
    [(entry, dimension, least)] = [
        how for beginning, how in STEERED.items() if world.config.env_ids[0].startswith(beginning)
    ]
    place = [field.name for field in world.config.proprio].index(entry)
    belief = world.observe([somewhere(world)])
    actions = torch.zeros(2, 1, world.block, world.config.action_dim)
    actions[0, ..., dimension], actions[1, ..., dimension] = 1.0, -1.0
    futures = world.imagine(belief, actions, torch.Generator().manual_seed(0))
    there, back = futures.proprio_SHP[:, 0, place].tolist()
    assert there - back > least


def somewhere(world: WorldModel) -> Observation:
    """A state that the model was trained for; of a suite, which need not be installed, a recorded start."""
    config = world.config
    for name, suite in SUITES.items():
        if config.env_ids[0] in suite.tasks:
            with np.load(RECORDED / f"{name}.npz") as recorded:
                frames = {camera: recorded[camera] for camera in config.cameras}
                return Observation(frames, recorded["proprio"], str(recorded["instruction"]))
    simulator = make(config.env_ids[0], image_size=config.image_size)
    simulator.reset(seed=0)
    seen = simulator.observe()
    simulator.close()
    return seen


def test_plan_writes_video_figure_and_result(tmp_path) -> None:
    out = tmp_path / "plan"
    small = ["--samples", "4", "--iterations", "1", "--horizon", "1"]
    assert main(["plan", "--env", "PandaReach-v0", "--seed", "3", "--out", str(out), *small]) == 0
    assert {path.name for path in out.iterdir()} == {"plan.mp4", "imagined_vs_real.png", "result.json"}
    result = json.loads((out / "result.json").read_text())
    assert result["env"] == "PandaReach-v0" and result["meta"]["data_hash"]
    assert main(["plan", "--env", "PandaReach-v0", "--seed", "3", "--out", str(out), *small]) == 2  # never overwritten


def test_bench_writes_the_promised_rows(tmp_path) -> None:
    file = tmp_path / "rows.json"
    small = ["--samples", "2", "--iterations", "1", "--horizon", "1", "--episodes", "1", "--workers", "1"]
    assert main(["bench", "--env", "PandaReach-v0", "--policy", "random,imagined", "--json", str(file), *small]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["policy"] for row in rows] == ["random", "imagined"]
    promised = {"env", "policy", "episodes", "success", "ci95", "return_mean", "seconds_per_action"}
    assert all(promised <= row.keys() for row in rows)


def test_imagine_writes_the_promised_figures(tmp_path) -> None:
    file = tmp_path / "horizons.json"
    few = ["--env", "PandaReach-v0", "--episodes", "2", "--horizon", "4"]
    assert main(["imagine", *few, "--json", str(file), "--out", str(tmp_path)]) == 0
    rows = json.loads(file.read_text())["per_horizon"]
    assert [row["h"] for row in rows] == [1, 2, 3, 4]
    promised = {"token_accuracy", "changed_token_accuracy", "copy_last_token_accuracy", "psnr", "copy_last_psnr"}
    assert all(promised | {"reward_corr", "proprio_mae"} <= row.keys() for row in rows)
