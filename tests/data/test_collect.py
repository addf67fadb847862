"""Collecting: the same bytes for any number of workers, kills that cost nothing, refusals that say why."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from emu_embodied.data.collect import CollectConfig, collect, episode_task
from emu_embodied.data.episodes import EpisodeStore
from tests.data.fakes import Crash, Die, DotSimulator, OutOfBox, Seek, Wander, make_known, make_small

ROOT = Path(__file__).parents[2]
BEHAVIOURS = {"expert": Seek, "noisy": Wander, "random": Wander, "play": Wander}


def config(out: Path, **changes: object) -> CollectConfig:
    values: dict = {"env": "Dot-v0,Dash-v0", "episodes": 9, "out": out, "workers": 2, "seed": 3}
    return CollectConfig(**(values | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_bytes_for_any_number_of_workers_and_in_any_parts(tmp_path: Path) -> None:
    together = collect(config(tmp_path / "two"), DotSimulator, BEHAVIOURS)
    collect(config(tmp_path / "one", workers=1), DotSimulator, BEHAVIOURS)
    for episodes in (2, 3, 9):
        parts = collect(config(tmp_path / "parts", episodes=episodes, workers=3), DotSimulator, BEHAVIOURS)
    assert together.recorded == 9 and parts.recorded == 6 and len(parts.store) == 9
    assert contents(tmp_path / "two") == contents(tmp_path / "one") == contents(tmp_path / "parts")
    assert Counter(entry.env_id for entry in together.store.entries) == {"Dot-v0": 5, "Dash-v0": 4}
    assert sum(total for _, total in together.success.values()) == 9
    assert 0 < together.worker_peak_mb < 400
    assert len({entry.seed for entry in together.store.entries}) == 9
    other = collect(config(tmp_path / "other", seed=4, episodes=1), DotSimulator, BEHAVIOURS)
    assert other.store.entries[0].sha256 != together.store.entries[0].sha256


def test_episode_holds_what_happened(tmp_path: Path) -> None:
    result = collect(
        config(tmp_path / "d", env="Dot-v0", mixture={"expert": 1.0}, episodes=3), DotSimulator, BEHAVIOURS
    )
    for episode in result.store:
        simulator = DotSimulator("Dot-v0")
        simulator.reset(seed=episode.seed)
        assert episode.phases == ("seek",) * len(episode) and episode.instruction == "Dot-v0 go"
        for t in range(len(episode) + 1):
            seen = simulator.observe()
            assert (episode.frames["wrist"][t] == seen.frames["wrist"]).all()
            assert (episode.proprio_TP[t] == seen.proprio).all()
            assert episode.reward_T[t] == pytest.approx(simulator.reward())
            assert episode.success_T[t] == simulator.success()
            if t < len(episode):
                transition = simulator.step_block(episode.actions_TKA[t])
                assert (episode.rewards_TK[t] == transition.rewards_K).all()
                assert transition.truncated == (t == len(episode) - 1)


def test_shares_hold_in_every_prefix(tmp_path: Path) -> None:
    run = config(tmp_path)
    for episodes in (40, 100, 1000):
        for lane in range(2):
            counts = Counter(episode_task(run, number).source for number in range(lane, 2 * episodes, 2))
            for name, share in run.mixture.items():
                assert abs(counts[name] - share * episodes) <= 3
    none = config(tmp_path, mixture={"expert": 0.0, "random": 2.0})
    assert {episode_task(none, number).source for number in range(200)} == {"random"}


def test_simulators_are_closed_and_single_threaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOT_CLOSED", str(tmp_path / "closed"))
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    collect(config(tmp_path / "d", episodes=6, workers=1), DotSimulator, BEHAVIOURS)
    assert sorted((tmp_path / "closed").read_text().split("\n")) == ["", "Dash-v0 1", "Dot-v0 1"]
    assert os.environ["OMP_NUM_THREADS"] == "4"


def test_lost_file_is_recorded_again(tmp_path: Path) -> None:
    store = collect(config(tmp_path / "d"), DotSimulator, BEHAVIOURS).store
    before = contents(tmp_path / "d" / "episodes")
    store.path(store.entries[4]).unlink()
    result = collect(config(tmp_path / "d"), DotSimulator, BEHAVIOURS)
    assert result.recorded == 1 and len(result.store) == 9
    assert contents(tmp_path / "d" / "episodes") == before
    assert collect(config(tmp_path / "d"), DotSimulator, BEHAVIOURS).recorded == 0


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"seed": 4}, ["3", "4"]),
        ({"env": "Dot-v0"}, ["Dash-v0"]),
        ({"mixture": {"expert": 1.0}}, ["0.35", "1.0"]),
    ],
)
def test_other_settings_are_refused_with_both_values(tmp_path: Path, change: dict, values: list[str]) -> None:
    collect(config(tmp_path / "d", episodes=1, workers=1), DotSimulator, BEHAVIOURS)
    with pytest.raises(ValueError, match="other settings") as caught:
        collect(config(tmp_path / "d", **change), DotSimulator, BEHAVIOURS)
    for value in values:
        assert value in str(caught.value)


def test_other_cameras_and_blocks_are_refused(tmp_path: Path) -> None:
    collect(config(tmp_path / "d", env="Dot-v0", episodes=1, workers=1), DotSimulator, BEHAVIOURS)
    with pytest.raises(ValueError, match=r"\(8, 6\).*\(5, 6\)"):
        collect(config(tmp_path / "d", env="Dot-v0"), partial(DotSimulator, size=5), BEHAVIOURS)
    with pytest.raises(ValueError, match="block size: dataset 3; wanted 5"):
        collect(config(tmp_path / "d", env="Dot-v0"), partial(DotSimulator, block=5), BEHAVIOURS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixture": {"exprt": 1.0}}, "did you mean 'expert'"),
        ({"mixture": {"expert": -1.0}}, "0 or more"),
        ({"mixture": {}}, "at least one"),
        ({"episodes": 0}, "--episodes"),
        ({"workers": 0}, "--workers"),
        ({"env": ","}, "--env"),
        ({"env": "Dot-v0,Dot-v0"}, "different"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_senseless_settings_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect(config(tmp_path / "d", **change), DotSimulator, BEHAVIOURS)
    assert not (tmp_path / "d").exists()


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no dataset"):
        collect(config(tmp_path), DotSimulator, BEHAVIOURS)
    store = EpisodeStore.create(
        tmp_path / "s", collect(config(tmp_path / "d", episodes=1), DotSimulator, BEHAVIOURS).store.spec
    )
    store.append(EpisodeStore.open(tmp_path / "d")[0])
    with pytest.raises(ValueError, match="not recorded by collect"):
        collect(config(tmp_path / "s"), DotSimulator, BEHAVIOURS)


def test_environments_that_differ_or_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fit in one dataset, cameras"):
        collect(config(tmp_path / "d"), make_small, BEHAVIOURS)
    with pytest.raises(ValueError, match=r"^unknown environment 'Dto-v0'"):
        collect(config(tmp_path / "d", env="Dto-v0"), make_known, BEHAVIOURS)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("behaviour", "message"), [(Crash, "the motor is gone"), (Die, "exit code 7"), (OutOfBox, r"leaves \[-1, 1\]")]
)
def test_failing_worker_is_named_and_what_was_recorded_stays(tmp_path: Path, behaviour: type, message: str) -> None:
    run = config(tmp_path / "d", env="Dot-v0", mixture={"random": 0.8, "expert": 0.2}, workers=1)
    first = next(number for number in range(9) if episode_task(run, number).source == "expert")
    with pytest.raises(RuntimeError, match=message) as caught:
        collect(run, DotSimulator, {"random": Wander, "expert": behaviour})
    assert f"episode {first} (Dot-v0" in str(caught.value)
    assert len(EpisodeStore.open(tmp_path / "d")) == first
    assert len(collect(run, DotSimulator, BEHAVIOURS).store) == 9


SCRIPT = """
import signal
from pathlib import Path
from emu_embodied.data.collect import CollectConfig, collect
from tests.data.fakes import DotSimulator, Seek
if __name__ == "__main__":
    # A shell that runs tests in the background makes its children ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mixture = {{"expert": 1.0}}
    config = CollectConfig(env="Dot-v0", episodes=100000, out=Path({out!r}), workers=2, mixture=mixture)
    collect(config, DotSimulator, {{"expert": Seek}})
"""


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the process table of Linux")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_killed_run_leaves_no_workers_and_can_be_continued(tmp_path: Path, sent: signal.Signals) -> None:
    out = tmp_path / "d"
    (tmp_path / "run.py").write_text(SCRIPT.format(out=str(out)))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    index = out / "index.jsonl"
    deadline = time.monotonic() + 60
    while not (index.exists() and index.read_bytes().count(b"\n") > 20) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = children(process.pid)
    process.send_signal(sent)
    try:
        assert process.wait(60) != 0
    finally:
        process.kill()
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) >= 2 and not any(map(alive, workers))
    recorded = len(EpisodeStore.open(out))
    assert recorded > 20
    run = CollectConfig(env="Dot-v0", episodes=recorded + 3, out=out, workers=1, mixture={"expert": 1.0})
    store = collect(run, DotSimulator, {"expert": Seek}).store
    fresh = collect(dataclasses.replace(run, out=tmp_path / "fresh"), DotSimulator, {"expert": Seek}).store
    assert store.data_hash == fresh.data_hash and len(list(store)) == recorded + 3


def test_a_dataset_goes_on_with_the_same_variant_only(tmp_path):
    config = CollectConfig(
        env="Dot-v0", episodes=1, out=tmp_path / "data", workers=1, mixture={"play": 1.0}, variant="pairs seen"
    )
    collect(config, DotSimulator, {"play": Wander})
    assert collect(config, DotSimulator, {"play": Wander}).recorded == 0
    with pytest.raises(ValueError, match="pairs seen"):
        collect(dataclasses.replace(config, variant=""), DotSimulator, {"play": Wander})
