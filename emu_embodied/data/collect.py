"""Record episodes with several worker processes.

The recorder knows no simulator and no behaviour: it is handed factories. They cross into freshly started processes, so
they must be picklable (functions of a module, or ``functools.partial`` of one), and every simulator lives only there.

Episode i of run seed S is a function of (S, i) alone, so the dataset has the same bytes for any number of workers, and
a run that was killed continues where it stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import accumulate
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from emu_embodied.data.episodes import DatasetSpec, EncodedEpisode, EpisodeStore, check_episode, encode
from emu_embodied.data.recording import BehaviourFactory, RecordedSimulator, SimulatorFactory, record_episode
from emu_embodied.files import write_json
from emu_embodied.hardware import peak_memory_mb

_GOLDEN = 0.6180339887498949
_THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS")


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectConfig:
    """What to record."""

    env: str
    """Environment id, or several with commas between; episodes are split evenly."""
    episodes: int
    """How many episodes the dataset shall have [episodes]."""
    out: Path
    """Dataset folder; one that exists is continued if it was recorded with the same settings, otherwise refused."""
    workers: int = 2
    """Processes; does not change what is recorded."""
    seed: int = 0
    """Run seed. Environment seeds are 32-bit hashes of it, so small seeds stay free for evaluation."""
    mixture: dict[str, float] = field(
        default_factory=lambda: {"expert": 0.25, "noisy": 0.35, "random": 0.2, "play": 0.2}
    )
    """Behaviour -> share of the episodes; shares are scaled to sum to 1."""
    variant: str = ""
    """What else about the simulators changes what is recorded, in words; a dataset is continued only with the same."""

    @property
    def env_ids(self) -> tuple[str, ...]:
        """The ids in ``env``."""
        return tuple(name.strip() for name in self.env.split(",") if name.strip())

    def settings(self) -> dict[str, Any]:
        """What determines the bytes of every episode."""
        total = sum(self.mixture.values())
        mixture = {name: share / total for name, share in self.mixture.items()}
        return {"env_ids": list(self.env_ids), "seed": self.seed, "mixture": mixture, "variant": self.variant}


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectResult:
    """What a run recorded."""

    store: EpisodeStore
    """The dataset, with the episodes of earlier runs."""
    recorded: int
    """Episodes recorded by this run."""
    success: dict[str, tuple[int, int]]
    """``env id / source`` -> (successful episodes, episodes), over the whole dataset."""
    worker_peak_mb: float
    """Largest resident memory of a worker [MB]; 0 if nothing was left to record."""


@dataclass(frozen=True, slots=True)
class _Task:
    """One episode to record."""

    number: int
    env_id: str
    seed: int
    source: str
    run_seed: int


@dataclass(frozen=True, slots=True)
class _Failure:
    """An exception in a worker, as text; ``refusal`` is its message if the user can mend it (an unknown id ...)."""

    trace: str
    refusal: str | None


def episode_task(config: CollectConfig, number: int) -> _Task:
    """What episode ``number`` is: a function of the settings and the number alone.

    Sources follow a golden-ratio sequence per environment, so every prefix of a run has close to the shares asked for.
    """
    lane, turn = number % len(config.env_ids), number // len(config.env_ids)
    offset = np.random.default_rng([config.seed, lane]).random()
    names = list(config.mixture)
    bounds = list(accumulate(config.mixture[name] for name in names))
    point = (offset + turn * _GOLDEN) % 1.0 * bounds[-1]
    source = next(name for name, bound in zip(names, bounds, strict=True) if point < bound)
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    return _Task(number, config.env_ids[lane], seed, source, config.seed)


def collect(
    config: CollectConfig,
    simulators: SimulatorFactory,
    behaviours: Mapping[str, BehaviourFactory],
    *,
    meta: Mapping[str, Any] | None = None,
) -> CollectResult:
    """Record episodes until the dataset has ``config.episodes`` of them.

    Args:
        config: what to record.
        simulators: picklable; ``simulators(env_id)`` is called in the workers only.
        behaviours: source name -> picklable factory.
        meta: provenance, written to ``collection.json`` when the dataset is started.

    Raises:
        ValueError: for settings that make no sense, or a folder that holds something else.
        RuntimeError: if a worker failed; what was recorded until then stays, and the run can be repeated.
    """
    _check(config, behaviours)
    existing = _existing(config)
    done = set()
    if existing is not None:
        done = {int(Path(entry.file).stem) for entry in existing.entries if existing.path(entry).exists()}
    todo = [number for number in range(config.episodes) if number not in done]
    if existing is not None and not todo:
        return CollectResult(store=existing, recorded=0, success=_success(existing), worker_peak_mb=0.0)

    with _workers(config, simulators, behaviours, count=min(config.workers, len(todo))) as crew:
        spec = _describe(crew, config)
        if existing is None:
            store = EpisodeStore.create(config.out, spec)
            write_json(config.out / "collection.json", {"settings": config.settings(), "meta": dict(meta or {})})
        else:
            store = existing
            store.check_compatible(spec)
        peak = _record(crew, config, store, todo)
    return CollectResult(store=store, recorded=len(todo), success=_success(store), worker_peak_mb=peak)


def _check(config: CollectConfig, behaviours: Mapping[str, BehaviourFactory]) -> None:
    if not config.env_ids or len(set(config.env_ids)) < len(config.env_ids):
        raise ValueError(f"--env needs one or more different environment ids, got {config.env!r}")
    for name, value in (("episodes", config.episodes), ("workers", config.workers)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if config.seed < 0:
        raise ValueError(f"--seed must not be negative, got {config.seed}")
    for name, share in config.mixture.items():
        if name not in behaviours:
            near = get_close_matches(name, behaviours, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown behaviour {name!r}: did you mean {near!r}? Known: {', '.join(behaviours)}")
        if not 0 <= share < float("inf"):
            raise ValueError(f"the share of {name!r} must be 0 or more, got {share}")
    if sum(config.mixture.values()) <= 0:
        raise ValueError("the mixture needs at least one behaviour with a share above 0")


def _existing(config: CollectConfig) -> EpisodeStore | None:
    """The dataset to continue, or None where a new one may be made."""
    if not config.out.exists() or (config.out.is_dir() and not any(config.out.iterdir())):
        return None
    store = EpisodeStore.open(config.out, append=True)
    record = config.out / "collection.json"
    if not record.exists():
        if len(store):
            raise ValueError(f"{config.out} holds a dataset that was not recorded by collect; give another folder")
        # Killed between the folder's first file and its second: nothing is lost by starting over.
        write_json(record, {"settings": config.settings(), "meta": {}})
        return store
    try:
        settings = {"variant": "", **json.loads(record.read_text())["settings"]}  # older ones had no variants
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record} is damaged ({error!r}); give another folder") from error
    clashes = [
        f"{name}: dataset {settings.get(name)}; asked {asked}"
        for name, asked in config.settings().items()
        if settings.get(name) != asked
    ]
    if clashes:
        raise ValueError(f"{config.out} was recorded with other settings, not continued: " + " | ".join(clashes))
    return store


@dataclass(frozen=True, slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection

    def send(self, asked: str | _Task) -> None:
        with suppress(BrokenPipeError):  # ``receive`` says what happened
            self.pipe.send(asked)

    def receive(self, doing: str) -> Any:
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            self.process.join(5)
            raise RuntimeError(f"a worker died (exit code {self.process.exitcode}) while {doing}") from error
        if isinstance(answer, _Failure):
            if answer.refusal is not None:
                raise ValueError(answer.refusal)
            raise RuntimeError(f"a worker failed while {doing}:\n{answer.trace}")
        return answer


@contextmanager
def _workers(
    config: CollectConfig, simulators: SimulatorFactory, behaviours: Mapping[str, BehaviourFactory], *, count: int
) -> Iterator[list[_Worker]]:
    """Worker processes that end when their pipe does, also if this process is killed."""
    context = multiprocessing.get_context("spawn")
    chosen = {name: behaviours[name] for name in config.mixture}
    crew: list[_Worker] = []
    before = {name: os.environ.get(name) for name in _THREAD_LIMITS}
    # Libraries read these once, when a worker first imports them. The workers are the parallelism: one thread each,
    # for Mesa's software renderer too (LP_), whose threads otherwise halve the speed of two workers on two cores.
    os.environ.update(dict.fromkeys(_THREAD_LIMITS, "1"))
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, simulators, chosen), daemon=True)
            process.start()
            theirs.close()
            crew.append(_Worker(process, ours))
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
    try:
        yield crew
    finally:
        for worker in crew:
            worker.pipe.close()
        for worker in crew:
            worker.process.join(10)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def _describe(crew: list[_Worker], config: CollectConfig) -> DatasetSpec:
    specs = []
    for env_id in config.env_ids:
        crew[0].send(env_id)
        specs.append(crew[0].receive(f"making {env_id}"))
    for spec in specs[1:]:
        for name in ("block", "action_dim", "cameras", "proprio", "objects"):
            if getattr(spec, name) != getattr(specs[0], name):
                first, other = (_brief(getattr(each, name)) for each in (specs[0], spec))
                raise ValueError(
                    f"{specs[0].env_ids[0]} and {spec.env_ids[0]} do not fit in one dataset, "
                    f"{name}: {first} and {other}; collect them into folders of their own"
                )
    return replace(specs[0], env_ids=config.env_ids)


def _brief(value: Any) -> str:
    """Fields by their names, all else as it is."""
    return ", ".join(field.name for field in value) or "none" if isinstance(value, tuple) else str(value)


def _record(crew: list[_Worker], config: CollectConfig, store: EpisodeStore, todo: list[int]) -> float:
    """Hand out ``todo`` and store the answers in its order. Returns the largest memory of a worker [MB]."""
    by_pipe = {worker.pipe: worker for worker in crew}
    working: dict[Connection, int] = {}
    idle = list(by_pipe)
    finished: dict[int, EncodedEpisode] = {}
    given = stored = successes = 0
    peak = 0.0
    with tqdm(total=config.episodes, initial=config.episodes - len(todo), unit="episode", desc="collect") as bar:
        while stored < len(todo):
            # Not too far ahead of the slowest episode: answers wait in memory until those before them are stored.
            while idle and given < min(len(todo), stored + 8 * len(crew)):
                pipe = idle.pop()
                by_pipe[pipe].send(episode_task(config, todo[given]))
                working[pipe] = todo[given]
                given += 1
            ready = wait(list(working))
            for pipe in [pipe for pipe in working if pipe in ready]:
                number = working.pop(pipe)
                task = episode_task(config, number)
                finished[number], memory = by_pipe[pipe].receive(
                    f"recording episode {number} ({task.env_id}, seed {task.seed}, {task.source})"
                )
                peak = max(peak, memory)
                idle.append(pipe)
            while stored < len(todo) and todo[stored] in finished:
                entry = store.append_encoded(finished.pop(todo[stored]), number=todo[stored])
                stored += 1
                successes += entry.success
                bar.set_postfix(success=f"{successes / stored:.2f}", refresh=False)
                bar.update()
    return peak


def _success(store: EpisodeStore) -> dict[str, tuple[int, int]]:
    total: Counter[str] = Counter()
    solved: Counter[str] = Counter()
    for entry in store.entries:
        total[f"{entry.env_id} / {entry.source}"] += 1
        solved[f"{entry.env_id} / {entry.source}"] += entry.success
    return {key: (solved[key], total[key]) for key in sorted(total)}


def _work(pipe: Connection, simulators: SimulatorFactory, behaviours: Mapping[str, BehaviourFactory]) -> None:
    """A worker's life: answer env ids with specs and tasks with episodes, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and closes the pipe
    made: dict[str, RecordedSimulator] = {}
    specs: dict[str, DatasetSpec] = {}
    # Closed here and not at exit: by then OpenGL has been shut down by its own exit handler.
    with ExitStack() as closing, suppress(EOFError, BrokenPipeError):
        while True:
            asked: str | _Task = pipe.recv()
            try:
                env_id = asked if isinstance(asked, str) else asked.env_id
                if env_id not in made:
                    made[env_id] = simulators(env_id)
                    closing.callback(made[env_id].close)
                    specs[env_id] = _spec(made[env_id], env_id)
                if isinstance(asked, str):
                    answer: Any = specs[env_id]
                else:
                    rng = np.random.default_rng([asked.run_seed, asked.number, 1])
                    behaviour = behaviours[asked.source](made[env_id], rng)
                    episode = record_episode(
                        made[env_id], behaviour, env_id=env_id, seed=asked.seed, source=asked.source
                    )
                    check_episode(episode, specs[env_id])
                    answer = encode(episode), peak_memory_mb()
            except Exception as error:
                refused = isinstance(asked, str) and isinstance(error, ValueError | ImportError)
                answer = _Failure(traceback.format_exc(), str(error) if refused else None)
            pipe.send(answer)


def _spec(simulator: RecordedSimulator, env_id: str) -> DatasetSpec:
    simulator.reset(seed=0)
    frames = simulator.observe().frames
    return DatasetSpec(
        env_ids=(env_id,),
        block=simulator.block,
        action_dim=int(simulator.action_space.shape[0]),
        cameras={name: (frame.shape[0], frame.shape[1]) for name, frame in frames.items()},
        proprio=tuple(simulator.proprio_fields),
        objects=tuple(simulator.object_fields),
    )
