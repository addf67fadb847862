"""What a decision costs in numbers alone, against pictures: the same weights, belief and candidates, in turns.

python -m emu_embodied.experiments.bench_streams --checkpoint pusht --json results/bench_streams.json
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

from emu_embodied.experiments.untrained import random_observation
from emu_embodied.files import write_json
from emu_embodied.provenance import make_meta, meta_dict
from emu_embodied.world_model import WorldModel


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamBench:
    """What to measure."""

    checkpoint: str = "pusht"
    """A shipped name or a folder, of weights that know both streams."""
    plans: str = "32x3,32x5,64x5,256x5"
    """Candidates and blocks of one call, with commas between."""
    repeats: int = 3
    """Calls of each kind, taken in turns; the fastest counts, as whatever else runs can only slow one down."""
    threads: int = 1
    """CPU threads [threads]."""
    device: str = "cpu"
    """Where to compute."""
    json: Path | None = None
    """Where to write the rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One size of search."""

    candidates: int
    blocks: int
    state_tokens: tuple[int, int]
    """Tokens of a state with and without pictures [tokens]."""
    pictures_s: float
    """``imagine`` with frames [s]."""
    numbers_s: float
    """``imagine`` without [s]."""
    ratio: float
    """The first over the second."""


def bench(config: StreamBench) -> list[Row]:
    """Measure all sizes.

    Raises:
        ValueError: if the weights were not trained on numbers alone.
    """
    device = torch.device(config.device)
    world = WorldModel.from_pretrained(config.checkpoint, device=device)
    streams = [world, world.with_stream("numbers")]
    observation = random_observation(world)
    beliefs = [stream.observe([observation]) for stream in streams]
    # On one thread of a CPU other programs' time does not count.
    clock = time.process_time if device.type == "cpu" and config.threads == 1 else time.perf_counter
    rows = []
    for size in config.plans.split(","):
        candidates, blocks = (int(number) for number in size.split("x"))
        shape = (candidates, blocks, world.block, world.config.action_dim)
        plans = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        best = [float("inf")] * 2
        for repeat in range(config.repeats + 1):  # the first is a warm-up
            for which, (stream, belief) in enumerate(zip(streams, beliefs, strict=True)):
                start = clock()
                stream.imagine(belief, plans, torch.Generator(device).manual_seed(repeat))
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if repeat:
                    best[which] = min(best[which], clock() - start)
        tokens = (streams[0].layout.state_tokens, streams[1].layout.state_tokens)
        rows.append(
            Row(
                candidates=candidates,
                blocks=blocks,
                state_tokens=tokens,
                pictures_s=best[0],
                numbers_s=best[1],
                ratio=best[0] / best[1],
            )
        )
    return rows


def main(config: StreamBench) -> None:
    """Measure, print a table, write JSON."""
    torch.set_num_threads(config.threads)
    rows = bench(config)
    print(f"{'candidates x blocks':>19s} {'pictures [s]':>12s} {'numbers [s]':>11s} {'ratio':>6s}")
    for row in rows:
        size = f"{row.candidates} x {row.blocks}"
        print(f"{size:>19s} {row.pictures_s:12.3f} {row.numbers_s:11.3f} {row.ratio:6.1f}")
    if config.json is not None:
        meta = make_meta(seed=0, device=config.device, threads=config.threads)
        write_json(config.json, {"rows": [asdict(row) for row in rows], "meta": meta_dict(meta)})


if __name__ == "__main__":
    main(tyro.cli(StreamBench, description=__doc__))
