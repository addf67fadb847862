"""Every suite that is installed keeps the contracts that our own worlds keep; a fake one keeps them everywhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from emu_embodied.envs.suites.gymnasium_image import GymnasiumImageEnv
from emu_embodied.envs.suites.world import LONGEST_INSTRUCTION, SuiteEnv
from emu_embodied.envs.tasks import MAX_INSTRUCTION
from emu_embodied.policies.behaviours import BEHAVIOURS, make_behaviour
from emu_embodied.policies.registry import PolicySpec
from tests.envs.fake_world import FakeWorld
from tests.envs.suite_cases import (
    CASES,
    blocks,
    check_restoring,
    has_expert,
    rollout,
    some_behaviour,
    true_state,
)


@pytest.fixture(params=CASES)
def env(request: pytest.FixtureRequest, made: Callable[[str], SuiteEnv]) -> SuiteEnv:
    return made(request.param)


def test_gymnasium_accepts_it(env: SuiteEnv) -> None:
    check_env(env, skip_close_check=True, skip_render_check=True)
    picture = env.render()
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8


def test_same_seed_same_bytes_whatever_came_before(env: SuiteEnv) -> None:
    actions = blocks(env, 0, 3)
    env.reset(seed=3)
    start, first = true_state(env), rollout(env, actions)
    env.reset(seed=4)
    assert true_state(env) != start
    rollout(env, blocks(env, 1, 2))
    env.reset(seed=3)
    assert true_state(env) == start
    assert rollout(env, actions) == first


@pytest.mark.parametrize("before", [0, 4])
def test_restoring_is_exact(env: SuiteEnv, before: int) -> None:
    check_restoring(env, before)


def test_restoring_an_earlier_episode_brings_its_scene_back(env: SuiteEnv) -> None:
    env.reset(seed=11)
    actions = blocks(env, 2, 2)
    env.step_block(actions[0], render=False)
    snapshot = env.snapshot()
    expected = rollout(env, actions)
    for seed in (12, 13):
        env.reset(seed=seed)
        env.step_block(blocks(env, seed, 1)[0], render=False)
        env.restore(snapshot)
        assert rollout(env, actions) == expected


def test_snapshots_of_another_environment_are_refused(made: Callable[[str], SuiteEnv]) -> None:
    other = SuiteEnv(FakeWorld(), env_id="Fake/Other")
    other.reset(seed=0)
    with pytest.raises(ValueError, match="Fake/Other"):
        made("fake").restore(other.snapshot())


def test_a_block_is_its_steps(env: SuiteEnv) -> None:
    actions_KA = blocks(env, 5, 1)[0]
    env.reset(seed=8)
    single = [env.step(action) for action in actions_KA]
    env.reset(seed=8)
    transition = env.step_block(actions_KA)
    last = single[-1][0]
    assert np.array_equal(transition.rewards_K, np.array([reward for _, reward, *_ in single], np.float32))
    assert np.array_equal(transition.observation.proprio, last["proprio"])
    assert all(np.array_equal(frame, last[name]) for name, frame in transition.observation.frames.items())
    assert transition.success_any == any(info["success"] for *_, info in single)
    assert transition.terms == single[-1][4]["terms"]


_SHAPES = ("mesh_vert", "mesh_face", "mesh_facenum", "tex_data", "tex_width", "geom_size", "body_mass", "geom_friction")
"""What drawing might have changed of a model."""


def test_drawing_leaves_physics_alone(env: SuiteEnv) -> None:
    """Decimated meshes and shrunken textures live in the renderer's copy of the model."""
    env.reset(seed=12)
    actions, start = blocks(env, 3, 3), env.snapshot()
    view = getattr(env.world, "_view", None)
    before = None if view is None else [getattr(view._model, name).copy() for name in _SHAPES]
    drawn = []
    for actions_KA in actions:
        for action in actions_KA:
            env.step_block(action[None])
        drawn.append(true_state(env))
    env.restore(start)
    assert drawn == [env.step_block(each, render=False) and true_state(env) for each in actions]
    if view is not None:
        light = view._renderer._model
        assert all(np.array_equal(old, getattr(view._model, name)) for name, old in zip(_SHAPES, before, strict=True))
        assert light.mesh_facenum.sum() < 0.6 * view._model.mesh_facenum.sum()
        assert np.array_equal(light.body_mass, view._model.body_mass)


def test_rewards_are_their_terms(env: SuiteEnv) -> None:
    weights = env.world.weights
    assert sum(weights.values()) == pytest.approx(1.0)
    env.reset(seed=6)
    assert 0 <= env.reward() <= 1
    for actions_KA in blocks(env, 7, 4):
        transition = env.step_block(actions_KA, render=False)
        assert transition.observation.frames == {}
        assert all(0 <= value <= 1 for value in transition.terms.values())
        total = sum(weight * transition.terms[name] for name, weight in weights.items())
        assert transition.rewards_K[-1] == pytest.approx(total, abs=1e-6)


def test_the_step_budget_is_part_of_the_snapshot(made: Callable[[str], SuiteEnv]) -> None:
    env = made("fake")
    env.reset(seed=0)
    still = np.zeros((5, 2), np.float32)
    for _ in range(5):
        assert not env.step_block(still, render=False).truncated
    snapshot = env.snapshot()
    assert env.step_block(still, render=False).truncated
    env.restore(snapshot)
    assert env.step_block(still, render=False).truncated


def test_the_goal_observation_shows_the_solved_task(env: SuiteEnv) -> None:
    if not has_expert(env):
        pytest.skip("nobody knows what its goal looks like")
    env.reset(seed=9)
    env.step_block(blocks(env, 0, 1)[0], render=False)
    before, state, snapshot = env.observe(), true_state(env), env.snapshot()
    goal = env.goal_observation()
    assert true_state(env) == state
    eye = env.cameras[0]
    assert np.array_equal(before.frames[eye], env.observe().frames[eye])
    assert not np.array_equal(goal.frames[eye], before.frames[eye])
    assert goal.instruction == before.instruction
    expected = rollout(env, blocks(env, 1, 1))
    env.restore(snapshot)
    # Of the same episode it is the same picture, wherever the episode has got to.
    assert np.array_equal(env.goal_observation().frames[eye], goal.frames[eye])
    assert rollout(env, blocks(env, 1, 1)) == expected


@pytest.mark.parametrize("places", [True, False])
def test_goal_pictures_are_of_states_that_solve_the_task(places: bool) -> None:
    env = SuiteEnv(FakeWorld(places=places), env_id="Fake/Go")
    env.reset(seed=1)
    goal_x, goal_y = env.world.save()[2:4]
    assert env.goal_observation().proprio == pytest.approx([goal_x, goal_y], abs=0.1)


def test_without_expert_and_placing_there_is_no_goal_picture() -> None:
    env = SuiteEnv(FakeWorld(places=False, expert=False), env_id="Fake/Go")
    env.reset(seed=1)
    state = env.world.save()
    with pytest.raises(ValueError, match="--objective reward"):
        env.goal_observation()
    assert env.world.save() == state


def test_instructions_fit_what_models_read(env: SuiteEnv) -> None:
    text = env.world.instruction
    most = LONGEST_INSTRUCTION if env.env_id.startswith("LIBERO") else MAX_INSTRUCTION
    assert text == text.lower() and 0 < len(text) <= most


MOVED = ("PushT", "Fetch/PickAndPlace", "MetaWorld/door-open-v3", "OGBench/cube-single", "PandaGym/Stack")
"""Cases in which the expert moves something that ``objects`` tells of."""


def test_objects_are_told_in_their_ranges(env: SuiteEnv, request: pytest.FixtureRequest) -> None:
    fields = env.object_fields
    names = [field.name for field in fields]
    assert len(set(names)) == len(names) and not set(names) & {field.name for field in env.proprio_fields}
    assert all(field.low < field.high for field in fields)
    low, high = (np.array([getattr(field, end) for field in fields]) for end in ("low", "high"))
    env.reset(seed=5)
    behaviour = some_behaviour(env, 0)
    seen = [env.observe(render=False)]
    while len(seen) < 41 and not env.success():
        seen.append(env.step_block(behaviour.act(seen[-1]), render=False).observation)
    told_TO = np.stack([each.objects for each in seen])
    assert told_TO.shape == (len(seen), len(fields)) and told_TO.dtype == np.float32
    assert (told_TO >= low - 1e-6).all() and (told_TO <= high + 1e-6).all()
    goals = [i for i, name in enumerate(names) if name.startswith("goal")]
    assert (told_TO[:, goals] == told_TO[0, goals]).all()
    things = [i for i in range(len(names)) if i not in goals]
    case = request.node.callspec.params["env"]
    if case in MOVED:
        assert np.abs(told_TO[-1, things] - told_TO[0, things]).max() > 0.02
    if case in ("Fetch/PickAndPlace", "OGBench/cube-single", "PandaGym/Push", "PandaGym/Stack"):
        # Solved, everything is where it should be.
        assert env.success()
        gaps = (told_TO[-1, things] - told_TO[-1, goals]).reshape(-1, 3)
        assert np.linalg.norm(gaps, axis=1).max() < 0.06


@pytest.mark.parametrize("source", BEHAVIOURS)
def test_behaviours_give_blocks_and_leave_the_simulator_alone(env: SuiteEnv, source: str) -> None:
    env.reset(seed=2)
    if source in ("expert", "noisy") and not has_expert(env):
        with pytest.raises(ValueError, match="without a scripted expert"):
            make_behaviour(source, env, np.random.default_rng(1))
        return
    behaviour = make_behaviour(source, env, np.random.default_rng(1))
    behaviour.reset(env.observe(render=False))
    for _ in range(3):
        state = true_state(env)
        actions_KA = behaviour.act(env.observe(render=False))
        assert true_state(env) == state
        assert actions_KA.shape == (env.block, *env.action_space.shape) and actions_KA.dtype == np.float32
        assert np.abs(actions_KA).max() <= 1
        assert behaviour.phase
        env.step_block(actions_KA, render=False)


def test_behaviours_draw_from_their_generator_alone(env: SuiteEnv) -> None:
    source = "noisy" if has_expert(env) else "random" if isinstance(env, GymnasiumImageEnv) else "play"

    def play(seed: int) -> list[bytes]:
        env.reset(seed=2)
        behaviour = make_behaviour(source, env, np.random.default_rng(seed))
        behaviour.reset(env.observe(render=False))
        taken = []
        for _ in range(3):
            taken.append(behaviour.act(env.observe(render=False)))
            env.step_block(taken[-1], render=False)
        return [actions.tobytes() for actions in taken]

    assert play(1) == play(1) != play(2)


def test_experts_solve_the_task(env: SuiteEnv) -> None:
    if not has_expert(env):
        pytest.skip("it has no expert")
    solved = 0
    for seed in range(3):
        env.reset(seed=seed)
        policy = PolicySpec(name="scripted").build(env, seed)
        policy.reset(env.observe(render=False))
        transition = None
        while transition is None or not (transition.success_any or transition.truncated):
            transition = env.step_block(policy.act(env.observe(render=False)), render=False)
        solved += transition.success_any
    assert solved >= 2


# Meta-World
