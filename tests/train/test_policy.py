"""Stage ``policy``: what is imitated and what not, the loss, resuming, and a policy that does what it was shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emu_embodied.acting import Actor
from emu_embodied.cli import main
from emu_embodied.data.batches import encode_dataset
from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.policies.evaluate import run_episodes
from emu_embodied.policies.registry import PolicySpec
from emu_embodied.policies.token import ActingSettings
from emu_embodied.train import policy as stage
from emu_embodied.train.loop import LossOutput
from emu_embodied.train.policy import Decisions, PolicyTraining, imitated, train_policy
from emu_embodied.train.windows import action_loss, window_tokens
from emu_embodied.world_config import WorldModelConfig
from emu_embodied.world_model import WorldModel
from tests import tiny
from tests.table import TO_THE_RIGHT, expert_store, make_table
from tests.train.test_stages import Kill, assert_equal_states, imagine, killing

CONFIG = PolicyTraining(
    loop=replace(tiny.TRAINING.loop, steps=6, save_every=2, log_every=1),
    batch=8,
    held_out=0.25,
    world_windows=2,
    world=replace(tiny.TRAINING, subgoal_share=0.0),
)
ALONE = replace(CONFIG, world_windows=0)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    """Two episodes each of expert, noisy, random and play; the second expert and the first noisy one get there."""
    return tiny.make_store(tmp_path_factory.mktemp("mixed") / "data")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    return expert_store(tmp_path_factory.mktemp("experts") / "data")


def decisions(store: EpisodeStore, world: WorldModel, folder: Path) -> Decisions:
    return Decisions.build(world, encode_dataset(store, world.frames, tiny.CAMERAS, folder / "t", objects=False))


def files(store: EpisodeStore) -> list[int]:
    return [int(entry.file.split(".")[0]) for entry in store.entries]


# -- what is imitated -------------------------------------------------------------------------------------------------


def test_only_behaviours_worth_imitating_and_only_as_many_as_asked_for(mixed):
    solved = {int(entry.file.split(".")[0]) for entry in mixed.entries if entry.success}
    assert files(imitated(mixed, CONFIG)) == [0, 1, 4, 5]
    assert files(imitated(mixed, replace(CONFIG, sources=("expert",)))) == [0, 4]
    assert files(imitated(mixed, replace(CONFIG, episodes=3))) == [0, 1, 4]
    everyone = replace(CONFIG, sources=("expert", "noisy", "random", "play"), solved_only=True)
    assert 2 <= len(solved) < 8 and set(files(imitated(mixed, everyone))) == solved
    assert imitated(mixed, CONFIG).data_hash != mixed.data_hash
    for wrong, message in (
        ({"sources": ("expret",)}, "0 episodes to imitate (of expret), at least 2 are needed; it holds expert, noisy"),
        ({"env_ids": ("Dash-v0",)}, "no episodes of Dash-v0"),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            imitated(mixed, replace(CONFIG, **wrong))


def test_solved_states_and_blocks_gone_astray_are_left_out(experts, tmp_path):
    world = tiny.make_world()
    tokens = encode_dataset(experts, world.frames, tiny.CAMERAS, tmp_path / "t", objects=False)
    found = torch.cat(Decisions.build(world, tokens).rows)
    wanted = [
        int(first) + t
        for first, length in zip(tokens.first_E, tokens.length_E, strict=True)
        for t in range(int(length) - 1)
        if not tokens.success_M[int(first) + t]
    ]
    assert sorted(found.tolist()) == wanted and len(wanted) < 8 * 5
    assert bool((tokens.actions_MKA[found] == torch.from_numpy(TO_THE_RIGHT)).all())  # who is there stays: not shown
    phases = tuple(("random", *phases[1:]) for phases in tokens.phases)
    fewer = Decisions.build(world, replace(tokens, phases=phases))
    assert len(fewer) == len(wanted) - 8 and not set(torch.cat(fewer.rows).tolist()) & set(tokens.first_E.tolist())
    with pytest.raises(ValueError, match="no decision to imitate"):
        Decisions.build(world, replace(tokens, success_M=torch.ones_like(tokens.success_M)))


def test_every_environment_is_drawn_as_often(experts, tmp_path):
    world = tiny.make_world()
    tokens = encode_dataset(experts, world.frames, tiny.CAMERAS, tmp_path / "t", objects=False)
    env = torch.tensor([0] + [1] * 7)  # one episode of the first, seven of the second
    told = ("a", *["b"] * 7)
    found = Decisions.build(world, replace(tokens, env_E=env, instructions=told))
    situations, _ = found.sample(world, 2000, CONFIG, torch.Generator().manual_seed(0))
    share = (situations.text_BL[:, 1] == ord("a")).float().mean()
    assert abs(float(share) - 0.5) < 0.05


@pytest.mark.parametrize("context", [1, 2, 3])
def test_a_situation_is_what_the_actor_would_have_seen(experts, tmp_path, context):
    world, config = tiny.make_world(), replace(CONFIG, context_states=context)
    store = EpisodeStore(experts.folder, experts.spec, list(experts.entries[:1]))
    found = decisions(store, world, tmp_path)
    drawn, bins = found.sample(world, 32, config, torch.Generator().manual_seed(0), noise=False)
    actor, episode = Actor(world, context_states=context), store[0]
    seen, at = actor.see([tiny.observation(episode, 0)]), {}
    for t, action_KA in enumerate(episode.actions_TKA):
        at[actor.log_probs(seen, bins[:1]).log_probs_BA.numpy().round(4).tobytes()] = t
        seen = actor.follow(seen, action_KA[None], [tiny.observation(episode, t + 1)])
    scores = [actor.log_probs(drawn.rows([i]), bins[:1]).log_probs_BA.numpy().round(4).tobytes() for i in range(32)]
    assert set(scores) <= at.keys() and len(set(scores)) == len(found)


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_a_window_of_one_state(experts, tmp_path):
    """Both ways that the project scores actions agree where they speak of the same."""
    world = tiny.make_world()
    config = replace(ALONE, smoothing=0.0, context_noise=0.0, batch=1)
    tokens = encode_dataset(experts, world.frames, tiny.CAMERAS, tmp_path / "t", objects=False)
    texts = torch.stack([world.layout.text_ids(world.text.encode(told)) for told in tokens.instructions])
    batch = tokens.sample(16, 2, texts, torch.Generator().manual_seed(0))
    window = window_tokens(world, batch, 0.0, torch.Generator())
    hidden = world.backbone.core(window.embeds_BLD, torch.arange(window.embeds_BLD.shape[1]))
    wanted = action_loss(world.backbone, world.layout, hidden, window, torch.ones(16, dtype=torch.bool))
    learner = stage._Learner(experts, experts, world, config, tmp_path)
    proprio = world.proprio.encode(batch.proprio_BTP[:, :1])
    situations = stage.Situations(
        batch.text_BL, batch.codes_BTN[:, :1], proprio, batch.actions_BTKA[:, :0], torch.ones(16, dtype=torch.long)
    )
    found, _ = learner._imitation(situations, window.action_bins_BTA[:, 0])
    assert torch.allclose(found, wanted, atol=1e-5)


# -- training ---------------------------------------------------------------------------------------------------------


def test_it_does_what_it_was_shown(experts, tmp_path):
    """Four episodes are learned by heart, and the policy succeeds from fresh starts of the simulator."""
    out = tmp_path / "out"
    loop = replace(CONFIG.loop, steps=120, save_every=200)
    config = replace(ALONE, loop=loop, batch=16, episodes=5, held_out=0.2)
    train_policy(experts, tiny.make_world(), config, out, resume=False)
    world = WorldModel.from_pretrained(out)
    shown = imitated(experts, config)
    found = decisions(shown, world, tmp_path)
    situations, bins = found.sample(world, 64, config, torch.Generator().manual_seed(0), noise=False)
    assert float((Actor(world).act(situations).bins_BA == bins).float().mean()) > 0.95
    spec = PolicySpec(name="token", checkpoint=str(out))
    results = run_episodes("Dot-v0", spec.build, seeds=range(100, 105), make_simulator=make_table)
    assert all(result.success for result in results)
    meta = json.loads((out / "meta.json").read_text())["policy"]
    assert meta["data_hash"] == shown.data_hash
    assert meta["extra"]["figures"]["eval/action_within_a_bin"] > 0.9


def test_the_world_role_is_trained_beside_it(mixed, tmp_path):
    before = tiny.make_world(paths=("uniform", "mask"))
    for config, name in ((CONFIG, "both"), (ALONE, "alone")):
        world = tiny.make_world(paths=("uniform", "mask"))
        train_policy(mixed, world, config, tmp_path / name, resume=False)
        after = WorldModel.from_pretrained(tmp_path / name)
        assert after.config == before.config and imagine(after).shape == (2, 4, 8)
        same = torch.equal(after.backbone.action_embedding.down.weight, before.backbone.action_embedding.down.weight)
        assert same == (name == "alone")  # one state alone has no action that led to it
        figures = json.loads((tmp_path / name / "meta.json").read_text())["policy"]["extra"]["figures"]
        assert ("eval/world/token_accuracy/mask" in figures) == ("eval/world/reward_corr" in figures) == (not same)


def test_a_model_that_sees_objects_learns_with_them(experts, tmp_path):
    out = tmp_path / "out"
    train_policy(experts, tiny.make_world(objects=tiny.OBJECTS), CONFIG, out, resume=False)
    figures = json.loads((out / "meta.json").read_text())["policy"]["extra"]["figures"]
    assert figures["world/proprio"] > 0 and WorldModel.from_pretrained(out).config.objects == tiny.OBJECTS
    spec = PolicySpec(name="token", checkpoint=str(out))
    assert len(run_episodes("Dot-v0", spec.build, seeds=[0], make_simulator=make_table)) == 1


def test_next_token_models_keep_their_own_loss(mixed, tmp_path, monkeypatch):
    asked = []

    def next_token(world, batch, config, generator):
        asked.append(batch.codes_BTN.shape[:2])
        return LossOutput(world.backbone.lm_head.weight.sum() * 0)

    monkeypatch.setattr(stage, "next_token_loss", next_token)
    train_policy(mixed, tiny.make_world(paths=(), decoding="autoregressive"), CONFIG, tmp_path / "out", resume=False)
    assert set(asked) == {(2, 4)} and len(asked) == 6


def test_the_same_seed_gives_the_same_bytes(mixed, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = replace(CONFIG, loop=replace(CONFIG.loop, seed=seed))
        train_policy(mixed, tiny.make_world(), config, tmp_path / name, resume=False)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_a_killed_run_resumes_bit_by_bit(mixed, tmp_path, monkeypatch):
    train_policy(mixed, tiny.make_world(), CONFIG, tmp_path / "whole", resume=False)
    with monkeypatch.context() as patch:
        patch.setattr(stage._Learner, "loss", killing(stage._Learner, "loss", 5))
        with pytest.raises(Kill):
            train_policy(mixed, tiny.make_world(), CONFIG, tmp_path / "killed", resume=False)
    train_policy(mixed, tiny.make_world(), CONFIG, tmp_path / "killed", resume=True)
    assert_equal_states(tmp_path / "whole", tmp_path / "killed", "policy")
    with pytest.raises(ValueError, match="was trained with batch = 8, now it is 4"):
        train_policy(mixed, tiny.make_world(), replace(CONFIG, batch=4), tmp_path / "killed", resume=True)
    with pytest.raises(ValueError, match="holds a world model: train into another --out"):
        train_policy(mixed, tiny.make_world(), CONFIG, tmp_path / "killed", resume=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch is 0, it has to be at least 1"),
        ({"episodes": 1}, "episodes is 1, it has to be at least 2"),
        ({"smoothing": -1.0}, "smoothing is -1.0, it has to be at least 0"),
        ({"world_weight": float("nan")}, "world_weight is nan"),
        ({"context_noise": 2.0}, "context_noise is 2.0"),
        ({"context_states": 4}, "context_states is 4: these weights act on 1 to 3 states"),
    ],
)
def test_settings_out_of_range_are_named(mixed, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_policy(mixed, tiny.make_world(), replace(CONFIG, **changes), tmp_path / "out", resume=False)


def test_data_of_another_robot_is_refused(tmp_path):
    store = tiny.make_store(tmp_path / "data", block=3)
    with pytest.raises(ValueError, match="env steps in a block: dataset 3; model 2"):
        train_policy(store, tiny.make_world(), CONFIG, tmp_path / "out", resume=False)


# -- the command line -------------------------------------------------------------------------------------------------


def test_from_a_dataset_to_a_row_of_a_table(experts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("emu_embodied.envs.registry.make", make_table)
    monkeypatch.setattr("emu_embodied.envs.registry.check_env_id", lambda env_id: None)
    init, out, rows = tmp_path / "init", tmp_path / "out", tmp_path / "rows.json"
    tiny.make_world().save_pretrained(init)
    flags = ["--data", experts.folder, "--init", init, "--out", out, "--batch", 8, "--threads", 1, "--seed", 3]
    flags += ["--env", "Dot-v0", "--sources", "expert", "--episodes", 6, "--solved-only", "--context-states", 2]
    flags += ["--world-windows", 1, "--world-weight", 0.1, "--learning-rate", 0.01]
    assert main([str(flag) for flag in ("train", "policy", *flags, "--steps", 3)]) == 0
    assert "bench --policy token" in capsys.readouterr().out
    assert main([str(flag) for flag in ("train", "policy", *flags, "--steps", 4, "--resume")]) == 0
    recorded = json.loads((out / "meta.json").read_text())["policy"]["extra"]
    assert recorded["steps"] == 4
    wanted = {"episodes": 6, "sources": ["expert"], "env_ids": ["Dot-v0"], "solved_only": True, "context_states": 2}
    assert wanted.items() <= recorded["config"].items()
    before, after = (WorldModelConfig.load(folder / "world.json") for folder in (init, out))
    assert after == replace(before, policy_states=2)
    assert Actor(WorldModel.from_pretrained(out)).context_states == 2
    call = ["bench", "--env", "Dot-v0", "--policy", "token", "--checkpoint", out, "--episodes", 2, "--workers", 1]
    assert main([str(flag) for flag in (*call, "--json", rows)]) == 0
    [row] = json.loads(rows.read_text())["rows"]
    assert (row["policy"], row["episodes"]) == ("token", 2)
    assert row["settings"]["acting"] == {"temperature": 0.0, "context_states": None}


def test_what_is_wrong_is_said_in_one_line(experts, tmp_path, capsys):
    init = tmp_path / "init"
    tiny.make_world().save_pretrained(init)
    for out, more, message in (
        (init, [], "--init and --out are the same folder"),
        (tmp_path / "out", ["--env", "Dash-v0"], "no episodes of Dash-v0"),
        (tmp_path / "out", ["--episodes", "1"], "at least 2"),
    ):
        flags = ["--data", str(experts.folder), "--init", str(init), "--out", str(out), *more]
        assert main(["train", "policy", *flags]) == 2
        assert message in capsys.readouterr().err


def test_settings_of_acting_reach_the_policy(tmp_path):
    tiny.make_world().save_pretrained(tmp_path)
    spec = PolicySpec(name="token", checkpoint=str(tmp_path), acting=ActingSettings(temperature=0.7, context_states=2))
    policy = spec.build(make_table("Dot-v0"), 5)
    assert (policy.temperature, policy.actor.context_states, policy.seed) == (0.7, 2, 5)
