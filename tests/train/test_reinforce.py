"""Loop (a) on a point: it learns, resumes bit for bit, does not care who simulates, and stops when it goes wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from emu_embodied.acting import Actor
from emu_embodied.train import rewards
from emu_embodied.train.grpo import GRPOConfig
from emu_embodied.train.loop import TrainingFailed
from emu_embodied.train.reinforce import Reference, RLConfig, Trained
from emu_embodied.train.rewards import RewardConfig, RewardTerm
from emu_embodied.train.rl_log import METRICS, collapse, read_metrics
from emu_embodied.train.rollouts import Spent, branch_out, draw_starts, roll_out
from emu_embodied.train.simulators import open_crew
from emu_embodied.world_model import WorldModel
from tests.train.rl_world import CONFIG, NearPoint, make_near, make_policy_world, reinforced, weights

SMALL = replace(CONFIG, rollouts=24)


def test_success_rises(tmp_path):
    config = replace(CONFIG, rollouts=192, objective=GRPOConfig(group=8), learning_rate=1e-2, save_every=100)
    _, result = reinforced(tmp_path, config)
    success = [line["success"] for line in read_metrics(tmp_path / METRICS)]
    assert result.stopped == "budget" and result.rollouts == 192
    assert np.mean(success[-4:]) > np.mean(success[:3]) + 0.25


def test_credit_by_block_learns_too(tmp_path):
    objective = GRPOConfig(group=8, discount=0.7)
    config = replace(CONFIG, rollouts=96, objective=objective, learning_rate=1e-2, save_every=100)
    reinforced(tmp_path, config)
    reward = [line["reward"] for line in read_metrics(tmp_path / METRICS)]
    assert np.mean(reward[-2:]) > np.mean(reward[:2]) + 1


def test_groups_of_single_blocks_learn_too(tmp_path):
    config = replace(CONFIG, rollouts=96, branch="block", objective=GRPOConfig(group=8), learning_rate=1e-2, batch=32)
    whole, _ = reinforced(tmp_path / "whole", replace(config, save_every=100))
    reward = [line["reward"] for line in read_metrics(tmp_path / "whole" / METRICS)]
    assert np.mean(reward[-2:]) > np.mean(reward[:2]) + 1
    reinforced(tmp_path / "parts", replace(config, rollouts=16))
    parts, _ = reinforced(tmp_path / "parts", config, resume=True)
    assert all(torch.equal(w, weights(parts)[n]) for n, w in weights(whole).items())


def test_a_branch_is_one_block_of_its_episode():
    world = make_policy_world()
    with open_crew(make_near, 0) as crew:
        starts = draw_starts(("PointMass-v0", "Twin-v0"), 2, 3, 0)
        blocks, episodes = branch_out(
            crew, Actor(world), starts, group=3, temperature=1.0, seed=3, number=0, spent=Spent()
        )
    assert len(blocks) == 3 * sum(len(episode) for episode in episodes)
    for episode in episodes:
        point = NearPoint()
        point.reset(seed=episode.start.seed)
        for t in range(len(episode)):
            group = [b for b in blocks if b.start.seed == episode.start.seed and b.reward_T[0] == episode.reward_T[t]]
            own = torch.from_numpy(point.observe(render=False).proprio)
            assert len(group) == 3 and len({b.start.group for b in group}) == 1
            assert all(torch.equal(b.situations.proprio_BTP[0, 0].long(), world.proprio.encode(own)) for b in group), (
                "one restored state"
            )
            here = point.snapshot()
            for block in group:
                point.restore(here)
                moved = point.step_block(block.actions_TKA[0].numpy())
                assert block.reward_T[1] == pytest.approx(float(moved.rewards_K[-1]))
            assert any(torch.equal(b.actions_TKA[0], episode.actions_TKA[t]) for b in group)
            point.restore(here)
            point.step_block(episode.actions_TKA[t].numpy())


def test_what_a_run_writes(tmp_path):
    world, result = reinforced(tmp_path, SMALL)
    lines = read_metrics(tmp_path / METRICS)
    keys = {"rollouts", "success", "reward", "reward/progress", "kl", "entropy", "env_steps_per_s", "share_simulator"}
    assert keys <= lines[-1].keys() and lines[-1]["rollouts"] == 24 == result.rollouts
    again = WorldModel.from_pretrained(tmp_path)
    for name, weight in again.backbone.named_parameters():
        assert torch.equal(weight, dict(world.backbone.named_parameters())[name]), name
    with pytest.raises(ValueError, match="--resume"):
        reinforced(tmp_path, SMALL)


def test_resumed_is_uninterrupted(tmp_path):
    whole, _ = reinforced(tmp_path / "whole", SMALL)
    reinforced(tmp_path / "parts", replace(SMALL, rollouts=8))
    with (tmp_path / "parts" / METRICS).open("a") as file:
        file.write('{"round": 1, "rollouts": 16}\n{"rou')  # of a run that was killed before it saved
    parts, _ = reinforced(tmp_path / "parts", SMALL, resume=True)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(parts)[name]), name
    logs = [read_metrics(tmp_path / run / METRICS) for run in ("whole", "parts")]
    assert [[line[k] for k in ("round", "rollouts", "success", "reward", "kl")] for line in logs[0]] == [
        [line[k] for k in ("round", "rollouts", "success", "reward", "kl")] for line in logs[1]
    ]
    with pytest.raises(ValueError, match="temperature"):
        reinforced(tmp_path / "parts", replace(SMALL, temperature=0.7), resume=True)


def played(workers: int, seed: int = 0):
    world = make_policy_world()
    with open_crew(make_near, workers) as crew:
        starts = draw_starts(("PointMass-v0", "Twin-v0"), 3, seed, 4)
        return roll_out(
            crew, Actor(world), starts, group=2, temperature=1.0, seed=seed, number=4, lanes=2, spent=Spent()
        )


def test_workers_change_no_byte():
    here, there, other = played(0), played(2), played(0, seed=1)
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.bins_TA, b.bins_TA) and torch.equal(a.log_probs_TA, b.log_probs_TA)
        assert np.array_equal(a.reward_T, b.reward_T) and a.steps == b.steps and a.success == b.success
        assert torch.equal(a.situations.codes_BTN, b.situations.codes_BTN)
    assert any(not torch.equal(a.actions_TKA, b.actions_TKA) for a, b in zip(here, other, strict=True))
    assert [r.start.env_id for r in here] == ["PointMass-v0"] * 2 + ["Twin-v0"] * 2 + ["PointMass-v0"] * 2


def test_a_group_begins_in_one_state_and_parts_there():
    one, two = played(0)[:2]
    assert one.start == two.start and one.reward_T[0] == two.reward_T[0]
    assert torch.equal(one.situations.rows([0]).proprio_BTP, two.situations.rows([0]).proprio_BTP)
    assert not torch.equal(one.actions_TKA, two.actions_TKA)
    assert all(len(r.reward_T) == len(r) + 1 and r.steps <= 30 for r in (one, two))


def test_seeds_keep_away_from_evaluation():
    starts = [s for number in range(50) for s in draw_starts(("A-v0",), 8, 0, number)]
    assert min(s.seed for s in starts) >= 2**20 and max(s.seed for s in starts) < 2**32
    assert len({s.seed for s in starts}) == 400


def test_several_tasks_in_one_batch(tmp_path):
    _, result = reinforced(tmp_path, replace(SMALL, rollouts=8), envs=("PointMass-v0", "Twin-v0"))
    assert {"success/PointMass-v0", "success/Twin-v0"} <= result.last.keys()


def test_the_reference_is_held_once_and_put_back():
    world = make_policy_world()
    world.backbone.requires_grad_(True)
    trained = Trained({"policy": world.backbone})
    before = weights(world)
    reference = Reference(trained)
    with torch.no_grad():
        for parameter in world.backbone.parameters():
            parameter.add_(1)
    after = weights(world)
    with reference.in_place():
        assert all(torch.equal(w, before[n]) for n, w in weights(world).items())
    assert all(torch.equal(w, after[n]) for n, w in weights(world).items())


def test_a_collapse_is_named(tmp_path):
    with pytest.raises(TrainingFailed, match=r"entropy was .*last 2 rounds.*last good checkpoint is kept"):
        reinforced(tmp_path, replace(SMALL, entropy_floor=9.0, patience=2))
    assert WorldModel.from_pretrained(tmp_path) and len(read_metrics(tmp_path / METRICS)) == 2


@pytest.mark.parametrize(("name", "value"), [("entropy", 0.001), ("kl", 9.0), ("ratio", 7.0), ("ratio", 0.1)])
def test_collapse_takes_patience(name, value):
    bounds = {"entropy": (0.1, 99.0), "kl": (-1.0, 3.0), "ratio": (0.3, 3.0)}
    fine, bad = {"entropy": 1.0, "kl": 0.1, "ratio": 1.0}, {"entropy": 1.0, "kl": 0.1, "ratio": 1.0, name: value}
    assert collapse([fine, bad, bad, bad], bounds, 3).startswith(f"{name} was")
    assert not collapse([bad, bad, fine, bad, bad], bounds, 3)


def test_a_constant_reward_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "TERMS", dict(rewards.TERMS))
    rewards.register(RewardTerm(name="flat", kind="task", low=0, high=1, unit="1", measure=lambda outcome: 0.5))
    config = replace(SMALL, reward=RewardConfig(weights={"flat": 1.0}), resamples=1)
    with pytest.raises(TrainingFailed, match=r"constant in every group; group 0 \(PointMass-v0, seed \d+.*flat = 5.5"):
        reinforced(tmp_path, config)


def test_a_reward_that_is_nan_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "TERMS", dict(rewards.TERMS))
    rewards.register(RewardTerm(name="odd", kind="task", low=0, high=1, unit="1", measure=lambda outcome: float("nan")))
    with pytest.raises(ValueError, match=r"'odd' is NaN in group 0 \(PointMass-v0"):
        reinforced(tmp_path, replace(SMALL, reward=RewardConfig(weights={"odd": 1.0})))


def test_nothing_left_to_learn_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.train.rl_world.NearPoint.success", lambda self: True)
    config = replace(SMALL, reward=RewardConfig(weights={"success": 1.0}))
    _, result = reinforced(tmp_path, config)
    assert result.stopped == "done" and "nothing is left to learn" in result.why
    assert WorldModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("env", "workers", "said"),
    [("Forgetful-v0", 0, "snapshot"), ("Nowhere-v0", 0, "unknown environment"), ("Forgetful-v0", 1, "snapshot")],
)
def test_environments_that_cannot_be_played(tmp_path, env, workers, said):
    with pytest.raises(ValueError, match=said):
        reinforced(tmp_path, replace(SMALL, workers=workers), envs=(env,))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rollouts": 3}, "no group"),
        ({"temperature": 0.0}, "temperature"),
        ({"epochs": 0}, "epochs"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings(wrong, said):
    with pytest.raises(ValueError, match=said):
        RLConfig(**wrong)


def test_metrics_are_json(tmp_path):
    reinforced(tmp_path, replace(SMALL, rollouts=8))
    for line in (tmp_path / METRICS).read_text().splitlines():
        assert isinstance(json.loads(line), dict)
