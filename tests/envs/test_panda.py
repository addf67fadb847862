"""Every registered world: Gymnasium's contract, determinism, exact snapshots, rewards, goal images."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from emu_embodied.envs import env_ids, make
from emu_embodied.envs.engine import CAMERAS
from emu_embodied.envs.panda import PROPRIO_FIELDS, PandaEnv
from emu_embodied.envs.tasks import TASKS
from emu_embodied.records import Transition

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def envs() -> dict[str, PandaEnv]:
    made = {env_id: make(env_id) for env_id in env_ids()}
    for env in made.values():
        env.reset(seed=0)
    yield made
    for env in made.values():
        env.close()


@pytest.fixture(params=env_ids())
def env(request: pytest.FixtureRequest, envs: dict[str, PandaEnv]) -> PandaEnv:
    return envs[request.param]


def blocks(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 5, 4)).astype(np.float32)


def digest(env: PandaEnv, transition: Transition) -> str:
    """Hash of all that an outcome consists of: picture, proprio, rewards and the true state."""
    state = env.world_state()
    arrays = [
        *transition.observation.frames.values(),
        transition.observation.proprio,
        transition.rewards_K,
        state.ee_xyz,
        state.ee_velocity,
        state.item_xyz,
        state.item_velocity,
    ]
    return hashlib.sha1(b"".join(a.tobytes() for a in arrays)).hexdigest()


def rollout_digest(env: PandaEnv, seed: int, actions_TKA: np.ndarray) -> str:
    env.reset(seed=seed)
    return "".join(digest(env, env.step_block(actions_KA)) for actions_KA in actions_TKA)


@pytest.mark.parametrize("env_id", env_ids())
def test_gymnasium_accepts_it(env_id: str) -> None:
    env = gymnasium.make(f"emu_embodied.envs:{env_id}", render_mode="rgb_array")
    check_env(env.unwrapped, skip_close_check=True)
    picture = env.unwrapped.render()
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    env.close()


def test_same_seed_same_bytes_whatever_came_before(env: PandaEnv) -> None:
    actions = blocks(0, 2)
    first = rollout_digest(env, 3, actions)
    rollout_digest(env, 4, blocks(1, 2))
    assert rollout_digest(env, 3, actions) == first
    assert rollout_digest(env, 5, actions) != first


def test_same_seed_same_bytes_in_another_process(envs: dict[str, PandaEnv]) -> None:
    code = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[2]]\n"
        "from test_panda import make, env_ids, rollout_digest, blocks\n"
        "print(*(rollout_digest(make(env_id), 3, blocks(0, 2)) for env_id in env_ids()), sep='\\n')\n"
    )
    paths = [str(ROOT), str(Path(__file__).parent)]
    other = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert other.stdout.split() == [rollout_digest(env, 3, blocks(0, 2)) for env in envs.values()]


@pytest.mark.parametrize("before", [0, 1])
def test_restoring_is_exact(env: PandaEnv, before: int) -> None:
    env.reset(seed=11)
    actions = blocks(2, 4)
    for actions_KA in actions[:before]:
        env.step_block(actions_KA, render=False)
    snapshot = env.snapshot()
    seen = env.observe()
    expected = [digest(env, env.step_block(a)) for a in actions[1:3]]
    draw = env.np_random.random()
    env.step_block(actions[3], render=False)
    for _ in range(2):
        env.restore(snapshot)
        assert env.elapsed == 5 * before
        again = env.observe()
        assert all(np.array_equal(seen.frames[name], again.frames[name]) for name in seen.frames)
        assert np.array_equal(seen.proprio, again.proprio)
        assert [digest(env, env.step_block(a)) for a in actions[1:3]] == expected
        assert env.np_random.random() == draw


def test_restoring_an_earlier_episode_brings_its_scene_back(env: PandaEnv) -> None:
    env.reset(seed=11)
    snapshot, instruction = env.snapshot(), env.scene.instruction
    expected = digest(env, env.step_block(blocks(2, 1)[0]))
    env.reset(seed=12)
    env.restore(snapshot)
    assert env.scene.instruction == instruction
    assert digest(env, env.step_block(blocks(2, 1)[0])) == expected


def test_snapshots_of_another_environment_are_refused(envs: dict[str, PandaEnv]) -> None:
    envs["PandaPush-v0"].reset(seed=0)
    with pytest.raises(ValueError, match="PandaPush-v0"):
        envs["PandaReach-v0"].restore(envs["PandaPush-v0"].snapshot())
    envs["PandaPushBullet-v0"].reset(seed=0)
    twin = make("PandaPushBullet-v0")
    with pytest.raises(ValueError, match="that took it"):
        twin.restore(envs["PandaPushBullet-v0"].snapshot())
    twin.close()


def test_mujoco_snapshots_move_between_environments_of_one_id(envs: dict[str, PandaEnv]) -> None:
    one, other = envs["PandaPush-v0"], make("PandaPush-v0")
    one.reset(seed=21)
    one.step_block(blocks(0, 1)[0], render=False)
    other.restore(one.snapshot())
    action = blocks(1, 1)[0]
    assert digest(one, one.step_block(action)) == digest(other, other.step_block(action))
    other.close()


def test_a_block_is_its_steps(env: PandaEnv) -> None:
    actions_KA = blocks(5, 1)[0]
    env.reset(seed=8)
    single = [env.step(action) for action in actions_KA]
    env.reset(seed=8)
    transition = env.step_block(actions_KA)
    last = single[-1][0]
    assert np.array_equal(transition.rewards_K, np.array([reward for _, reward, *_ in single], np.float32))
    assert np.array_equal(transition.observation.proprio, last["proprio"])
    assert all(np.array_equal(frame, last[name]) for name, frame in transition.observation.frames.items())
    assert transition.success == single[-1][4]["success"]
    assert transition.success_any == any(info["success"] for *_, info in single)
    assert transition.terms == single[-1][4]["terms"]


def test_without_rendering_nothing_is_drawn(env: PandaEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    env.reset(seed=1)

    def refuse(camera: str) -> np.ndarray:
        raise AssertionError(f"drew {camera}")

    monkeypatch.setattr(env._engine, "render", refuse)
    assert env.step_block(blocks(0, 1)[0], render=False).observation.frames == {}


def test_rewards_are_their_terms(env: PandaEnv) -> None:
    assert sum(env.task.weights.values()) == pytest.approx(1.0)
    env.reset(seed=6)
    for actions_KA in blocks(7, 4):
        transition = env.step_block(actions_KA, render=False)
        assert transition.terms.keys() == env.task.weights.keys()
        assert all(0 <= value <= 1 for value in transition.terms.values())
        total = sum(env.task.weights[name] * value for name, value in transition.terms.items())
        assert transition.rewards_K[-1] == pytest.approx(total, abs=1e-6)


def test_the_step_budget_is_part_of_the_snapshot(envs: dict[str, PandaEnv]) -> None:
    env = envs["PandaReach-v0"]
    env.reset(seed=0)
    still = np.zeros((5, 4), np.float32)
    for _ in range(5):
        assert not env.step_block(still, render=False).truncated
    snapshot = env.snapshot()
    assert env.step_block(still, render=False).truncated
    env.restore(snapshot)
    assert env.step_block(still, render=False).truncated


def test_the_goal_observation_shows_the_solved_task(env: PandaEnv) -> None:
    env.reset(seed=9)
    env.step_block(blocks(0, 1)[0], render=False)
    before, snapshot = env.observe(), env.snapshot()
    goal = env.goal_observation()
    after = env.observe()
    assert all(np.array_equal(before.frames[name], after.frames[name]) for name in before.frames)
    assert not np.array_equal(goal.frames["front"], before.frames["front"])
    # What the goal picture shows, judged by the task itself.
    env._begin(env.task.solved(env.scene))
    assert env.success()
    env.restore(snapshot)
    expected = digest(env, env.step_block(blocks(1, 1)[0]))
    env.restore(snapshot)
    assert env.goal_observation().instruction == goal.instruction
    assert digest(env, env.step_block(blocks(1, 1)[0])) == expected


@pytest.mark.parametrize("axis", range(3))
def test_an_action_moves_the_tool_as_far_as_it_says(env: PandaEnv, axis: int) -> None:
    env.reset(seed=2)
    start = env.world_state().ee_xyz
    actions_KA = np.zeros((5, 4), np.float32)
    actions_KA[:, axis] = -0.4 if start[axis] > (0.49, 0.0, 0.14)[axis] else 0.4
    env.step_block(actions_KA, render=False)
    env.step_block(np.zeros((5, 4), np.float32), render=False)
    moved = env.world_state().ee_xyz - start
    expected = np.zeros(3)
    expected[axis] = 0.05 * np.sign(actions_KA[0, axis])
    assert moved == pytest.approx(expected, abs=0.004)


def test_proprio_is_named_and_in_its_units(env: PandaEnv) -> None:
    env.reset(seed=2)
    env.step_block(blocks(3, 1)[0], render=False)
    state, proprio = env.world_state(), env.observe(render=False).proprio
    named = dict(zip((f.name for f in PROPRIO_FIELDS), proprio.tolist(), strict=True))
    assert [named["ee_x"], named["ee_y"], named["ee_z"]] == pytest.approx(state.ee_xyz.tolist(), abs=1e-6)
    assert [named["ee_vx"], named["ee_vy"], named["ee_vz"]] == pytest.approx(state.ee_velocity.tolist(), abs=1e-6)
    assert named["gripper"] == pytest.approx(state.opening, abs=1e-6)


def test_velocity_agrees_with_the_way_travelled(env: PandaEnv) -> None:
    env.reset(seed=2)
    action = np.array([0.3, 0.25, 0.1, 0.0], np.float32)
    for _ in range(6):
        env.step_block(action[None], render=False)
    before = env.world_state().ee_xyz
    env.step_block(action[None], render=False)
    state = env.world_state()
    travelled = (state.ee_xyz - before) / 0.05
    speed, mean_speed = np.linalg.norm(state.ee_velocity), np.linalg.norm(travelled)
    assert state.ee_velocity @ travelled > 0.98 * speed * mean_speed
    # The servos catch up within an env step, so at its end the tool is slower than on the way.
    assert 0.4 < speed / mean_speed < 1.1


def test_the_gripper_opens_and_shuts_unless_the_task_holds_it(env: PandaEnv) -> None:
    env.reset(seed=2)
    openings = []
    for gripper in (1.0, -1.0, 0.0):
        env.step_block(np.tile(np.array([0, 0, 0, gripper], np.float32), (10, 1)), render=False)
        openings.append(env.world_state().opening)
    held = env.task.locked_opening
    expected = [0.08, 0.0, 0.04] if held is None else [held] * 3
    assert openings == pytest.approx(expected, abs=0.003)


def test_cameras_and_sizes_can_be_chosen() -> None:
    env = make("PandaReach-v0", cameras=("wrist",), image_size=96)
    observation, _ = env.reset(seed=0)
    assert observation["wrist"].shape == (96, 96, 3)
    assert "front" not in observation
    env.close()


@pytest.mark.parametrize("env_id", ["PandaPickPlace-v0", "PandaPickPlaceBullet-v0"])
def test_pretty_changes_the_picture_and_nothing_else(env_id: str) -> None:
    plain, pretty = (make(env_id, pretty=flag, cameras=("front",)) for flag in (False, True))
    pictures = [env.reset(seed=0)[0]["front"].astype(int) for env in (plain, pretty)]
    assert np.abs(pictures[0] - pictures[1]).mean() > 1
    for actions_KA in blocks(4, 4):
        for env in (plain, pretty):
            env.step_block(actions_KA, render=False)
        ours, theirs = plain.world_state(), pretty.world_state()
        assert ours.ee_xyz.tobytes() == theirs.ee_xyz.tobytes()
        assert ours.item_xyz.tobytes() == theirs.item_xyz.tobytes()
    plain.close()
    pretty.close()


def test_every_camera_sees_something_else(env: PandaEnv) -> None:
    env.reset(seed=0)
    pictures = [env.render(camera) for camera in CAMERAS]
    assert all(picture.std() > 10 for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == len(CAMERAS)


def test_the_engines_agree_on_scene_and_motion(envs: dict[str, PandaEnv]) -> None:
    for task in TASKS:
        ours, theirs = envs[f"{task}-v0"], envs[f"{task}Bullet-v0"]
        pictures = [env.reset(seed=5)[0]["front"].astype(int) for env in (ours, theirs)]
        assert ours.scene == theirs.scene
        assert np.abs(pictures[0] - pictures[1]).mean() < 25
        for action in ([0.2, -0.2, 0.1, 0.0], [-0.1, 0.3, 0.2, 0.0]):
            for env in (ours, theirs):
                env.step_block(np.tile(np.array(action, np.float32), (5, 1)), render=False)
            assert ours.world_state().ee_xyz == pytest.approx(theirs.world_state().ee_xyz, abs=0.008)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'PandaPush-v0'"):
        make("pandapush-v0")
    with pytest.raises(ValueError, match="did you mean 'front'"):
        make("PandaPush-v0", cameras=("frnt",))
    with pytest.raises(ValueError, match="did you mean 'mujoco'"):
        make("PandaPush-v0", engine="mujuco")


def test_gl_is_settled_even_if_mujoco_came_first() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import mujoco; from emu_embodied.envs import make\n"
        "print(make('PandaReach-v0').reset(seed=0)[0]['front'].shape)"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True, env=clean
    )
    assert done.stdout.strip() == "(64, 64, 3)"


def test_without_gl_physics_runs_and_pictures_say_what_is_missing() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from emu_embodied.envs import make\n"
        "env = make('PandaReach-v0', cameras=()); env.reset(seed=0); print(env.observe(render=False).proprio.shape)\n"
        "env.render()"
    )
    blind = {**os.environ, "MUJOCO_GL": "disable"}
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, env=blind)
    assert done.stdout.strip() == "(7,)"
    assert "apt-get install -y libegl1 libgl1" in done.stderr


def test_registering_imports_no_engine() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import emu_embodied.envs\n"
        "print({'mujoco', 'pybullet', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
