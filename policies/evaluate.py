"""How often a policy succeeds: many episodes, several processes, one row of a table with its interval."""

from __future__ import annotations

import atexit
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from emu_embodied.files import write_json
from emu_embodied.metrics.intervals import wilson
from emu_embodied.model_card import searched
from emu_embodied.policies.episode import EpisodeSimulator, run_episode
from emu_embodied.policies.registry import PolicySpec
from emu_embodied.protocols import Policy
from emu_embodied.provenance import meta_dict
from emu_embodied.records import Meta

MakeSimulator = Callable[[str], EpisodeSimulator]
"""Environment id -> simulator. Crosses into worker processes, so it must be a function of a module."""

MakePolicy = Callable[[EpisodeSimulator, int], Policy]
"""Simulator and seed -> the policy of one episode, e.g. ``PolicySpec(name="true").build``. Picklable, too."""


@dataclass(frozen=True, slots=True)
class EpisodeResult:
    """What came of one episode."""

    seed: int
    """Reset seed."""
    success: bool
    """Whether any env step solved the task."""
    episode_return: float
    """See ``EpisodeTrace``."""
    decisions: int
    """Action blocks asked of the policy."""
    act_seconds: float
    """Wall time of all of them [s]."""
    tags: tuple[str, ...] = ()
    """What kind of episode it was, where the simulator says so (its ``tags``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRow:
    """One policy in one environment."""

    env: str
    """Environment id."""
    policy: str
    """Name of the policy."""
    episodes: int
    """Number of episodes."""
    success: float
    """Share of the episodes in which any env step solved the task; an episode ends there."""
    ci95: tuple[float, float]
    """Wilson 95 % interval of ``success``."""
    return_mean: float
    """Mean sum of env-step rewards over the whole step budget; after a success the solved state's reward counts on."""
    seconds_per_action: float
    """Wall time of ``policy.act`` per decision, that is per action block, on one thread [s]."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else determines the row (first seed, weights, budget ...): it is reused only where all of it agrees."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy to be measured."""

    make: MakePolicy
    """Makes the policy of an episode."""
    render: bool = True
    """Draw every state; policies that look at nothing are quicker without."""


Job = tuple[str, int]
"""Name of a candidate, and the seed of an episode."""


@dataclass(slots=True)
class _Worker:
    """What an evaluating process keeps from episode to episode."""

    env_id: str
    simulator: EpisodeSimulator
    candidates: Mapping[str, Candidate]

    def run(self, job: Job) -> EpisodeResult:
        name, seed = job
        candidate = self.candidates[name]
        policy = candidate.make(self.simulator, seed)
        trace = run_episode(self.simulator, policy, seed=seed, env_id=self.env_id, render=candidate.render)
        return EpisodeResult(
            seed=seed,
            success=trace.success,
            episode_return=trace.episode_return,
            decisions=len(trace),
            act_seconds=float(trace.act_seconds_T.sum()),
            tags=tuple(getattr(self.simulator, "tags", ())),
        )


_worker: _Worker | None = None
"""Set once in every worker process."""


def _start_worker(env_id: str, make_simulator: MakeSimulator, candidates: Mapping[str, Candidate]) -> None:
    global _worker
    os.environ["LP_NUM_THREADS"] = "0"  # the software renderer draws on the calling thread
    torch.set_num_threads(1)
    simulator = make_simulator(env_id)
    atexit.register(simulator.close)
    _worker = _Worker(env_id, simulator, candidates)


def _run_in_worker(job: Job) -> tuple[Job, EpisodeResult]:
    assert _worker is not None
    return job, _worker.run(job)


def play(
    env_id: str,
    candidates: Mapping[str, Candidate],
    jobs: Sequence[Job],
    *,
    make_simulator: MakeSimulator,
    workers: int = 1,
) -> Generator[tuple[Job, EpisodeResult], None, None]:
    """Run episodes, one for each job, and give each as it is finished; closing the generator drops the rest.

    Args:
        env_id: environment id.
        candidates: name -> policy.
        jobs: which policy with which reset seed; the policy of an episode is seeded alike.
        make_simulator: makes the simulator, once per process.
        workers: processes of one thread each; 1 runs in this one, in the order of the jobs.

    Raises:
        RuntimeError: if a worker process was killed.
    """
    workers = min(workers, len(jobs))
    if workers > 1:
        yield from _in_processes(jobs, workers, (env_id, make_simulator, candidates))
        return
    with closing(make_simulator(env_id)) as simulator:
        worker = _Worker(env_id, simulator, candidates)
        for job in jobs:
            yield job, worker.run(job)


def run_episodes(
    env_id: str,
    make_policy: MakePolicy,
    *,
    seeds: Sequence[int],
    make_simulator: MakeSimulator,
    render: bool = True,
    workers: int = 1,
    label: str = "",
) -> list[EpisodeResult]:
    """Run one episode per seed, in the order of the seeds whatever the number of workers.

    Args:
        env_id: environment id.
        make_policy: makes the policy of an episode.
        seeds: reset seeds; the policy of an episode is seeded alike.
        make_simulator: makes the simulator, once per process.
        render: see ``Candidate``.
        workers: processes of one thread each; 1 runs in this one.
        label: what the progress bar says.
    """
    candidates = {"": Candidate(make_policy, render)}
    jobs = [("", seed) for seed in seeds]
    results: dict[int, EpisodeResult] = {}
    succeeded = 0
    with tqdm(total=len(seeds), desc=label or env_id, unit="episode") as progress:
        for _, result in play(env_id, candidates, jobs, make_simulator=make_simulator, workers=workers):
            results[result.seed] = result
            succeeded += result.success
            progress.set_postfix(success=f"{succeeded}/{len(results)}", refresh=False)
            progress.update()
    return [results[seed] for seed in seeds]


def _in_processes(
    jobs: Sequence[Job], workers: int, start: tuple[Any, ...]
) -> Generator[tuple[Job, EpisodeResult], None, None]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=start)
    try:
        waiting: list[Future[tuple[Job, EpisodeResult]]] = [pool.submit(_run_in_worker, job) for job in jobs]
        for done in as_completed(waiting):
            yield done.result()
    except BrokenProcessPool as error:
        raise RuntimeError("a worker process was killed, perhaps for memory: try fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def summarise(
    env_id: str, policy: str, results: Sequence[EpisodeResult], settings: dict[str, Any] | None = None
) -> BenchRow:
    """The row of these episodes.

    Raises:
        ValueError: if there are none.
    """
    if not results:
        raise ValueError("a row needs at least one episode: give --episodes 1 or more")
    succeeded = sum(result.success for result in results)
    decisions = sum(result.decisions for result in results)
    return BenchRow(
        env=env_id,
        policy=policy,
        episodes=len(results),
        success=succeeded / len(results),
        ci95=wilson(succeeded, len(results)),
        return_mean=sum(result.episode_return for result in results) / len(results),
        seconds_per_action=sum(result.act_seconds for result in results) / decisions,
        settings=settings or {},
    )


def bench(
    env_ids: Iterable[str],
    specs: Sequence[PolicySpec],
    *,
    episodes: int,
    seed: int,
    make_simulator: MakeSimulator,
    workers: int = 1,
    kept: Sequence[BenchRow] = (),
    on_row: Callable[[list[BenchRow]], None] | None = None,
) -> list[BenchRow]:
    """One row for every environment and policy.

    Args:
        env_ids: environments.
        specs: policies.
        episodes: number of episodes of a row, with reset seeds ``seed``, ``seed + 1`` ...
        seed: first reset seed.
        make_simulator: makes the simulator of an id, in the processes that run it.
        workers: processes of one thread each.
        kept: rows of an earlier run; one with the same settings is taken instead of running it again.
        on_row: called after each new row with all that are known, to save them.
    """
    wanted = [(env_id, spec, policy_settings(spec, seed)) for env_id in env_ids for spec in specs]
    rows: dict[int, BenchRow] = {}
    for place, (env_id, spec, settings) in enumerate(wanted):
        for row in kept:
            if (row.env, row.policy, row.episodes, row.settings) == (env_id, spec.name, episodes, settings):
                rows[place] = row
    for place, (env_id, spec, settings) in enumerate(wanted):
        if place in rows:
            continue
        results = run_episodes(
            env_id,
            spec.build,
            seeds=range(seed, seed + episodes),
            make_simulator=make_simulator,
            render=spec.looks,
            workers=workers,
            label=f"{env_id} {spec.name}",
        )
        rows[place] = summarise(env_id, spec.name, results, settings)
        if on_row is not None:
            on_row([rows[known] for known in sorted(rows)])
    return [rows[place] for place in sorted(rows)]


def untouched(
    kept: Sequence[BenchRow], env_ids: Iterable[str], specs: Sequence[PolicySpec], seed: int
) -> list[BenchRow]:
    """Rows of an earlier run of which a new one says nothing: other environments, policies or settings.

    Of equal settings, rows of a checkpoint that was trained anew since are the new run's to replace.
    """
    wanted = [
        (env_id, spec.name, _without_weights(policy_settings(spec, seed))) for env_id in env_ids for spec in specs
    ]
    return [row for row in kept if (row.env, row.policy, _without_weights(row.settings)) not in wanted]


def _without_weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "weights"}


def policy_settings(spec: PolicySpec, seed: int) -> dict[str, Any]:
    """What determines a row of this policy from this first seed on: equal settings, equal rows."""
    settings: dict[str, Any] = {"seed": seed}
    if spec.plans:
        objective = "subtask" if spec.names_subtasks else spec.objective
        settings |= {"objective": objective, "budget": asdict(spec.budget)}
        if spec.names_subtasks:
            settings["subgoals"] = asdict(spec.subgoals)
        if spec.name != "shooting":
            settings["planner"] = spec.planner
    if spec.name == "token" or spec.guided:
        settings["acting"] = asdict(spec.acting)
    if spec.imagines and spec.stream != "pictures":
        settings["stream"] = spec.stream
    if spec.needs_model:
        settings["weights"] = weights_hash(spec.checkpoint)
    return settings


def weights_hash(checkpoint: str) -> str:
    """What the files of a checkpoint's networks hash to: a folder trained anew is another checkpoint."""
    from emu_embodied.world_model import checkpoint_folder  # slow to import, and most workers need none

    digest = hashlib.sha256()
    folder = checkpoint_folder(checkpoint)
    for file in (folder / "model.safetensors", *sorted(folder.glob("*/model.safetensors"))):  # tokenizer, eye ...
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def write_results(path: Path, rows: Sequence[BenchRow], meta: Meta) -> None:
    """Write ``{"rows": [...], "meta": {...}}``."""
    write_json(path, {"rows": [asdict(row) for row in rows], "meta": meta_dict(meta)})


def read_results(path: Path) -> list[BenchRow]:
    """Read the rows that ``write_results`` wrote.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
        return [BenchRow(**{**row, "ci95": tuple(row["ci95"])}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no benchmark results ({error!r}); give another file") from error


def format_table(rows: Sequence[BenchRow]) -> str:
    """The rows as a Markdown table, columns aligned."""
    header = ("environment", "policy", "by", "episodes", "success", "95 % interval", "return", "s / decision")
    cells = [header] + [
        (
            row.env,
            row.policy,
            str(row.settings.get("objective", "")) + searched(row.settings),
            str(row.episodes),
            f"{100 * row.success:.0f} %",
            f"{100 * row.ci95[0]:.0f} to {100 * row.ci95[1]:.0f} %",
            f"{row.return_mean:.1f}",
            f"{row.seconds_per_action:.3f}",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    left = 3  # names to the left, numbers to the right

    def line(texts: Sequence[str]) -> str:
        aligned = [
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(texts, widths, strict=True))
        ]
        return f"| {' | '.join(aligned)} |"

    rule = [("-" * width if column < left else "-" * (width - 1) + ":") for column, width in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *(line(texts) for texts in cells[1:])])
