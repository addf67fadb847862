"""Runs a protocol: every control on the same episodes, each episode written down as it ends.

Beside the table (``FILE.json``) lies ``FILE.episodes.jsonl`` with a line for each episode. A run that was stopped, or
ran out of its time, goes on from there; so does one that is asked for more episodes, or for other controls.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm

from emu_embodied.experiments.protocols.protocol import Control, Protocol
from emu_embodied.files import write_json
from emu_embodied.metrics.intervals import wilson
from emu_embodied.models.footprint import footprint
from emu_embodied.policies.episode import EpisodeSimulator
from emu_embodied.policies.evaluate import Candidate, EpisodeResult, play, policy_settings
from emu_embodied.policies.registry import check_fits
from emu_embodied.provenance import meta_dict
from emu_embodied.records import Meta
from emu_embodied.world_config import WorldModelConfig, checkpoint_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtocolRow:
    """One control in one environment."""

    protocol: str
    """Name of the protocol."""
    control: str
    """Name of the control."""
    env: str
    """Environment id."""
    policy: str
    """Name of the policy behind it."""
    episodes: int
    """Episodes run so far."""
    asked: int
    """Episodes that the protocol, or whoever runs it, asks for."""
    seed: int = 0
    """Number of the first."""
    success: float | None = None
    """Share of the episodes in which any env step fulfilled the rule; None if none was run."""
    ci95: tuple[float, float] | None = None
    """Wilson 95 % interval of ``success``."""
    return_mean: float | None = None
    """See ``BenchRow``."""
    seconds_per_action: float | None = None
    """Wall time of ``policy.act`` per action block, on one thread [s]."""
    parameters: int | None = None
    """Weights of the world model's backbone, where there is one."""
    data_hash: str | None = None
    """Identifies its training data."""
    tags: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Kind of episode -> how many there were, and the share that succeeded, with its interval."""
    sets: list[float] = field(default_factory=list)
    """Success in each set of episodes, where there are several."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else determines the row; episodes are taken over only where all of it agrees."""
    note: str = ""
    """Why it was not run, or what has to be said beside it."""

    @property
    def key(self) -> str:
        """What its episodes are found by: equal for equal settings, whatever the number of episodes."""
        identity = (self.protocol, self.control, self.env, self.policy, self.settings)
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The world model of the learned rows."""

    config: WorldModelConfig
    """What it was trained for."""
    parameters: int
    """Weights of its backbone."""
    acts: bool
    """Whether its policy role was trained."""


def load_model(checkpoint: str) -> Model:
    """What a checkpoint folder, or a shipped name, says of itself; its weights are not read."""
    folder = checkpoint_folder(checkpoint)
    meta = folder / "meta.json"
    return Model(
        config=WorldModelConfig.load(folder / "world.json"),
        parameters=footprint(folder).parameters,
        acts=meta.exists() and "policy" in json.loads(meta.read_text()),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """How much of a protocol to run, and how."""

    episodes: int | None = None
    """Episodes of an environment; the protocol's own, in all its sets, if left out."""
    seed: int = 0
    """Number of the first episode."""
    workers: int = 1
    """Processes of one thread each."""
    max_minutes: float | None = None
    """Stop after this time, with what there is [min]."""

    def asked(self, protocol: Protocol) -> int:
        """Episodes of a row."""
        return protocol.episodes * protocol.sets if self.episodes is None else self.episodes


def run_protocol(
    protocol: Protocol, controls: Sequence[Control], run: Run, path: Path, meta: Meta, *, model: Model | None = None
) -> list[ProtocolRow]:
    """Measure, and keep ``path`` up to date.

    Args:
        protocol: the rule.
        controls: rows to measure, equipped; others of the file are kept.
        run: how much.
        path: the table; the episodes lie beside it.
        meta: provenance of the run.
        model: of the rows that need one; without it they are not run, and say so.

    Returns:
        All rows of the file.

    Raises:
        ValueError: if the file holds something else, or the model was made for another embodiment.
    """
    ends = None if run.max_minutes is None else time.monotonic() + 60 * run.max_minutes
    log = path.with_suffix(".episodes.jsonl")
    results = _read_log(log)
    rows = [_blank(protocol, control, env_id, run, model) for env_id in protocol.env_ids for control in controls]
    others = _others(path, protocol, {(row.key, row.seed) for row in rows})
    places = {control.name: place for place, control in enumerate(protocol.controls)}
    size = 64 if model is None else model.config.image_size

    def save() -> list[ProtocolRow]:
        table = others + [_measured(row, results[row.key], protocol, run) for row in rows]
        table.sort(key=lambda row: (protocol.env_ids.index(row.env), places[row.control]))
        write_json(path, {"rows": [asdict(row) for row in table], "meta": meta_dict(meta)})
        return table

    for env_id in protocol.env_ids:
        here = [
            (row, control)
            for row, control in zip(rows, list(controls) * len(protocol.env_ids), strict=True)
            if row.env == env_id and not row.note.startswith(_NOT_RUN)
        ]
        jobs = [
            (row.control, seed)
            for seed in range(run.seed, run.seed + run.asked(protocol))  # a run that is cut short has all rows alike
            for row, _ in here
            if seed not in results[row.key]
        ]
        if not jobs or (ends is not None and time.monotonic() > ends):
            continue
        make = _Sized(protocol.make, size)
        if model is not None and any(control.needs_model for _, control in here):
            with closing(make(env_id)) as simulator:
                check_fits(SimpleNamespace(config=model.config), simulator)
        keys = {row.control: row.key for row, _ in here}
        candidates = {control.name: _candidate(control) for _, control in here}
        playing = play(env_id, candidates, jobs, make_simulator=make, workers=run.workers)
        log.parent.mkdir(parents=True, exist_ok=True)
        solved, saved = Counter[str](), time.monotonic()
        with (
            closing(playing),
            log.open("a") as lines,
            tqdm(total=len(jobs), desc=f"{protocol.name} {env_id}", unit="episode") as progress,
        ):
            try:
                for (name, _), result in playing:
                    results[keys[name]][result.seed] = result
                    lines.write(json.dumps({"row": keys[name], **asdict(result)}) + "\n")
                    lines.flush()
                    solved[name] += result.success
                    progress.set_postfix({control: solved[control] for control in keys}, refresh=False)
                    progress.update()
                    now = time.monotonic()
                    if now - saved > _SAVE_EVERY:
                        save()
                        saved = now
                    if ends is not None and now > ends:
                        break
            except KeyboardInterrupt:
                save()
                raise
    return save()


_NOT_RUN = "not run"
_SAVE_EVERY = 60.0
"""[s] between two versions of the table; the episodes themselves are written at once."""


def _blank(protocol: Protocol, control: Control, env_id: str, run: Run, model: Model | None) -> ProtocolRow:
    """The row before anything was measured: what determines it, and why it cannot be measured, if so."""
    why = _why_not(control, model)
    settings: dict[str, Any] = {}
    if control.spec is not None and not why:
        settings = policy_settings(control.spec, run.seed)
        del settings["seed"]
    learned = control.needs_model and model is not None
    return ProtocolRow(
        protocol=protocol.name,
        control=control.name,
        env=env_id,
        policy=control.name if control.spec is None else control.spec.name,
        episodes=0,
        asked=run.asked(protocol),
        seed=run.seed,
        parameters=model.parameters if learned and model is not None else None,
        data_hash=model.config.data_hash if learned and model is not None else None,
        settings=settings,
        note=f"{_NOT_RUN}: {why}" if why else protocol.caution if learned else "",
    )


def _why_not(control: Control, model: Model | None) -> str:
    """Why a control cannot be measured; empty if it can."""
    if not control.needs_model:
        return ""
    if model is None:
        return "no checkpoint was given"
    assert control.spec is not None
    if control.spec.objective == "objects" and not model.config.objects:
        return "the checkpoint knows of no objects"
    if control.spec.name == "token" and not model.acts:
        return "the checkpoint's policy role was not trained (train policy)"
    return ""


def _measured(row: ProtocolRow, results: Mapping[int, EpisodeResult], protocol: Protocol, run: Run) -> ProtocolRow:
    """The row of these episodes."""
    seeds = [seed for seed in range(run.seed, run.seed + row.asked) if seed in results]
    if not seeds:
        return row if row.note else replace(row, note=f"{_NOT_RUN}: no time was left")
    found = [results[seed] for seed in seeds]
    decisions = sum(result.decisions for result in found)
    sets = [
        [results[seed].success for seed in seeds if (seed - run.seed) // protocol.episodes == part]
        for part in range(protocol.sets)
    ]
    tags = sorted({tag for result in found for tag in result.tags})
    everything = asdict(row) | {
        "episodes": len(found),
        **_share(result.success for result in found),
        "return_mean": sum(result.episode_return for result in found) / len(found),
        "seconds_per_action": sum(result.act_seconds for result in found) / decisions,
        "tags": {tag: _counted(result.success for result in found if tag in result.tags) for tag in tags},
        "sets": [sum(part) / len(part) for part in sets if part] if protocol.sets > 1 else [],
    }
    return ProtocolRow(**everything)


def _share(successes: Iterable[bool]) -> dict[str, Any]:
    solved = list(successes)
    return {"success": sum(solved) / len(solved), "ci95": wilson(sum(solved), len(solved))}


def _counted(successes: Iterable[bool]) -> dict[str, Any]:
    solved = list(successes)
    share = _share(solved)
    return {"episodes": len(solved), **share, "ci95": list(share["ci95"])}


@dataclass(frozen=True, slots=True)
class _Sized:
    """Makes simulators of a picture size; crosses into worker processes."""

    make: Callable[..., EpisodeSimulator]
    image_size: int

    def __call__(self, env_id: str) -> EpisodeSimulator:
        return self.make(env_id, image_size=self.image_size)


def _candidate(control: Control) -> Candidate:
    if control.spec is not None:
        return Candidate(control.spec.build, control.spec.looks)
    assert control.make is not None, f"{control.name} has neither a spec nor a maker"
    return Candidate(control.make, render=False)


def _read_log(log: Path) -> defaultdict[str, dict[int, EpisodeResult]]:
    """Row key -> seed -> episode; a line that was cut off by a kill is left out."""
    results: defaultdict[str, dict[int, EpisodeResult]] = defaultdict(dict)
    if not log.exists():
        return results
    text = log.read_text()
    if text and not text.endswith("\n"):
        log.write_text(text[: text.rfind("\n") + 1])
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            told = json.loads(line)
            key = told.pop("row")
            result = EpisodeResult(**{**told, "tags": tuple(told["tags"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{log}, line {number} is no episode ({error!r}); give another --json") from error
        results[key][result.seed] = result
    return results


def _others(path: Path, protocol: Protocol, measured: set[tuple[str, int]]) -> list[ProtocolRow]:
    """Rows of the file that are not measured now; one that could not be run says nothing, and is left out."""
    rows = read_rows(path) if path.exists() else []
    for row in rows:
        if row.protocol != protocol.name:
            raise ValueError(f"{path} holds a table of {row.protocol}, not of {protocol.name}: give another --json")
    return [row for row in rows if row.episodes and (row.key, row.seed) not in measured]


def read_rows(path: Path) -> list[ProtocolRow]:
    """Read the rows that ``run_protocol`` wrote.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
        return [ProtocolRow(**{**row, "ci95": row["ci95"] and tuple(row["ci95"])}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no table of a protocol ({error!r}); give another file") from error


def format_rows(rows: Sequence[ProtocolRow]) -> str:
    """The rows as a Markdown table."""
    header = (
        "environment",
        "control",
        "episodes",
        "success",
        "95 % interval",
        "where it moves",
        "s / decision",
        "model",
    )
    lines = [header, tuple("---" if column < 2 else "---:" for column in range(len(header)))]
    for row in rows:
        count = str(row.episodes) if row.episodes == row.asked else f"{row.episodes} of {row.asked}"
        if row.success is None or row.ci95 is None or row.seconds_per_action is None:
            lines.append((row.env, row.control, count, row.note, "", "", "", ""))
            continue
        moved = row.tags.get("moved")
        model = "" if row.parameters is None else f"{row.parameters / 1e6:.1f} M, data {str(row.data_hash)[:8]}"
        lines.append(
            (
                row.env,
                row.control,
                count,
                f"{100 * row.success:.1f} %",
                f"{100 * row.ci95[0]:.1f} to {100 * row.ci95[1]:.1f} %",
                "" if moved is None else f"{100 * moved['success']:.1f} % of {moved['episodes']}",
                f"{row.seconds_per_action:.3f}",
                model,
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
