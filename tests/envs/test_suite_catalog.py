"""Which suites there are, what is said of those that are not, and the adapter for any Gymnasium environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from emu_embodied.envs import env_ids, suite_ids
from emu_embodied.envs.registry import check_env_id
from emu_embodied.envs.suites import catalog
from emu_embodied.envs.suites.catalog import SUITES, Suite
from emu_embodied.envs.suites.gymnasium_image import GymnasiumImageEnv
from emu_embodied.envs.suites.world import SuiteEnv
from tests.envs.fake_world import Corridor, FakeWorld, adapted

ROOT = Path(__file__).parents[2]


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'MetaWorld/reach-v3'"):
        check_env_id("MetaWorld/reech-v3")
    with pytest.raises(ValueError, match="did you mean 'metaworld'"):
        suite_ids("metawolrd")
    with pytest.raises(ValueError, match="did you mean 'panda'"):
        suite_ids("Panda")
    with pytest.raises(ValueError, match="did you mean 'libero-10'"):
        suite_ids("libero10")
    for wrong, right in (("LIBERO/spatial/3", "LIBERO/spatial-3"), ("libero/goal-7", "LIBERO/goal-7")):
        with pytest.raises(ValueError, match=f"did you mean '{right}'"):
            check_env_id(wrong)
    with pytest.raises(ValueError, match="did you mean 'eye'"):
        SuiteEnv(FakeWorld(), env_id="Fake/Go", cameras=("eyes",))


def test_a_suite_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Suite(name="absent", tasks={"Absent/Task": "t"}, world="absent:Absent", modules=("no_such_module_here",))
    monkeypatch.setitem(catalog.SUITES, "absent", absent)
    with pytest.raises(ImportError, match=r"no_such_module_here.*pip install 'emu-embodied\[suites\]'"):
        catalog.make_suite_env("absent", "Absent/Task")


def test_a_suite_that_is_broken_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Suite(name="broken", tasks={"Broken/T": "t"}, world="no_such_file:World", modules=())
    nameless = Suite(name="broken", tasks={"Broken/T": "t"}, world="closeness:World", modules=())
    for suite, said in ((broken, "No module named"), (nameless, "has no attribute 'World'")):
        monkeypatch.setitem(catalog.SUITES, "broken", suite)
        with pytest.raises(ImportError, match=rf"cannot be imported.*{said}.*pip install 'emu-embodied\[suites\]'"):
            catalog.make_suite_env("broken", "Broken/T")


@pytest.mark.parametrize(
    ("suite", "package", "version", "said"),
    [
        ("metaworld", "metaworld", "2.0.0", "before 3 tasks are of version 2"),
        ("metaworld", "mujoco", "3.17.0", "from 3.17 on equality constraints"),
        ("fetch", "mujoco", "4.0.0", "from 3.12 on joint types"),
        ("fetch", "gymnasium-robotics", "1.2.4", "before 1.4 Fetch"),
        ("pusht", "pymunk", "7.0.1", "from 7 on collision handlers"),
        ("panda-gym", "panda-gym", "2.0.4", "before 3 environments are Gym's"),
        ("ogbench", "mujoco", "3.8.1", "was made for mujoco 3.3"),
    ],
)
def test_wrong_versions_say_which_and_why(
    suite: str, package: str, version: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {
        "mujoco": "3.3.0",
        "metaworld": "3.1.1",
        "gymnasium-robotics": "1.4.2",
        "pymunk": "6.11.1",
        "panda-gym": "3.0.7",
        "dm-control": "1.0.28",
    }
    monkeypatch.setattr(catalog, "_version", installed.get)
    monkeypatch.setattr(catalog, "find_spec", lambda name: name)  # as if everything were installed
    assert SUITES[suite].missing() is None
    installed[package] = version
    reason = SUITES[suite].missing() or ""
    assert said in reason and f"{package} {version}" in reason and "pip install" in reason


def test_dm_control_goes_with_one_mujoco(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"dm-control": "1.0.28", "mujoco": "3.8.1"}
    monkeypatch.setattr(catalog, "_version", installed.get)
    assert "made for mujoco 3.3" in (catalog._dm_control_mismatch("ogbench") or "")
    installed["mujoco"] = "3.3.0"
    assert catalog._dm_control_mismatch("ogbench") is None


def test_our_own_worlds_are_a_suite_too() -> None:
    assert set(suite_ids("panda")) <= set(env_ids())
    assert all("Bullet" not in env_id for env_id in suite_ids("panda"))


def test_suites_are_registered_and_import_nothing() -> None:
    assert "MetaWorld/reach-v3" in gymnasium.registry
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import emu_embodied.envs\n"
        "print({'mujoco', 'pybullet', 'metaworld', 'gym_pusht', 'ogbench', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Any Gymnasium environment


def test_an_environment_that_draws_its_own_lots_is_found_out() -> None:
    env = adapted(lambda: Corridor(fair=False))
    env.reset(seed=0)
    snapshot = env.snapshot()
    env.step_block(np.ones((5, 1), np.float32), render=False)
    later = env.snapshot()
    env.restore(snapshot)
    with pytest.raises(ValueError, match="not deterministic"):
        env.restore(later)


def test_what_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(ValueError, match="bounded box"):
        adapted(lambda: Corridor(actions=gymnasium.spaces.Discrete(3)))
    with pytest.raises(ValueError, match="draws nothing"):
        adapted(picture=None)
    with pytest.raises(ValueError, match="lower case"):
        GymnasiumImageEnv(Corridor, env_id="Corridor", instruction="Walk", picture="view")


def test_rewards_and_actions_are_scaled() -> None:
    env = adapted()
    env.reset(seed=0)
    place = env.observe(render=False).proprio[0]
    _, reward, *_ = env.step(np.array([1.0]))
    assert env.observe(render=False).proprio[0] == pytest.approx(min(place + 0.3, 1.0))
    assert reward == pytest.approx(1 - abs(1 - env.observe(render=False).proprio[0]) / 2, abs=1e-6)
