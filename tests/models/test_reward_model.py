"""The reward model: what it reads and says, as files, inside a world model, and that it learns a reward."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from emu_embodied.models.reward_model import RewardModel, RewardModelConfig
from emu_embodied.train.adapt import train_dida
from emu_embodied.train.loop import LoopConfig
from emu_embodied.train.reward_model import RewardTraining, train_reward_model
from emu_embodied.world_model import WorldModel
from tests import tiny

LOOP = LoopConfig(
    steps=150,
    learning_rate=1e-2,
    warmup_steps=2,
    ema_decay=0.9,
    eval_every=150,
    save_every=150,
    threads=1,
    device="cpu",
)
TRAINING = RewardTraining(loop=LOOP, batch=32, held_out=0.25)
NUMBERS = torch.rand(3, 4, len(tiny.FIELDS) + len(tiny.OBJECTS), generator=torch.Generator().manual_seed(0))


def make_judge(env_ids=("Dot-v0",), objects=tiny.OBJECTS) -> RewardModel:
    """Untrained; every part of its input moves what it says."""
    config = RewardModelConfig(env_ids=env_ids, proprio=tiny.FIELDS, objects=objects, text_length=12, width=16, words=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = RewardModel(config)
        for parameter in judge.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return judge


def make_world(judge: RewardModel | None) -> WorldModel:
    world = tiny.make_world(objects=tiny.OBJECTS)
    return WorldModel(world.config, world.backbone, world.frames, eye=world.eye, reward_model=judge)


def test_every_number_and_the_instruction_count():
    judge = make_judge()
    reward, success = judge.judge(NUMBERS, "go right")
    assert reward.shape == success.shape == (3, 4)
    assert bool(((reward > 0) & (reward < 1)).all()) and bool(((success > 0) & (success < 1)).all())
    for i in range(NUMBERS.shape[-1]):
        moved = NUMBERS.clone()
        moved[..., i] += 0.5
        other, _ = judge.judge(moved, "go right")
        assert bool((other != reward).all())
    other, _ = judge.judge(NUMBERS, "go left!")
    assert bool((other != reward).all())


def test_states_are_judged_one_by_one():
    judge = make_judge()
    reward, _ = judge.judge(NUMBERS, "go right")
    torch.testing.assert_close(judge.judge(NUMBERS[1, 2], "go right")[0], reward[1, 2])


def test_as_files_it_stays_the_same(tmp_path):
    judge = make_judge()
    judge.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path)
    assert again.config == judge.config
    torch.testing.assert_close(again.judge(NUMBERS, "go"), judge.judge(NUMBERS, "go"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "emu_embodied_eye"}, "describes no reward: train one"),
        ({"width": 0}, "describes no reward that can be built: .*width is 0"),
        ({"width": 24}, "has shape"),
        ({"objects": []}, "at least one thing"),
    ],
)
def test_foreign_files_are_named(tmp_path, change, message):
    make_judge().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=message):
        RewardModel.from_pretrained(tmp_path)


def test_imagined_states_are_worth_what_it_says_of_their_numbers():
    judge = make_judge()
    seen = tiny.observation(tiny.make_episode(3), 0)
    plain, judged = make_world(None), make_world(judge)
    futures = judged.imagine(judged.observe([seen]), tiny.plans(3, 2), torch.Generator().manual_seed(0))
    numbers = torch.cat([futures.proprio_SHP, futures.objects_SHO], -1)
    reward_SH, success_SH = judge.judge(numbers, seen.instruction)
    torch.testing.assert_close(futures.reward_SH, reward_SH)
    torch.testing.assert_close(futures.success_SH, success_SH)
    read = plain.imagine(plain.observe([seen]), tiny.plans(3, 2), torch.Generator().manual_seed(0))
    assert not torch.allclose(read.reward_SH, reward_SH)
    torch.testing.assert_close(read.objects_SHO, futures.objects_SHO)


def test_a_checkpoint_keeps_it(tmp_path):
    world = make_world(make_judge())
    world.with_decoding("autoregressive").save_pretrained(tmp_path)
    again = WorldModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again.reward_model.judge(NUMBERS, "go"), world.reward_model.judge(NUMBERS, "go"))


def test_one_of_other_numbers_or_fewer_tasks_is_refused():
    with pytest.raises(ValueError, match=r"reads x, y, grip, dot_x; world.json names x, y, grip, dot_x, dot_y"):
        make_world(make_judge(objects=tiny.OBJECTS[:1]))
    with pytest.raises(ValueError, match="never learned Dot-v0"):
        make_world(make_judge(env_ids=("Other-v0",)))


@pytest.mark.parametrize(("known", "kept"), [(("Dot-v0", "Spot-v0"), True), (("Spot-v0",), False)])
def test_adapting_keeps_it_unless_there_are_further_tasks(tmp_path, known, kept):
    world = make_world(None)
    world.config = replace(world.config, env_ids=("Spot-v0",))
    world = WorldModel(world.config, world.backbone, world.frames, eye=world.eye, reward_model=make_judge(known))
    training = replace(tiny.TRAINING, loop=replace(tiny.TRAINING.loop, steps=1))
    train_dida(tiny.make_store(tmp_path / "dots"), world, training, tmp_path / "out", resume=False)
    assert (WorldModel.from_pretrained(tmp_path / "out").reward_model is not None) == kept


def test_it_learns_the_reward(tmp_path):
    store = tiny.make_store(tmp_path / "dots", episodes=40)
    judge, result = train_reward_model(store, TRAINING, tmp_path / "out", resume=False)
    assert result.step == 150
    for seed in range(1000, 1010):
        episode = tiny.make_episode(seed)
        numbers = torch.cat([torch.tensor(episode.proprio_TP), torch.tensor(episode.objects_TO)], 1)
        reward, success = judge.judge(numbers, episode.instruction)
        assert float((reward - torch.tensor(episode.reward_T)).abs().mean()) < 0.05
        clear = torch.tensor(abs(episode.reward_T - 0.8) > 0.1)
        assert torch.equal((success > 0.5)[clear], torch.tensor(episode.success_T)[clear])
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert set(meta["reward"]["extra"]["figures"]) >= {"eval/reward_mae", "eval/success_accuracy"}


def test_it_is_not_overwritten_and_goes_on(tmp_path):
    store = tiny.make_store(tmp_path / "dots")
    for resume, steps in ((False, 3), (True, 5)):
        config = replace(TRAINING, loop=replace(LOOP, steps=steps, save_every=1))
        _, result = train_reward_model(store, config, tmp_path / "out", resume=resume)
        assert result.step == steps
    with pytest.raises(ValueError, match="--resume"):
        train_reward_model(store, TRAINING, tmp_path / "out", resume=False)


def test_a_dataset_that_tells_nothing_is_refused(tmp_path):
    store = tiny.make_store(tmp_path / "dots")
    store.spec = replace(store.spec, objects=())
    with pytest.raises(ValueError, match="does not tell where things are"):
        train_reward_model(store, TRAINING, tmp_path / "out", resume=False)
    assert not (tmp_path / "out").exists()
