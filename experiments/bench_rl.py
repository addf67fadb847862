"""Throughput of reinforcement: env steps/s and tokens/s, and where the time goes, by processes and lanes.

With processes and two lanes, half of the rollouts are simulated while the network reads the other half; the update
waits for all of them, since a group's advantage needs its last member.

python -m emu_embodied.experiments.bench_rl --env PandaReach-v0 --json experiments/results/rl/bench.json
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import tyro

from emu_embodied.envs.registry import make
from emu_embodied.files import write_json
from emu_embodied.hardware import usable_cores
from emu_embodied.provenance import make_meta, meta_dict
from emu_embodied.train.grpo import GRPOConfig
from emu_embodied.train.reinforce import RLConfig
from emu_embodied.train.rl import RLSettings, train_rl
from emu_embodied.train.rl_log import METRICS, read_metrics
from emu_embodied.world_model import WorldModel


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRL:
    """What to measure."""

    env: str = "PandaReach-v0"
    """Environment id."""
    checkpoint: str = "nano"
    """Weights that act and are updated."""
    settings: str = "0x1,1x1,1x2"
    """processes x lanes, with commas between."""
    groups: int = 4
    """Groups of a round."""
    group: int = 8
    """Rollouts of a group."""
    rounds: int = 3
    """Rounds; the first, in which everything is made, is not counted."""
    threads: int = 1
    """CPU threads of the network [threads]."""
    json: Path | None = None
    """File for the rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One setting."""

    workers: int
    lanes: int
    rollouts_per_s: float
    env_steps_per_s: float
    tokens_per_s: float
    """Read and drawn by the network in rollouts, over the whole round."""
    simulator: float
    """Share of the time that the network waited for simulators."""
    inference: float
    """Share in which it acted."""
    update: float
    """Share in which it learned."""


def measure(bench: BenchRL, workers: int, lanes: int) -> Row:
    """Run some rounds and take the means of all but the first."""
    size = bench.groups * bench.group
    config = RLConfig(
        rollouts=bench.rounds * size, groups=bench.groups, objective=GRPOConfig(group=bench.group), workers=workers,
        lanes=lanes, resamples=0,
    )  # fmt: skip
    world = WorldModel.from_pretrained(bench.checkpoint)
    simulators = partial(make, image_size=world.config.image_size, cameras=world.config.cameras)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        train_rl(RLSettings(env_ids=(bench.env,), config=config), world, simulators, out, resume=False)
        lines = read_metrics(out / METRICS)
    seconds = (lines[-1]["seconds"] - lines[0]["seconds"]) / (len(lines) - 1)

    def mean(name: str) -> float:
        return sum(line[name] for line in lines[1:]) / (len(lines) - 1)

    return Row(
        workers=workers,
        lanes=lanes,
        rollouts_per_s=size / seconds,
        env_steps_per_s=mean("env_steps_per_s"),
        tokens_per_s=mean("tokens_per_s"),
        simulator=mean("share_simulator"),
        inference=mean("share_inference"),
        update=mean("share_update"),
    )


def main(bench: BenchRL) -> None:
    """Measure every setting and print the table."""
    torch.set_num_threads(bench.threads)
    rows: list[Row] = []
    for setting in bench.settings.split(","):
        workers, lanes = (int(part) for part in setting.split("x"))
        rows.append(measure(bench, workers, lanes))
        if bench.json is not None:
            settings = asdict(replace(bench, json=None))
            meta = make_meta(cores=usable_cores())
            write_json(bench.json, {"rows": [asdict(r) for r in rows], "settings": settings, "meta": meta_dict(meta)})
    print("| processes | lanes | rollouts/s | env steps/s | tokens/s | waiting | acting | learning |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        shares = " | ".join(f"{100 * share:.0f} %" for share in (row.simulator, row.inference, row.update))
        print(
            f"| {row.workers} | {row.lanes} | {row.rollouts_per_s:.2f} | {row.env_steps_per_s:.0f} | "
            f"{row.tokens_per_s:.0f} | {shares} |"
        )


if __name__ == "__main__":
    main(tyro.cli(BenchRL, description=__doc__))
