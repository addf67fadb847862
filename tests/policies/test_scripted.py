"""Experts solve their tasks in both engines; behaviours stay in the box, hold their blocks and are reproducible."""

import numpy as np
import pytest

from emu_embodied.envs import env_ids, make
from emu_embodied.envs.panda import PandaEnv
from emu_embodied.policies.behaviours import BEHAVIOURS, make_behaviour
from emu_embodied.policies.scripted import ScriptedPolicy
from emu_embodied.records import Transition

PHASES = {
    "PandaReach": {"approach", "done"},
    "PandaPush": {"approach", "descend", "push", "done"},
    "PandaPickPlace": {"approach", "descend", "grasp", "lift", "carry", "lower", "release", "retreat", "done"},
}


@pytest.fixture(scope="module")
def envs() -> dict[str, PandaEnv]:
    made = {env_id: make(env_id, cameras=()) for env_id in env_ids()}
    yield made
    for env in made.values():
        env.close()


def run(env: PandaEnv, source: str, seed: int) -> tuple[Transition, list[np.ndarray], list[str]]:
    """One episode; the last transition, the action blocks and their phases."""
    env.reset(seed=seed)
    behaviour = make_behaviour(source, env, np.random.default_rng(seed))
    observation = env.observe(render=False)
    behaviour.reset(observation)
    blocks, phases = [], []
    while True:
        blocks.append(behaviour.act(observation))
        phases.append(behaviour.phase)
        transition = env.step_block(blocks[-1], render=False)
        observation = transition.observation
        if transition.truncated:
            return transition, blocks, phases


@pytest.mark.parametrize("env_id", env_ids())
def test_the_expert_solves_the_task_and_leaves_it_solved(envs: dict[str, PandaEnv], env_id: str) -> None:
    seen: set[str] = set()
    for seed in range(100, 108):
        transition, _, phases = run(envs[env_id], "expert", seed)
        assert transition.success, f"seed {seed}: {phases}"
        assert transition.rewards_K[-1] > 0.7
        seen.update(phases)
    assert seen >= PHASES[envs[env_id].task.name]


@pytest.mark.parametrize("source", BEHAVIOURS)
@pytest.mark.parametrize("env_id", [i for i in env_ids() if "Bullet" not in i])
def test_behaviours_hold_blocks_in_the_box_and_repeat(envs: dict[str, PandaEnv], env_id: str, source: str) -> None:
    env = envs[env_id]
    _, blocks, phases = run(env, source, 5)
    for actions_KA in blocks:
        assert actions_KA.shape == (env.block, 4)
        assert actions_KA.dtype == np.float32
        assert np.abs(actions_KA).max() <= 1
        assert (actions_KA == actions_KA[0]).all()
    assert all(phases)
    _, again, phases_again = run(env, source, 5)
    assert np.array_equal(blocks, again)
    assert phases == phases_again


def test_noise_makes_failures_but_not_only_failures(envs: dict[str, PandaEnv]) -> None:
    outcomes = [run(envs["PandaPush-v0"], "noisy", seed)[0].success for seed in range(12)]
    assert 0 < sum(outcomes) < 12


def test_play_pushes_cubes_in_all_directions(envs: dict[str, PandaEnv]) -> None:
    env = envs["PandaPush-v0"]
    quadrants = set()
    for seed in range(12):
        env.reset(seed=seed)
        play = make_behaviour("play", env, np.random.default_rng(seed))
        play.reset(env.observe(render=False))
        for _ in range(12):
            before = env.world_state().item_xyz
            env.step_block(play.act(env.observe(render=False)), render=False)
            for dx, dy, _ in env.world_state().item_xyz - before:
                if np.hypot(dx, dy) > 0.02:
                    quadrants.add((dx > 0, dy > 0))
    assert len(quadrants) == 4


def test_the_expert_recovers_when_the_cube_is_moved(envs: dict[str, PandaEnv]) -> None:
    env = envs["PandaPush-v0"]
    env.reset(seed=101)
    expert = ScriptedPolicy(env)
    expert.reset(env.observe(render=False))
    stray = np.random.default_rng(0).uniform(-1, 1, (3, 4)).astype(np.float32)
    transition = None
    for i in range(12):
        actions = np.repeat(stray[i - 3][None], 5, axis=0) if 3 <= i < 6 else expert.act(env.observe(render=False))
        transition = env.step_block(actions, render=False)
    assert transition is not None
    assert transition.success


@pytest.mark.parametrize("env_id", [i for i in env_ids() if "Reach" not in i])
@pytest.mark.parametrize("contact", [3, 5])
def test_restoring_is_exact_in_contact(envs: dict[str, PandaEnv], env_id: str, contact: int) -> None:
    """Pushing, grasping and carrying: contacts are the part of a physics state that is most easily forgotten."""
    env = envs[env_id]
    env.reset(seed=103)
    expert = ScriptedPolicy(env)
    for _ in range(contact):
        env.step_block(expert.act(env.observe(render=False)), render=False)
    snapshot, actions_KA = env.snapshot(), expert.act(env.observe(render=False))

    def trace() -> list[bytes]:
        states = []
        for action in actions_KA:
            env.step_block(action[None], render=False)
            state = env.world_state()
            states.append(b"".join(a.tobytes() for a in (state.ee_xyz, state.item_xyz, state.item_velocity)))
        return states

    expected = trace()
    for stray in np.random.default_rng(contact).uniform(-1, 1, (3, 4)):
        env.step_block(np.tile(stray, (10, 1)), render=False)
        env.restore(snapshot)
        assert trace() == expected


def test_unknown_behaviours_are_refused_with_the_nearest(envs: dict[str, PandaEnv]) -> None:
    with pytest.raises(ValueError, match="did you mean 'noisy'"):
        make_behaviour("nosy", envs["PandaPush-v0"], np.random.default_rng(0))
