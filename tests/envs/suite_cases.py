"""Suites' environments that tests make once, and what tests ask of any of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from emu_embodied.data.recording import Behaviour
from emu_embodied.envs import make
from emu_embodied.envs.suites.catalog import SUITES
from emu_embodied.envs.suites.world import SuiteEnv
from emu_embodied.policies.behaviours import make_behaviour
from emu_embodied.records import Transition
from tests.envs.fake_world import FakeWorld, adapted

TRIED = {
    "metaworld": ("MetaWorld/reach-v3", "MetaWorld/door-open-v3"),
    "pusht": ("PushT",),
    "fetch": ("Fetch/Reach", "Fetch/PickAndPlace"),
    "ogbench": ("OGBench/cube-single", "OGBench/scene"),
    "panda-gym": ("PandaGym/Push", "PandaGym/Stack"),
    "libero-goal": ("LIBERO/goal-7",),
    "libero-10": ("LIBERO/10-2",),
}
"""Suite -> the ids that every contract is tried on: the others differ in data only."""
CASES = ("fake", "adapter", *(env_id for ids in TRIED.values() for env_id in ids))


def make_case(case: str) -> SuiteEnv:
    if case == "fake":
        return SuiteEnv(FakeWorld(), env_id="Fake/Go")
    if case == "adapter":
        return adapted()
    suite = next(suite for suite, ids in TRIED.items() if case in ids)
    if reason := SUITES[suite].missing():
        pytest.skip(reason)
    env = make(case)
    assert isinstance(env, SuiteEnv)
    return env


def has_expert(env: SuiteEnv) -> bool:
    return env.world.oracle(np.random.default_rng(0)) is not None


def some_behaviour(env: SuiteEnv, seed: int) -> Behaviour:
    """The expert, or play where there is none."""
    return make_behaviour("expert" if has_expert(env) else "play", env, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def made() -> Iterator[Callable[[str], SuiteEnv]]:
    envs: dict[str, SuiteEnv] = {}

    def get(case: str) -> SuiteEnv:
        if case not in envs:
            envs[case] = make_case(case)
        return envs[case]

    yield get
    for env in envs.values():
        env.close()


def blocks(env: SuiteEnv, seed: int, count: int) -> np.ndarray:
    """Actions held over blocks, so that they lead somewhere."""
    dims = env.action_space.shape[0]
    held = np.random.default_rng(seed).uniform(-1, 1, (count, 1, dims)).astype(np.float32)
    return np.repeat(held, env.block, axis=1)


def digest(transition: Transition) -> str:
    arrays = [
        *transition.observation.frames.values(),
        transition.observation.proprio,
        transition.observation.objects,
        transition.rewards_K,
        np.array(sorted(transition.terms.items(), key=lambda item: item[0]), dtype="U32"),
    ]
    return hashlib.sha1(b"".join(a.tobytes() for a in arrays)).hexdigest()


def true_state(env: SuiteEnv) -> bytes:
    return repr(flat(env.world.save())).encode()


def flat(value: object) -> object:
    """A saved state as something whose text is all of it."""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return {key: flat(each) for key, each in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [flat(each) for each in value]
    if type(value).__name__ == "BulletSnapshot":
        return None  # a number in Bullet's memory; what it holds stands beside it
    fields = getattr(type(value), "__dataclass_fields__", None)
    return [flat(getattr(value, name)) for name in fields] if fields else repr(value)


def rollout(env: SuiteEnv, actions_TKA: np.ndarray) -> list[str]:
    """Outcomes of some blocks, the first drawn, with the true state after them."""
    seen = [digest(env.step_block(actions_KA, render=i == 0)) for i, actions_KA in enumerate(actions_TKA)]
    return [*seen, hashlib.sha1(true_state(env)).hexdigest()]


def check_restoring(env: SuiteEnv, before: int) -> None:
    env.reset(seed=11)
    behaviour = some_behaviour(env, 0)
    for _ in range(before):  # to where something is touched
        env.step_block(behaviour.act(env.observe(render=False)), render=False)
    actions = blocks(env, 2, 4)
    snapshot, seen, state = env.snapshot(), env.observe(), true_state(env)
    terms = env.reward_terms()
    expected, draw = rollout(env, actions[:3]), env.np_random.random()
    env.step_block(actions[3], render=False)
    for _ in range(2):
        env.restore(snapshot)
        assert env.elapsed == env.block * before
        assert true_state(env) == state
        assert env.reward_terms() == terms
        again = env.observe()
        assert all(np.array_equal(seen.frames[name], again.frames[name]) for name in seen.frames)
        assert np.array_equal(seen.proprio, again.proprio)
        assert np.array_equal(seen.objects, again.objects)
        assert rollout(env, actions[:3]) == expected
        assert env.np_random.random() == draw
