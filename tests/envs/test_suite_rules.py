"""What single suites promise beyond the contract: their tasks, goals and physics."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from emu_embodied.envs import make, suite_ids
from emu_embodied.envs.suites.catalog import SUITES
from emu_embodied.envs.suites.world import SuiteEnv
from emu_embodied.envs.tasks import MAX_INSTRUCTION
from tests.envs.suite_cases import (
    check_restoring,
    rollout,
    true_state,
)


def test_metaworld_names_all_its_tasks() -> None:
    if reason := SUITES["metaworld"].missing():
        pytest.skip(reason)
    import metaworld

    from emu_embodied.envs.suites.metaworld import INSTRUCTIONS

    assert sorted(SUITES["metaworld"].tasks.values()) == sorted(metaworld.ALL_V3_ENVIRONMENTS)
    assert sorted(f"{task}-v3" for task in INSTRUCTIONS) == sorted(metaworld.ALL_V3_ENVIRONMENTS)
    assert all(len(text) <= MAX_INSTRUCTION for text in INSTRUCTIONS.values())


def test_metaworld_keeps_goals_for_evaluation(made: Callable[[str], SuiteEnv]) -> None:
    env = made("MetaWorld/reach-v3")

    def goals(seeds: range) -> set[bytes]:
        found = set()
        for seed in seeds:
            env.reset(seed=seed)
            found.add(env.world._env._target_pos.tobytes())
        return found

    assert not goals(range(20)) & goals(range(10**6, 10**6 + 20))


def test_drawing_leaves_metaworlds_physics_alone(made: Callable[[str], SuiteEnv]) -> None:
    """Decimated meshes live in the renderer's copy; the model that moves is the suite's, face by face."""
    env = made("MetaWorld/door-open-v3")
    import metaworld
    import mujoco

    env.reset(seed=0)
    ours = env.world._env
    drawn = env.world._view._renderer._model
    assert drawn.mesh_facenum.sum() < 0.15 * ours.model.mesh_facenum.sum()
    theirs = metaworld.ALL_V3_ENVIRONMENTS["door-open-v3"]()
    for name in ("mesh_vert", "mesh_face", "geom_size", "body_mass", "body_inertia", "dof_damping", "geom_friction"):
        assert np.array_equal(getattr(ours.model, name), getattr(theirs.model, name)), name
    from emu_embodied.envs.suites.metaworld import _goals

    theirs.set_task(_goals("door-open-v3", "test")[env.world._goal])
    mujoco.mj_resetData(theirs.model, theirs.data)
    theirs.reset()
    for action in np.random.default_rng(0).uniform(-1, 1, (15, 4)).astype(np.float32):
        env.step(action)  # draws
        _, reward, *_ = theirs.step(action.astype(float))
        assert ours.data.qpos.tobytes() == theirs.data.qpos.tobytes()
        assert ours.data.qvel.tobytes() == theirs.data.qvel.tobytes()
        assert env.reward() == pytest.approx(reward / 10)
    theirs.close()


@pytest.mark.slow
@pytest.mark.parametrize("env_id", suite_ids("metaworld"))
def test_every_metaworld_task_restores_exactly(env_id: str) -> None:
    if reason := SUITES["metaworld"].missing():
        pytest.skip(reason)
    env = make(env_id)
    check_restoring(env, 12)
    env.close()


# LIBERO


def test_libero_starts_from_the_published_states(made: Callable[[str], SuiteEnv]) -> None:
    """Fifty seeds are the fifty initial states; larger ones draw others, and nothing hangs on what came before."""
    env = made("LIBERO/10-2")
    world = env.world

    def start(seed: int) -> tuple[bytes, bytes]:
        env.reset(seed=seed)
        return world.objects().tobytes(), true_state(env)

    first = start(0)
    assert len({start(seed)[0] for seed in range(4)}) == 4
    assert start(50)[0] == first[0]
    drawn = start(10**6)
    assert drawn[0] != first[0] and drawn != start(10**6 + 1)
    assert start(0) == first and start(10**6) == drawn
    pots = slice(9, 9 + 2 * 7)  # behind arm and fingers: two things, each a place and a rotation

    def across() -> np.ndarray:
        published, present = world._starts[0][1:][pots], world._data.qpos[pots]
        return np.abs(published - present).reshape(2, 7)[:, :2]

    assert across().max() > 0.01
    env.reset(seed=0)
    assert across().max() < 0.001, "things fall a little way at first; that is all that is not as published"


def test_libero_steps_as_the_suite_does(made: Callable[[str], SuiteEnv]) -> None:
    """Bringing poses up to date and drawing light copies leaves physics alone; the suite's rule judges."""
    env = made("LIBERO/goal-7")
    import mujoco

    env.reset(seed=0)
    world = env.world
    theirs, start = world._env, env.snapshot()
    actions = np.random.default_rng(0).uniform(-1, 1, (10, 7))
    for action in actions:
        env.step(action)  # draws
    ours = world._data.qpos.copy(), world._data.qvel.copy()
    drawn = world._view._renderer._model
    assert drawn.mesh_facenum.sum() < 0.3 * world._model.mesh_facenum.sum()
    env.restore(start)
    for action in actions:
        theirs.step(action)
    assert np.array_equal(ours[0], world._data.qpos) and np.array_equal(ours[1], world._data.qvel)
    assert not env.success()
    knob = world._model.joint(theirs.get_object("flat_stove_1").joints[0]).qposadr[0]
    before = env.render()
    world._data.qpos[knob] = 1.0
    mujoco.mj_forward(world._model, world._data)
    theirs._post_process()
    env._terms = None
    assert env.success() and theirs._check_success()
    assert not np.array_equal(before, env.render()), "its burner glows"


def test_libero_remembers_where_its_controller_steers(made: Callable[[str], SuiteEnv]) -> None:
    """A turn that was asked for holds while later actions turn nothing: it is part of a snapshot."""
    env = made("LIBERO/goal-7")
    env.reset(seed=1)
    turn, still = np.array([0, 0, 0, 0.0, 0, 0.8, -1.0]), np.array([0, 0, 0, 0.0, 0, 0, -1.0])
    env.step_block(turn[None], render=False)
    snapshot = env.snapshot()
    expected = rollout(env, np.tile(still, (2, 5, 1)))
    env.step_block(-np.tile(turn, (5, 1)), render=False)
    env.restore(snapshot)
    assert rollout(env, np.tile(still, (2, 5, 1))) == expected


# Push-T


def test_forgetting_contacts_hardly_moves_the_t(made: Callable[[str], SuiteEnv]) -> None:
    env = made("PushT")
    from gym_pusht.envs.pusht import PushTEnv

    from emu_embodied.envs.suites.pusht import PushT

    for seed in (4, 8):
        env.reset(seed=seed)
        world = env.world
        twin = PushT("PushT")
        twin.load(world.save())
        theirs: PushTEnv = twin._env  # stepped by itself, it keeps its contacts
        pusher = world.player(np.random.default_rng(seed))
        begin = np.array(theirs.block.position)
        for _ in range(25):
            action = pusher.act()
            theirs.step(np.clip(np.array(theirs.agent.position) + 100 * action, 20, 492))
            world.advance(action)
        assert np.linalg.norm(world.block().position - begin) > 10
        assert np.abs(world.block().position - np.array(theirs.block.position)).max() < 0.1
        assert abs(world.block().angle - theirs.block.angle) < 0.01


def test_restoring_in_the_middle_of_a_push_is_exact(made: Callable[[str], SuiteEnv]) -> None:
    env = made("PushT")
    env.reset(seed=1)
    play = env.world.player(np.random.default_rng(0))
    while play.phase != "push" or env.world.block().distance(env.world.agent[None])[0] > 15.5:
        env.step_block(play.act()[None], render=False)
    towards = (env.world.block().middle - env.world.agent) / 100
    actions = np.repeat(np.clip(towards, -1, 1)[None, None], 2, axis=0).repeat(5, axis=1).astype(np.float32)
    snapshot, begin = env.snapshot(), env.world.block().middle
    expected = rollout(env, actions)
    assert np.linalg.norm(env.world.block().middle - begin) > 5
    for _ in range(2):
        env.restore(snapshot)
        assert rollout(env, actions) == expected


def test_pushes_come_from_all_sides(made: Callable[[str], SuiteEnv]) -> None:
    env = made("PushT")
    sides = set()
    for seed in range(6):
        env.reset(seed=seed)
        play = env.world.player(np.random.default_rng(seed))
        for _ in range(60):
            env.step(play.act())
            block = env.world.block()
            if play.phase == "push" and block.distance(env.world.agent[None])[0] < 16.5:
                away = env.world.agent - block.middle
                sides.add(int((np.arctan2(away[1], away[0]) - block.angle) % (2 * np.pi) // (np.pi / 2)))
    assert sides == {0, 1, 2, 3}
