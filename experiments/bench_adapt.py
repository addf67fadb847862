"""Training tokens per second of DiDA against plain next-token training: same weights, same windows, one run.

All tokens of a batch count, in DiDA the noisy copies too. Weights and windows are random; a step is loss, gradient and
optimizer.

python -m emu_embodied.experiments.bench_adapt --json results/bench_adapt.json
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import tyro

from emu_embodied.experiments.untrained import random_windows, untrained
from emu_embodied.files import write_json
from emu_embodied.presets import preset
from emu_embodied.provenance import make_meta, meta_dict
from emu_embodied.train.loop import LossOutput
from emu_embodied.train.optimizers import build_optimizer
from emu_embodied.train.parallel import dida_loss
from emu_embodied.train.pretrain import WorldTraining, next_token_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptBench:
    """What to measure."""

    presets: str = "nano"
    """Sizes, with commas between."""
    paths: str = "uniform;metric;state_coupled;mask;uniform,metric,state_coupled,mask"
    """Noise processes, with semicolons between runs and commas between those of one run."""
    batch: int = 8
    """Windows in a batch [windows]."""
    repeats: int = 5
    """Steps of each kind, taken in turns; the fastest counts, as whatever else runs can only slow one down."""
    threads: int = 1
    """CPU threads [threads]."""
    device: str = "cpu"
    """Where to compute."""
    flex: bool = False
    """Also measure attention by FlexAttention (on a GPU)."""
    json: Path | None = None
    """Where to write the rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One kind of training at one size."""

    preset: str
    batch: int
    who: str
    """``next token``, or ``dida`` with its noise."""
    tokens: int
    """Tokens in a batch, copies included [tokens]."""
    seconds: float
    """A step [s]."""
    tokens_per_second: float
    """[tokens/s]"""
    of_next_token: float
    """This rate over that of next-token training."""


def bench(name: str, config: AdaptBench) -> list[Row]:
    """Measure all kinds of training at one size."""
    device = torch.device(config.device)
    world = untrained(preset(name))
    backbone = world.backbone.to(device).requires_grad_(True).train()
    batch = random_windows(world, config.batch).to(device)
    training = WorldTraining(batch=config.batch, source_share=0.5)
    optimizer = build_optimizer(training.loop, backbone)
    kinds: dict[str, Callable[[torch.Generator], LossOutput]] = {
        "next token": partial(next_token_loss, world, batch, training)
    }
    for flex in (False, True) if config.flex else (False,):
        chosen = replace(training, flex_attention=flex)
        for names in config.paths.split(";"):
            paths = [world.path(path.strip()) for path in names.split(",")]
            kinds[f"dida {names}{' flex' if flex else ''}"] = partial(dida_loss, world, batch, chosen, paths)
    # On one thread of a CPU other programs' time does not count.
    clock = time.process_time if device.type == "cpu" and config.threads == 1 else time.perf_counter
    best = dict.fromkeys(kinds, float("inf"))
    tokens = dict.fromkeys(kinds, 0)
    for repeat in range(config.repeats + 1):  # the first is a warm-up
        for who, loss in kinds.items():
            start = clock()
            output = loss(torch.Generator().manual_seed(repeat))
            optimizer.zero_grad(set_to_none=True)
            output.loss.backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:
                best[who] = min(best[who], clock() - start)
            tokens[who] = output.items
    plain = tokens["next token"] / best["next token"]
    return [
        Row(
            preset=name,
            batch=config.batch,
            who=who,
            tokens=tokens[who],
            seconds=best[who],
            tokens_per_second=tokens[who] / best[who],
            of_next_token=tokens[who] / best[who] / plain,
        )
        for who in kinds
    ]


def main(config: AdaptBench) -> None:
    """Measure, print a table, write JSON."""
    torch.set_num_threads(config.threads)
    print(f"{'preset':8s} {'batch':>5s} {'who':50s} {'tokens':>7s} {'s':>7s} {'tokens/s':>9s} {'ratio':>6s}")
    rows: list[Row] = []
    for name in config.presets.split(","):
        for row in bench(name.strip(), config):
            rows.append(row)
            print(
                f"{row.preset:8s} {row.batch:5d} {row.who:50s} {row.tokens:7d} {row.seconds:7.3f} "
                f"{row.tokens_per_second:9.0f} {row.of_next_token:6.2f}"
            )
    if config.json is not None:
        meta = make_meta(seed=0, device=config.device, threads=config.threads)
        write_json(config.json, {"rows": [asdict(row) for row in rows], "meta": meta_dict(meta)})


if __name__ == "__main__":
    main(tyro.cli(AdaptBench))
