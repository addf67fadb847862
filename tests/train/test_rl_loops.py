"""Loops (b), (c) and (d), and adapters, on the point: each learns what it is for, and resumes bit for bit."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from emu_embodied.acting import Actor
from emu_embodied.records import Field
from emu_embodied.train import adapters
from emu_embodied.train.grpo import GRPOConfig
from emu_embodied.train.imagination_loop import ImaginationLoop, fidelity
from emu_embodied.train.imagined_loop import ImaginedConfig, dream
from emu_embodied.train.loop import TrainingFailed
from emu_embodied.train.reinforce import RLConfig
from emu_embodied.train.rewards import RewardConfig
from emu_embodied.train.rl import RLSettings, train_rl
from emu_embodied.train.rl_log import METRICS, read_metrics
from emu_embodied.train.rollouts import Spent, draw_starts, roll_out
from emu_embodied.train.simulators import open_crew
from emu_embodied.train.teacher_loop import TeacherLoop
from emu_embodied.train.transitions import transitions
from emu_embodied.world_model import WorldModel
from tests import tiny
from tests.point_mass import PIXELS, STEP
from tests.train.rl_world import CONFIG, NearPoint, make_near, make_policy_world, weights

QUICK = replace(CONFIG, rollouts=12, groups=3, objective=GRPOConfig(group=4), batch=32)
IMAGINED = ImaginedConfig(horizon=2, success_at=0.999, refresh_every=2, refresh_steps=2, refresh_batch=8)


class Guide:
    """Goes to the goal; a lazy one stands still."""

    def __init__(self, simulator: NearPoint, lazy: bool) -> None:
        self.simulator = simulator
        self.lazy = lazy

    def reset(self, observation: object) -> None: ...

    def act(self, observation: object) -> np.ndarray:
        away = self.simulator.state.goal - self.simulator.state.position
        move = np.clip(away / (STEP * 5), -1, 1) * (not self.lazy)
        return np.repeat(move[None], 5, 0).astype(np.float32)


def run(out: Path, loop: str, config: RLConfig = QUICK, *, resume: bool = False, lazy: bool = False, **settings):
    world = make_policy_world()
    result = train_rl(
        RLSettings(env_ids=("PointMass-v0",), loop=loop, config=config, imagined=IMAGINED, **settings),
        world,
        make_near,
        out,
        resume=resume,
        imaginer=make_policy_world(1) if loop == "imagined" else None,
        make_teacher=lambda simulator, seed: Guide(simulator, lazy),
    )
    return world, result


AGREEMENT = replace(QUICK, reward=RewardConfig(weights={"agreement": 1.0, "fidelity": 0.2}))


@pytest.mark.parametrize(
    ("loop", "config", "settings"),
    [
        ("policy", replace(QUICK, groups=1), {}),
        ("imagined", replace(QUICK, least_spread=0.0), {}),
        ("planner", replace(QUICK, groups=1), {}),
        ("imagination", AGREEMENT, {"sampling": "dida"}),
        ("imagination", AGREEMENT, {"sampling": "autoregressive"}),
    ],
)
def test_resumed_is_uninterrupted(tmp_path, loop, config, settings):
    whole, result = run(tmp_path / "whole", loop, config, **settings)
    run(tmp_path / "parts", loop, replace(config, rollouts=4), **settings)
    parts, _ = run(tmp_path / "parts", loop, config, resume=True, **settings)
    assert result.rollouts == 12
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(parts)[name]), name
    assert {"rollouts", "success", "reward", "kl", "env_steps_per_s"} <= result.last.keys()
    saved = WorldModel.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(w, weights(whole)[n]) for n, w in weights(saved).items())
    first = weights(make_policy_world())
    assert any(not torch.equal(w, first[n]) for n, w in weights(whole).items())


def test_a_policy_in_numbers_is_reinforced_too(tmp_path):
    plain, objects = make_policy_world(), (Field("goal_x", "m", -1.0, 1.0),)
    numbers = {"objects": objects, "streams": ("pictures", "numbers"), "policy_stream": "numbers"}
    eye = tiny.make_eye(objects, cameras=("front",), image_size=PIXELS)
    world = WorldModel(replace(plain.config, **numbers), plain.backbone, plain.frames, eye=eye)
    before = weights(world)
    settings = RLSettings(env_ids=("PointMass-v0",), loop="policy", config=QUICK)
    train_rl(settings, world, make_near, tmp_path / "run", resume=False)
    moved = [name for name, weight in weights(world).items() if not torch.equal(weight, before[name])]
    assert any("q_proj" in name for name in moved)
    kept = WorldModel.from_pretrained(tmp_path / "run").config
    assert (kept.stream, kept.policy_stream) == ("pictures", "numbers")


@pytest.mark.parametrize("sampling", ["dida", "autoregressive"])
def test_imagination_comes_nearer_to_the_truth(tmp_path, sampling):
    config = replace(AGREEMENT, rollouts=96, groups=8, objective=GRPOConfig(group=8), learning_rate=1e-2, batch=64)
    run(tmp_path, "imagination", replace(config, reward=RewardConfig(weights={"agreement": 1.0})), sampling=sampling)
    agreement = [line["imagined/agreement"] for line in read_metrics(tmp_path / METRICS)]
    assert np.mean(agreement[-3:]) > np.mean(agreement[:3]) + 0.05


@pytest.mark.parametrize("sampling", ["dida", "autoregressive"])
def test_scores_are_those_of_the_draw(sampling):
    world = make_policy_world()
    config = replace(AGREEMENT, groups=2)
    with open_crew(make_near, 0, last_frames=True) as crew:
        loop = ImaginationLoop(crew, Actor(world), ("PointMass-v0",), config, sampling)
        experience = loop.experience(0, 4)
    rows = torch.arange(len(experience.rollout_R))
    again, entropy = experience.score(rows)
    torch.testing.assert_close(again.detach(), experience.old_RT, atol=1e-5, rtol=1e-5)
    # On average a token's surprise is its entropy.
    assert abs(float(-again.mean() - entropy.mean())) < 0.25


def real_rollouts(world: WorldModel):
    with open_crew(make_near, 0, last_frames=True) as crew:
        return roll_out(
            crew, Actor(world), draw_starts(("PointMass-v0",), 4, 0, 0), group=1, temperature=1.0, seed=0, number=0,
            lanes=1, spent=Spent(),
        )  # fmt: skip


def test_transitions_are_what_happened():
    world = make_policy_world()
    rollouts = real_rollouts(world)
    pool = transitions(Actor(world), rollouts)
    assert len(pool.codes_BTN) == sum(len(rollout) for rollout in rollouts)
    at = 0
    for rollout in rollouts:
        point = NearPoint()
        point.reset(seed=rollout.start.seed)
        for t in range(len(rollout)):
            before = torch.from_numpy(point.observe(render=False).proprio)
            moved = point.step_block(rollout.actions_TKA[t].numpy())
            after = torch.from_numpy(moved.observation.proprio)
            for state, true in ((0, before), (1, after)):
                assert torch.equal(world.proprio.encode(pool.proprio_BTP[at, state]), world.proprio.encode(true))
            assert float(pool.reward_BT[at, 1]) == pytest.approx(float(moved.rewards_K[-1]))
            assert bool(pool.success_BT[at, 1]) == (moved.success_any and t + 1 == len(rollout))
            at += 1


def test_fidelity_of_the_truth_and_of_standing_still():
    world = make_policy_world()
    truth = transitions(Actor(world), real_rollouts(world))
    from emu_embodied.tokens.sequence import StateTokens

    def state(t: int) -> StateTokens:
        return StateTokens(truth.codes_BTN[:, t], world.proprio.encode(truth.proprio_BTP[:, t]))

    perfect, still = fidelity(world, truth, state(1)), fidelity(world, truth, state(0))
    assert (perfect.agreement, perfect.repeated, perfect.stale, perfect.proprio_error) == (1, 0, 0, 0)
    assert (still.changed_right, still.repeated, still.stale) == (0, 1, 1) and still.proprio_error > 0


def test_nothing_counts_after_an_imagined_success(monkeypatch):
    world = make_policy_world()
    actor, first = Actor(world), real_rollouts(world)[0].situations.rows([0, 0, 0])
    config = ImaginedConfig(horizon=3, success_at=1e-9)
    found = dream(actor, world, first, torch.zeros(3), config, 1.0, torch.Generator().manual_seed(0))
    assert found.counts_RH.tolist() == [[True, False, False]] * 3, "each first state reached counts as solved"
    assert found.reward_RH.shape == (3, 4) and len(found.situations) == 9
    never = dream(
        actor, world, first, torch.zeros(3), replace(config, success_at=1 - 1e-9), 1.0, torch.Generator().manual_seed(0)
    )
    assert never.counts_RH.all()
    scored = actor.log_probs(never.situations, never.bins_RHA.flatten(0, 1)).log_probs_BA
    torch.testing.assert_close(scored.detach().view(3, 3, 2), never.log_probs_RHA, atol=1e-5, rtol=1e-5)


def test_the_model_is_refreshed_and_kept(tmp_path):
    run(tmp_path, "imagined")
    kept = weights(WorldModel.from_pretrained(tmp_path / "world"))
    assert any(not torch.equal(w, kept[n]) for n, w in weights(make_policy_world(1)).items())
    lines = read_metrics(tmp_path / METRICS)
    assert ["world_loss" in line for line in lines] == [True, False, True]


def test_what_the_simulator_confirmed_is_imitated(tmp_path):
    before = make_policy_world()
    config = replace(QUICK, rollouts=24, groups=2, epochs=8, learning_rate=1e-2)
    after, result = run(tmp_path, "planner", config)
    assert result.last["success"] == 1 and result.last["confirmed"] == 8
    with ExitStack() as closing:
        loop = TeacherLoop(
            make_near, lambda s, seed: Guide(s, False), Actor(before), ("PointMass-v0",), config, closing
        )
        shown = loop.experience(99, 8)
    rows = torch.arange(len(shown.rollout_R))
    was = shown.score(rows)[0].mean()
    with torch.no_grad():
        for parameter, learned in zip(before.backbone.parameters(), after.backbone.parameters(), strict=True):
            parameter.copy_(learned)
    assert shown.score(rows)[0].mean() > was + 0.3, "episodes it never saw are likelier"


def test_a_teacher_that_fails_teaches_nothing(tmp_path):
    world, result = run(tmp_path, "planner", lazy=True)
    assert result.last["success"] == 0
    assert all(torch.equal(w, weights(world)[n]) for n, w in weights(make_policy_world()).items())


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed: pip install 'emu-embodied[lora]'")
def test_adapters(tmp_path):
    config = replace(QUICK, groups=1, lora_rank=2, learning_rate=1e-2)
    world, _ = run(tmp_path / "whole", "policy", config)
    trained = [name for name, p in world.backbone.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    run(tmp_path / "parts", "policy", replace(config, rollouts=4))
    parts, _ = run(tmp_path / "parts", "policy", config, resume=True)
    assert all(torch.equal(w, weights(parts)[n]) for n, w in weights(world).items())
    saved, first = WorldModel.from_pretrained(tmp_path / "whole"), make_policy_world()
    ids = torch.arange(12)[None]

    def logits(model: WorldModel) -> torch.Tensor:
        with torch.no_grad():
            return model.backbone(input_ids=ids).logits

    torch.testing.assert_close(logits(saved), logits(world), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(saved), logits(first), atol=1e-4)
    with adapters.disabled(world.backbone):
        torch.testing.assert_close(logits(world), logits(first))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"env_ids": ()}, "--env"), ({"env_ids": ("A-v0",), "loop": "polisy"}, "'policy'")],
)
def test_bad_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        RLSettings(**settings)


@pytest.mark.parametrize("wrong", [{"horizon": 0}, {"success_at": 1.0}])
def test_bad_imagination(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ImaginedConfig(**wrong)


def test_imagination_without_signal(tmp_path, monkeypatch):
    """It waits while the model goes on learning; a frozen model would never tell rollouts apart."""
    monkeypatch.setattr("tests.train.test_rl_loops.IMAGINED", replace(IMAGINED, success_at=1e-9))
    world, result = run(tmp_path / "waits", "imagined", replace(QUICK, rollouts=4))
    assert all(torch.equal(w, weights(world)[n]) for n, w in weights(make_policy_world()).items())
    assert "world_loss" in result.last
    monkeypatch.setattr("tests.train.test_rl_loops.IMAGINED", replace(IMAGINED, success_at=1e-9, refresh_every=0))
    with pytest.raises(TrainingFailed, match=r"constant in every group; group 0 \(imagined from real state 0"):
        run(tmp_path / "frozen", "imagined", replace(QUICK, rollouts=4))
