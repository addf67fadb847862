"""What real rollouts buy: success before, after 128 and after 1,280 of them, for four ways of spending them.

``policy``: GRPO on the simulator's verdict. ``imagined``: GRPO inside imagination; the real rollouts refresh the model
and are begun from. ``planner``: expert iteration on a planner's episodes that the simulator confirmed. ``cloning``:
behaviour cloning on as many episodes of the scripted expert. Every figure is the real simulator's, at temperature 0.

A cell is one (method, seed, budget). Cells that are in the result file already are skipped, so the table can be filled
one by one; those not run are written as such.

python -m emu_embodied.experiments.rl_budget --env PandaReach-v0 --checkpoint runs/base --runs runs/budget \
    --out experiments/results/rl
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from emu_embodied.acting import Actor
from emu_embodied.data.recording import SimulatorFactory
from emu_embodied.envs.registry import make
from emu_embodied.experiments.rl_budget_figure import draw_budget, table
from emu_embodied.files import write_atomically, write_json
from emu_embodied.metrics.intervals import wilson
from emu_embodied.policies.evaluate import weights_hash
from emu_embodied.policies.registry import PolicySpec, make_policy
from emu_embodied.provenance import make_meta, meta_dict
from emu_embodied.train.grpo import GRPOConfig
from emu_embodied.train.imagined_loop import ImaginedConfig
from emu_embodied.train.loop import TrainingFailed
from emu_embodied.train.reinforce import RLConfig
from emu_embodied.train.rl import RLSettings, train_rl
from emu_embodied.train.rl_log import METRICS, read_metrics
from emu_embodied.train.rollouts import Spent, roll_out
from emu_embodied.train.simulators import Start, open_crew
from emu_embodied.train.teacher_loop import MakeTeacher
from emu_embodied.world_model import WorldModel

METHODS: dict[str, dict[str, Any]] = {
    "policy": {"loop": "policy", "config": {"groups": 16}},
    "imagined": {"loop": "imagined", "config": {"groups": 16}},
    "planner": {"loop": "planner", "config": {"groups": 2}, "teacher": "true"},
    "cloning": {"loop": "planner", "config": {"groups": 2}, "teacher": "scripted"},
}
"""Method -> what differs from ``Budget.config``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What to run."""

    env: str
    """Environment id."""
    checkpoint: Path
    """The policy to begin with."""
    world: str = ""
    """Model to imagine in; the policy's own weights if left out."""
    verify: str = ""
    """Another engine's environment id in which every policy is measured, too."""
    methods: str = "policy,planner,imagined,cloning"
    """Of ``METHODS``, with commas between."""
    seeds: str = "0,1,2"
    """Seeds of the runs, with commas between."""
    budgets: str = "128,1280"
    """Real rollouts, rising, with commas between."""
    episodes: int = 100
    """Held-out episodes of a figure [episodes]."""
    first: int = 0
    """Their first reset seed."""
    cells: int | None = None
    """Stop after so many new cells."""
    max_minutes: float | None = None
    """Begin no cell after this time [min]."""
    config: RLConfig = field(default_factory=lambda: RLConfig(objective=GRPOConfig(group=8)))
    """The trainer's settings."""
    runs: Path
    """Folder of the runs."""
    out: Path
    """Folder of ``budget_<env>.json``, ``.csv``, ``.md`` and ``.png``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One figure of the table."""

    method: str
    seed: int
    rollouts: int
    solved: int
    episodes: int
    minutes: float
    """Wall time of the run up to here [min]."""
    verified: int | None = None
    """Episodes solved in the other engine, of as many."""
    note: str = ""
    """Why the run stopped before its budget; what it had saved last was measured then."""


def measure(world: WorldModel, env_id: str, seeds: range) -> int:
    """How many of these episodes the policy solves at temperature 0, all of them in one batch at a time."""
    simulators = partial(make, image_size=world.config.image_size, cameras=world.config.cameras)
    solved = 0
    with open_crew(simulators, 0) as crew:
        for part in range(0, len(seeds), 25):
            starts = [Start(i, env_id, seed) for i, seed in enumerate(seeds[part : part + 25])]
            played = roll_out(
                crew, Actor(world), starts, group=1, temperature=0.0, seed=0, number=0, lanes=1, spent=Spent()
            )
            solved += sum(rollout.success for rollout in played)
    return solved


def run_cell(budget: Budget, method: str, seed: int, rollouts: int) -> Cell:
    """Train to a budget, from where the run stands, and measure."""
    row, out = METHODS[method], budget.runs / f"{budget.env}-{method}-{seed}"
    config = replace(budget.config, seed=seed, rollouts=rollouts, **row["config"])
    teacher = row.get("teacher", "")
    settings = RLSettings(
        env_ids=(budget.env,), loop=row["loop"], config=config, teacher=teacher, imagined=ImaginedConfig()
    )
    world = WorldModel.from_pretrained(budget.checkpoint)
    simulators: SimulatorFactory = partial(make, image_size=world.config.image_size, cameras=world.config.cameras)
    imaginer = WorldModel.from_pretrained(budget.world or budget.checkpoint) if row["loop"] == "imagined" else None
    note = ""
    try:
        result = train_rl(
            settings, world, simulators, out, resume=True, start=str(budget.checkpoint), imaginer=imaginer,
            make_teacher=_teacher(teacher), on_line=partial(_say, method, seed),
        )  # fmt: skip
        if result.stopped == "signal":
            raise KeyboardInterrupt  # its cell is finished by the next call
    except TrainingFailed as error:
        note = str(error)
        kept = out if (out / "world.json").exists() else budget.checkpoint
        world = WorldModel.from_pretrained(kept)
    minutes = read_metrics(out / METRICS)[-1]["seconds"] / 60
    return replace(_measured(budget, world, method, seed, rollouts, minutes), note=note)


def _measured(budget: Budget, world: WorldModel, method: str, seed: int, rollouts: int, minutes: float) -> Cell:
    world.backbone.requires_grad_(False)
    seeds = range(budget.first, budget.first + budget.episodes)
    solved = measure(world, budget.env, seeds)
    verified = measure(world, budget.verify, seeds) if budget.verify else None
    return Cell(
        method=method, seed=seed, rollouts=rollouts, solved=solved, episodes=len(seeds), minutes=minutes,
        verified=verified,
    )  # fmt: skip


def _teacher(name: str) -> MakeTeacher | None:
    if not name:
        return None
    spec = PolicySpec(name=name, objective="reward")
    return lambda simulator, seed: make_policy(spec, simulator, seed=seed)


def _say(method: str, seed: int, line: dict[str, float]) -> None:
    shown = " ".join(f"{name} {line[name]:.3g}" for name in ("success", "reward", "kl", "entropy") if name in line)
    print(f"{method} {seed}: {line['rollouts']:.0f} rollouts, {shown}, {line['seconds']:.0f} s", flush=True)


def wanted(budget: Budget) -> Iterator[tuple[str, int, int]]:
    """Method, seed and budget of every cell, the small budgets first."""
    for rollouts in (int(part) for part in budget.budgets.split(",")):
        for method in budget.methods.split(","):
            for seed in (int(part) for part in budget.seeds.split(",")):
                yield method, seed, rollouts


def known_cells(path: Path, budget: Budget) -> list[Cell]:
    """Cells of an earlier call.

    Raises:
        ValueError: if the file is of another checkpoint, environment or episodes.
    """
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    for name, value in _identity(budget).items():
        if content["settings"].get(name) != value:
            raise ValueError(f"{path} has {name} {content['settings'].get(name)!r}, asked is {value!r}: another --out")
    return [Cell(**cell) for cell in content["cells"]]


def _identity(budget: Budget) -> dict[str, Any]:
    return {
        "env": budget.env, "weights": weights_hash(str(budget.checkpoint)), "episodes": budget.episodes,
        "first": budget.first, "verify": budget.verify,
    }  # fmt: skip


def _stem(budget: Budget) -> Path:
    return budget.out / f"budget_{budget.env}"


def write(budget: Budget, cells: Sequence[Cell]) -> None:
    """The files of the table as it stands."""
    stem = _stem(budget)
    curves = [
        {"method": method, "seed": seed, **{name: line[name] for name in ("rollouts", "success")}}
        for method in METHODS
        for seed in sorted({cell.seed for cell in cells})
        for line in read_metrics(budget.runs / f"{budget.env}-{method}-{seed}" / METRICS)
    ]
    content = {
        "settings": {**_identity(budget), "config": asdict(budget.config), "methods": METHODS},
        "cells": [asdict(cell) for cell in cells],
        "meta": meta_dict(make_meta(checkpoint=str(budget.checkpoint))),
    }
    write_json(stem.with_suffix(".json"), content)

    def write_csv(aside: Path) -> None:
        with aside.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("what", "method", "seed", "rollouts", "success", "low", "high", "episodes"))
            for cell in cells:
                low, high = wilson(cell.solved, cell.episodes)
                rate = cell.solved / cell.episodes
                writer.writerow(("held out", cell.method, cell.seed, cell.rollouts, rate, low, high, cell.episodes))
            for line in curves:
                writer.writerow(("training", *line.values(), "", "", ""))

    write_atomically(stem.with_suffix(".csv"), write_csv)
    rows = [asdict(cell) for cell in cells]
    asked = sorted({rollouts for _, _, rollouts in wanted(budget)} | {cell.rollouts for cell in cells} - {0})
    page = table(rows, tuple(METHODS), asked, budget.verify)
    write_atomically(stem.with_suffix(".md"), lambda aside: aside.write_text(page))
    draw_budget(rows, curves, budget.env, stem.with_suffix(".png"))


def main(budget: Budget) -> None:
    """Run what is missing."""
    torch.set_num_threads(1)
    began = time.monotonic()
    cells = known_cells(_stem(budget).with_suffix(".json"), budget)
    if not any(cell.method == "base" for cell in cells):
        base = WorldModel.from_pretrained(budget.checkpoint)
        cells.append(_measured(budget, base, "base", 0, 0, 0.0))
        write(budget, cells)
    new = 0
    for method, seed, rollouts in wanted(budget):
        if any((cell.method, cell.seed, cell.rollouts) == (method, seed, rollouts) for cell in cells):
            continue
        late = budget.max_minutes is not None and time.monotonic() - began > 60 * budget.max_minutes
        if late or (budget.cells is not None and new >= budget.cells):
            break
        cells.append(run_cell(budget, method, seed, rollouts))
        print(cells[-1], flush=True)
        new += 1
        write(budget, cells)
    print(table([asdict(cell) for cell in cells], tuple(METHODS), [128, 1280], budget.verify))


if __name__ == "__main__":
    main(tyro.cli(Budget, description=__doc__))
