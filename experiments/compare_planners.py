"""Which search finds the better plan? The same episodes and as many candidates for every planner.

In the true simulator the search alone is measured; in imagination, also how well it bears a model's mistakes. Every
episode is kept in ``compare_planners.json`` as it comes; the same command goes on where it was stopped.

python -m emu_embodied.experiments.compare_planners --env PandaPush-v0 --budget.horizon 3 --out results/compare_planners
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

from emu_embodied.envs.registry import make
from emu_embodied.experiments.planners_figure import draw_planners
from emu_embodied.experiments.protocols import p1
from emu_embodied.files import write_atomically, write_json
from emu_embodied.metrics.intervals import wilson
from emu_embodied.policies.episode import EpisodeSimulator, run_episode
from emu_embodied.policies.evaluate import weights_hash
from emu_embodied.policies.registry import PlanningBudget, PolicySpec
from emu_embodied.provenance import make_meta, meta_dict
from emu_embodied.world_config import WorldModelConfig, checkpoint_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparePlanners:
    """What to compare."""

    env: str
    """Environment id, or several with commas between; ``PushT/goal`` is Push-T towards the state of a recorded episode
    25 env steps later (protocol P1)."""
    policy: Literal["true", "imagined"] = "true"
    """Where candidates are tried: in the true simulator or in imagination."""
    planners: str = "cem,icem,categorical,mppi,beam,shooting"
    """Planners, with commas between."""
    budgets: str = "32x2,64x2,64x4"
    """Candidates x iterations of a decision, with commas between."""
    budget: PlanningBudget = field(default_factory=PlanningBudget)
    """All else of the search; its samples and iterations are not looked at."""
    objective: str = "reward"
    """What plans are searched for: reward, success, both, goal or, with a model that knows of them, objects."""
    checkpoint: str = "nano"
    """World model, where one is needed: a shipped name or a folder."""
    device: str = "cpu"
    """Where it runs."""
    blocks: int | None = None
    """Blocks of an episode; the environment's own number if left out. With 1 only first searches are compared, which
    all start from the same states: many more seeds for the same time."""
    episodes: int = 20
    """Episodes of a row, with the same seeds for all."""
    seed: int = 1000
    """First reset seed."""
    minutes: float = 60.0
    """No episode is begun after this long [min]."""
    out: Path
    """Folder for ``compare_planners.json``, ``.csv`` and a figure for each environment."""

    def specs(self) -> Iterator[PolicySpec]:
        """What is compared: every planner at every budget.

        Raises:
            ValueError: if a budget does not read like 64x2.
        """
        for text in self.budgets.split(","):
            samples, _, iterations = text.strip().partition("x")
            if not (samples.isdigit() and iterations.isdigit()):
                raise ValueError(f"--budgets {self.budgets!r}: {text!r} is not candidates x iterations, e.g. 64x2")
            budget = replace(self.budget, samples=int(samples), iterations=int(iterations))
            for planner in self.planners.split(","):
                yield PolicySpec(
                    name=self.policy,
                    checkpoint=self.checkpoint,
                    planner=planner.strip(),
                    objective=self.objective,
                    budget=budget,
                    device=self.device,
                )


@dataclass(frozen=True, slots=True)
class Planned:
    """What came of one episode."""

    seed: int
    """Reset seed."""
    success: bool
    """Whether any env step solved the task."""
    episode_return: float
    """See ``EpisodeTrace``."""
    decisions: int
    """Searches."""
    evaluations: int
    """Futures in all searches."""
    first_cost: float
    """Cost of the first search's plan: all searches of a seed see the same state there."""
    seconds: float
    """Wall time of all searches [s]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One search in one environment."""

    env: str
    """Environment id."""
    policy: str
    """``true`` or ``imagined``."""
    planner: str
    """Which search."""
    objective: str
    """What for."""
    budget: dict[str, Any]
    """``PlanningBudget``."""
    blocks: int | None
    """Blocks of an episode, if cut short."""
    weights: str | None
    """What the model's files hash to; None where none was needed."""
    results: list[Planned] = field(default_factory=list)
    """Episodes so far."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What determines its episodes but for their seeds."""
        return self.env, self.policy, self.planner, self.objective, self.blocks, self.weights, json.dumps(self.budget)

    @property
    def seeds(self) -> set[int]:
        """Reset seeds of the episodes so far."""
        return {result.seed for result in self.results}

    @property
    def label(self) -> str:
        """The planner, and what of its budget is not as usual."""
        usual = asdict(PlanningBudget())
        apart = ("samples", "iterations", "horizon")
        changes = [f"{name}={value}" for name, value in self.budget.items() if value != usual[name]]
        return " ".join([self.planner, *(change for change in changes if change.partition("=")[0] not in apart)])

    def summary(self) -> dict[str, Any]:
        """One line of the table; means are over episodes."""
        count = len(self.results)
        solved = sum(result.success for result in self.results)
        decisions = sum(result.decisions for result in self.results)
        low, high = wilson(solved, count)
        return {
            "env": self.env,
            "policy": self.policy,
            "search": self.label,
            "blocks": self.blocks,
            "samples": self.budget["samples"],
            "iterations": self.budget["iterations"],
            "horizon": self.budget["horizon"],
            "candidates": self.budget["samples"] * self.budget["iterations"],
            "episodes": count,
            "solved": solved,
            "success": solved / count,
            "success_low": low,
            "success_high": high,
            "return": sum(result.episode_return for result in self.results) / count,
            "first_cost": sum(result.first_cost for result in self.results) / count,
            "decisions": decisions / count,
            "evaluations": sum(result.evaluations for result in self.results) / count,
            "seconds_per_decision": sum(result.seconds for result in self.results) / decisions,
        }


def compare(config: ComparePlanners) -> list[Row]:
    """Run the episodes that are missing until all are there or the time is up.

    Every search meets an episode before the next one begins, so that a comparison cut short is a fair one.
    """
    specs = list(config.specs())
    needs_model = any(spec.needs_model for spec in specs)
    world = WorldModelConfig.load(checkpoint_folder(config.checkpoint) / "world.json") if needs_model else None
    weights = weights_hash(config.checkpoint) if needs_model else None
    book = Book(config.out / "compare_planners.json", config.seed, None if world is None else world.data_hash)
    rows, wanted = list[Row](), range(config.seed, config.seed + config.episodes)
    ends = time.monotonic() + 60 * config.minutes
    for env_id in [name.strip() for name in config.env.split(",")]:
        own = [(spec, book.row(env_id, spec, config.blocks, weights)) for spec in specs]
        with closing(_simulator(env_id, 64 if world is None else world.image_size, config.blocks)) as simulator:
            for seed in tqdm(wanted, desc=env_id, unit="seed"):
                for spec, row in own:
                    if seed not in row.seeds and time.monotonic() < ends:
                        row.results.append(_episode(simulator, spec, seed))
                        book.save(row)
        rows += [row for _, row in own]
    asked = [replace(row, results=[result for result in row.results if result.seed in wanted]) for row in rows]
    return [row for row in asked if row.results]


def _simulator(env_id: str, image_size: int, blocks: int | None) -> EpisodeSimulator:
    suite_id, _, protocol = env_id.partition("/")
    simulator: EpisodeSimulator
    if protocol == "goal":
        simulator = p1.make_env(suite_id, image_size=image_size)
    else:
        simulator = make(env_id, image_size=image_size)
    if blocks is not None:
        simulator.max_episode_steps = blocks * simulator.block
    return simulator


def _episode(simulator: EpisodeSimulator, spec: PolicySpec, seed: int) -> Planned:
    policy = spec.build(simulator, seed)
    trace = run_episode(simulator, policy, seed=seed, render=spec.looks)
    plans = [decision.plan for decision in trace.decisions]
    return Planned(
        seed=seed,
        success=trace.success,
        episode_return=trace.episode_return,
        decisions=len(plans),
        evaluations=sum(plan.evaluations for plan in plans),
        first_cost=plans[0].cost,
        seconds=sum(decision.seconds for decision in trace.decisions),
    )


class Book:
    """The rows of a file: read when it is opened, written whenever an episode is added.

    Args:
        file: where.
        seed: first reset seed, for the record.
        data_hash: what the model was trained on, for the record.

    Raises:
        ValueError: if the file holds something else.
    """

    def __init__(self, file: Path, seed: int, data_hash: str | None) -> None:
        self.file = file
        self.meta = meta_dict(make_meta(seed=seed, data_hash=data_hash))
        self._rows: dict[tuple[Any, ...], Row] = {}
        if file.exists():
            try:
                for stored in json.loads(file.read_text())["rows"]:
                    row = Row(**{**stored, "results": [Planned(**one) for one in stored["results"]]})
                    self._rows[row.key] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file} holds no comparison ({error!r}); give another --out") from error

    def row(self, env_id: str, spec: PolicySpec, blocks: int | None, weights: str | None) -> Row:
        """The row of a search as it was kept, or a new one."""
        row = Row(
            env=env_id,
            policy=spec.name,
            planner=spec.planner,
            objective=spec.objective,
            budget=asdict(spec.budget),
            blocks=blocks,
            weights=weights,
        )
        return self._rows.get(row.key, row)

    def save(self, row: Row) -> None:
        """Keep a row as it now is."""
        self._rows[row.key] = row
        write_json(self.file, {"rows": [asdict(one) for one in self._rows.values()], "meta": self.meta})


COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("episodes", "episodes", "d"),
    ("success", "success", ".0%"),
    ("success_low", "from", ".0%"),
    ("success_high", "to", ".0%"),
    ("return", "return", ".2f"),
    ("first_cost", "first plan's cost", ".4f"),
    ("decisions", "decisions", ".1f"),
    ("evaluations", "futures", ".0f"),
    ("seconds_per_decision", "s/decision", ".2f"),
)
"""Column, title and format of the table that is printed."""


def format_rows(rows: Sequence[Row]) -> str:
    """The summaries as a Markdown table."""
    titles = ["environment", "search", "budget", *(title for _, title, _ in COLUMNS)]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * 3}{'---:|' * len(COLUMNS)}"]
    for row in rows:
        summary = row.summary()
        budget = f"{summary['samples']}x{summary['iterations']}, {summary['horizon']} blocks"
        cells = [format(summary[name], how) for name, _, how in COLUMNS]
        lines.append(f"| {row.env} {row.policy} | {row.label} | {budget} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """The summaries as CSV."""
    summaries = [row.summary() for row in rows]

    def write(aside: Path) -> None:
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(summaries[0]))
            writer.writeheader()
            writer.writerows(summaries)

    write_atomically(path, write)


def main(config: ComparePlanners) -> None:
    """Compare, print the table, write CSV and figures."""
    torch.set_num_threads(1)
    rows = compare(config)
    if not rows:
        print("no episode was run: give more --minutes")
        return
    print(format_rows(rows))
    files = [config.out / "compare_planners.csv"]
    write_table(files[0], rows)
    for env_id in dict.fromkeys(row.env for row in rows):
        own = [row.summary() for row in rows if row.env == env_id]
        stem = config.out / f"compare_planners_{env_id.replace('/', '_')}_{config.policy}"
        files += draw_planners(own, f"{env_id}, {config.policy} dynamics, by {config.objective}", stem)
    for file in files:
        print(f"  {file}")


if __name__ == "__main__":
    main(tyro.cli(ComparePlanners))
