"""What the robot is told can be chosen; what is meant, and all that follows from it, stays."""

from __future__ import annotations

import re

import numpy as np
import pytest

from emu_embodied.envs.language import SpokenEnv, make_spoken
from emu_embodied.envs.registry import make
from emu_embodied.envs.tasks import HELD_OUT_PAIRS, MAX_INSTRUCTION, NAMED, TASKS

SEEDS = range(12)
SEEN = {
    name: {re.sub(r"\{\w+\}", "_", text)
           for kind in ("templates", "place_templates", "lift_templates") for text in getattr(task, kind, ())}
    for name, task in TASKS.items()
}  # fmt: skip


def blank(instruction: str) -> str:
    """A sentence without what changes in it."""
    return re.sub(rf"\b({'|'.join((*NAMED, 'left', 'right'))})\b", "_", instruction)


@pytest.fixture(params=TASKS, scope="module")
def env_id(request) -> str:
    return f"{request.param}-v0"


def drawn(env_id: str, **kwargs):
    env = make_spoken(env_id, image_size=8, cameras=(), **kwargs)
    for seed in SEEDS:
        env.reset(seed=seed)
        yield env
    env.close()


def test_nothing_changes_unless_it_is_asked_for(env_id) -> None:
    plain = make(env_id, image_size=16)
    spoken = make_spoken(env_id, image_size=16)
    for seed in (0, 1):
        seen, heard = plain.reset(seed=seed)[0], spoken.reset(seed=seed)[0]
        assert seen["instruction"] == heard["instruction"]
        assert all(np.array_equal(seen[key], heard[key]) for key in ("front", "wrist", "proprio"))
    plain.close(), spoken.close()


@pytest.mark.parametrize("telling", ["rephrased", "shuffled", "swapped"])
def test_only_the_words_change(env_id, telling) -> None:
    true = [(env.scene, env.observe(render=False)) for env in drawn(env_id)]
    for (scene, before), env in zip(true, drawn(env_id, telling=telling), strict=True):
        after = env.observe(render=False)
        assert after.instruction != before.instruction and len(after.instruction.encode()) <= MAX_INSTRUCTION
        assert np.array_equal(after.proprio, before.proprio) and np.array_equal(after.objects, before.objects)
        assert (env.scene.items, env.scene.meant, env.scene.goal_xyz) == (scene.items, scene.meant, scene.goal_xyz)
        assert env.observation_space["instruction"].contains(after.instruction)


def test_new_words_mean_the_same(env_id) -> None:
    found = set()
    for env in drawn(env_id, telling="rephrased"):
        text = env.scene.instruction
        colour, side = env.task.pair(env.scene)
        assert [word for word in text.split() if word in NAMED] == [colour]
        sides = [word for word in re.findall("[a-z]+", text) if word in ("left", "right")]
        assert sides == ([] if env.scene.kind == "lift" or env_id == "PandaReach-v0" else [side])
        found.add(blank(text))
    assert len(found) > 1 and not found & SEEN[env_id.removesuffix("-v0")]


def test_the_wrong_thing_is_named(env_id) -> None:
    for env in drawn(env_id, telling="swapped"):
        meant = env.scene.items[env.scene.meant]
        rivals = {item.colour for item in env.scene.items if item.shape == meant.shape} - {meant.colour}
        named = {word for word in re.findall("[a-z]+", env.scene.instruction) if word in NAMED}
        assert named == rivals
        assert blank(env.scene.instruction) in SEEN[env_id.removesuffix("-v0")]
    for env in drawn(env_id, telling="shuffled"):
        assert env.scene.items[env.scene.meant].colour not in env.scene.instruction.split()


def test_pairs_are_left_out_or_asked_for(env_id) -> None:
    assert not HELD_OUT_PAIRS & {env.task.pair(env.scene) for env in drawn(env_id, pairs="seen")}
    assert {env.task.pair(env.scene) for env in drawn(env_id, pairs="held_out")} == HELD_OUT_PAIRS


def test_the_pair_is_what_the_instruction_says() -> None:
    for env in drawn("PandaPush-v0"):
        colour, side = env.task.pair(env.scene)
        assert colour in env.scene.instruction.split() and side in re.findall("[a-z]+", env.scene.instruction)


def test_snapshots_and_goals_keep_what_was_told() -> None:
    env = make_spoken("PandaReach-v0", image_size=16, telling="swapped")
    env.reset(seed=3)
    told, before = env.scene.instruction, env.snapshot()
    assert env.goal_observation().instruction == told == env.scene.instruction
    env.reset(seed=4)
    env.restore(before)
    assert env.observe(render=False).instruction == told
    env.close()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="telling is 'whispered', choose one of true"):
        SpokenEnv(telling="whispered")
    with pytest.raises(ValueError, match="did you mean 'PandaReach-v0'"):
        make_spoken("PandaReech-v0")
