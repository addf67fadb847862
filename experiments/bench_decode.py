"""How fast is parallel decoding? Imagined states per second against token by token and transformers, in one run.

Every way decodes with the same weights: DiDA in 1, 2, 4 ... passes and our next-token decoder through
``WorldModel.imagine`` (several candidates behind one observed state), and ``generate`` of transformers' Qwen3 (its
prompt already read, every sequence with its own copy of it). Beside each figure stand the floors of arithmetic and
bandwidth, measured in the same run. Rows are kept as they come; the same command goes on where it was stopped.

python -m emu_embodied.experiments.bench_decode --json results/decode.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

from emu_embodied.decode.order import Order
from emu_embodied.experiments.bench_backbone import qwen3_twin, theirs
from emu_embodied.experiments.decode_floors import (
    Machine,
    best_seconds,
    layer_parameters,
    measure_machine,
    work_of_state,
)
from emu_embodied.experiments.decode_speed_figure import draw_speed
from emu_embodied.experiments.untrained import untrained
from emu_embodied.files import write_json
from emu_embodied.hardware import pick_device, pick_dtype, usable_memory_gb
from emu_embodied.models.cache import KVCache
from emu_embodied.models.config import EmuConfig
from emu_embodied.models.masks import causal_then_parallel
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.presets import preset
from emu_embodied.provenance import make_meta, meta_dict
from emu_embodied.records import Observation
from emu_embodied.world_model import WorldModel

LAYER = "34B layer"
"""Name of the size that is one layer of Emu3.5, scaled to all its layers and to the tokens of a 1024-px frame."""
LAYERS, FRAME_TOKENS = 64, 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeBench:
    """What to measure."""

    sizes: str = f"nano,small,base,{LAYER}"
    """Presets with random weights, with commas between; and ``34B layer``, see ``LAYER``."""
    checkpoint: str | None = None
    """Trained weights, a shipped name or a folder: instead of random ones for the preset of that name, or beside it."""
    env: str | None = None
    """Environment in which changed-token accuracy is measured for the checkpoint; none without it."""
    recorded: int = 12
    """Episodes recorded for that [episodes]."""
    batches: str = "1,8,64,512"
    """Candidates imagined together, with commas between."""
    passes: str = "1,2,4,8"
    """Parallel passes of a state, with commas between."""
    path: str = "uniform"
    """Noise process; of the checkpoint its own first one."""
    order: Order = "random"
    """What settles first when there are several passes. With ``random`` and the default process nothing is skipped."""
    horizon: int = 3
    """States imagined one after another: all but the last also have to be written into the cache."""
    repeats: int = 3
    """Measurements of each kind; the fastest counts."""
    row_seconds: float = 60.0
    """A row that is foreseen to take longer is left out and says so; no measurement is repeated beyond it [s]."""
    minutes: float = 60.0
    """No row is begun after that; the same command goes on later [min]."""
    layer_tokens: int = 256
    """Tokens of a frame that the single layer is measured with [tokens]."""
    threads: int = 1
    """CPU threads. With one, CPU time is measured instead of wall time."""
    device: str = "auto"
    """Where to compute."""
    dtype: str = "auto"
    """Of weights and activations: float32, bfloat16."""
    json: Path | None = None
    """Where to keep the rows; a figure is drawn beside it (SVG and PNG)."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row to measure; ``passes`` is 0 where it means nothing."""

    size: str
    batch: int
    method: str
    passes: int = 0

    @property
    def key(self) -> tuple[str, int, str, int]:
        """What identifies its row."""
        return (self.size, self.batch, self.method, self.passes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way of decoding at one size and batch. A frame is a state: its frame tokens, proprio, reward and success."""

    device: str
    """Torch's name of the device, and the dtype."""
    size: str
    """Preset, checkpoint, or ``LAYER``."""
    batch: int
    """Candidates."""
    tokens_per_frame: int
    """Tokens of a state."""
    method: str
    """``autoregressive``, ``dida`` or ``transformers``."""
    passes: int
    """Parallel passes; 0 for the others."""
    frames_per_s: float | None
    """Imagined states per second, all candidates counted; None where it was left out."""
    latency_s: float | None
    """Time of one state for the whole batch [s]."""
    floor_arithmetic_s: float
    """What its products take at the measured speed of large ones [s]."""
    floor_bandwidth_s: float
    """What reading its weights and keys from memory takes at the measured speed [s]; caches may beat it."""
    ratio_vs_ar: float | None = None
    """Speed over that of ``autoregressive`` at the same size and batch."""
    ratio_vs_hf: float | None = None
    """Speed over that of ``transformers``."""
    changed_token_accuracy: float | None = None
    """On recorded episodes, mean over ``horizon`` blocks; None for random weights."""
    note: str = ""
    """How the figure came about, or why there is none."""


class Subject:
    """One size, ready to be measured."""

    def __init__(self, size: str, config: DecodeBench, device: torch.device, dtype: torch.dtype) -> None:
        self.trained = size == config.checkpoint
        if self.trained:
            world = WorldModel.from_pretrained(size, device)
        else:
            world = untrained(preset(size), paths=(config.path,))
        world.backbone.to(device, dtype)
        self.world, self.config, self.device = world, config, device
        rng = np.random.default_rng(0)
        side = world.config.image_size
        frames = {name: rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for name in world.config.cameras}
        middle = np.array([(field.low + field.high) / 2 for field in world.config.proprio], np.float32)
        self.belief = world.observe([Observation(frames, middle, "push")])
        self.horizon = min(config.horizon, world.config.max_states - 1)

    def decoded(self, case: Case) -> WorldModel:
        """The world model behind a case's decoder."""
        if case.method == "autoregressive":
            return self.world.with_decoding("autoregressive")
        return self.world.with_decoding("dida", passes=case.passes, order=self.config.order)

    def seconds(self, case: Case) -> float:
        """Time of one state for the whole batch [s]."""
        if case.method == "transformers":
            return self._theirs(case.batch)
        world, layout = self.decoded(case), self.world.config
        draws = torch.Generator().manual_seed(0)
        shape = (case.batch, self.horizon, layout.block, layout.action_dim)
        actions_SHKA = (torch.rand(shape, generator=draws) * 2 - 1).to(self.device)

        def imagine() -> None:
            world.imagine(self.belief, actions_SHKA, torch.Generator().manual_seed(1))

        return best_seconds(imagine, self.config.repeats, self.device, self.config.row_seconds) / self.horizon

    def _theirs(self, batch: int) -> float:
        layout = self.world.layout
        generate = theirs(qwen3_twin(self.world.backbone), None)
        ids = torch.randint(layout.vocabulary.size, (1, self.belief.cache.length + layout.action_tokens))
        prompt, tokens = ids.expand(batch, -1).to(self.device), layout.state_tokens
        # The first token costs reading the prompt, which is not what is compared.
        first, whole = (
            best_seconds(partial(generate, prompt, new), self.config.repeats, self.device, self.config.row_seconds)
            for new in (1, tokens)
        )
        return (whole - first) * tokens / (tokens - 1)

    def floors(self, case: Case, machine: Machine, size: int) -> tuple[float, float]:
        """Of arithmetic and bandwidth [s]."""
        work = work_of_state(
            self.world.backbone.config,
            self.world.layout,
            batch=case.batch,
            context=self.belief.cache.length,
            passes=case.passes,
            horizon=self.horizon,
            size=size,
        )
        return work.seconds(machine)

    def gigabytes(self, case: Case, size: int) -> float:
        """Memory for keys, values and logits of all candidates [GB]."""
        shape, layout = self.world.backbone.config, self.world.layout
        tokens = layout.length(self.world.config.max_states)
        cache = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * tokens * size
        logits = 2 * 4 * len(layout.frame_slots) * layout.vocabulary.vision.size
        return case.batch * (cache + logits) / 1e9

    def measure(self, case: Case, machine: Machine, dtype: torch.dtype, accuracy: float | None) -> Row:
        """One row."""
        arithmetic, bandwidth = self.floors(case, machine, dtype.itemsize)
        row = Row(
            device=f"{self.device.type} {str(dtype).removeprefix('torch.')}",
            size=case.size,
            batch=case.batch,
            tokens_per_frame=self.world.layout.state_tokens,
            method=case.method,
            passes=case.passes,
            frames_per_s=None,
            latency_s=None,
            floor_arithmetic_s=arithmetic,
            floor_bandwidth_s=bandwidth,
            changed_token_accuracy=accuracy,
        )
        foreseen = 2 * (self.horizon + 1) * max(arithmetic, bandwidth)
        if foreseen > self.config.row_seconds:
            return replace(row, note=f"left out: foreseen to take {foreseen:.0f} s")
        if self.gigabytes(case, dtype.itemsize) > 0.6 * _memory_gb(self.device):
            return replace(
                row, note=f"left out: needs {self.gigabytes(case, dtype.itemsize):.0f} GB for its candidates"
            )
        seconds = self.seconds(case)
        return replace(row, frames_per_s=case.batch / seconds, latency_s=seconds)


def accuracies(config: DecodeBench, cases: list[Case]) -> dict[tuple[str, int], float]:
    """Changed-token accuracy of the checkpoint for each (method, passes), on freshly recorded episodes."""
    from emu_embodied.data.recording import record_episode
    from emu_embodied.envs.registry import make
    from emu_embodied.metrics.horizons import record_fresh, score_horizons
    from emu_embodied.policies.behaviours import BEHAVIOURS

    assert config.checkpoint is not None and config.env is not None
    world = WorldModel.from_pretrained(config.checkpoint, pick_device(config.device))
    simulator = make(config.env, image_size=world.config.image_size, cameras=world.config.cameras)
    try:
        episodes = record_fresh(simulator, BEHAVIOURS, record_episode, config.env, config.recorded, 0)
    finally:
        simulator.close()
    found = {}
    for method, passes in dict.fromkeys((c.method, c.passes) for c in cases if c.size == config.checkpoint):
        if method == "transformers":
            continue
        chosen = (
            world.with_decoding("autoregressive")
            if method == "autoregressive"
            else world.with_decoding("dida", passes=passes, order=config.order)
        )
        horizon = min(config.horizon, world.config.max_states - 1, *(len(episode) for episode in episodes))
        rows = score_horizons(chosen, episodes, horizon, seed=0).rows
        shares = [row.changed_token_accuracy for row in rows if row.changed_token_accuracy is not None]
        found[method, passes] = float(np.mean(shares))
    return found


@torch.inference_mode()
def measure_layer(config: DecodeBench, machine: Machine, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """One layer of Emu3.5's shape, one candidate: a token behind a cache, and a part of a frame in one pass."""
    shape = EmuConfig(num_hidden_layers=1, vocab_size=64, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    name = f"{device.type} {str(dtype).removeprefix('torch.')}"
    with torch.device("meta"):
        model = EmuForCausalLM(shape)
    model = model.to(dtype).to_empty(device=device).eval()
    for parameter in model.parameters():
        parameter.fill_(0.01)
    cache = KVCache(shape, 1, 2 * FRAME_TOKENS, device=device, dtype=dtype)
    cache.advance(FRAME_TOKENS)

    def run(tokens: int) -> None:
        embeds = torch.ones(1, tokens, shape.hidden_size, device=device, dtype=dtype)
        mask = causal_then_parallel(0, tokens, device) if tokens > 1 else None
        model.core(embeds, torch.arange(tokens, device=device) + FRAME_TOKENS, mask, cache, keep=0)

    part = config.layer_tokens
    token, some = (best_seconds(partial(run, n), config.repeats, device, config.row_seconds) for n in (1, part))
    scaled = {0: token * LAYERS * FRAME_TOKENS}
    scaled |= {passes: passes * some * LAYERS * FRAME_TOKENS / part for passes in _numbers(config.passes)}
    weights = layer_parameters(shape) * LAYERS
    rows = []
    for passes, seconds in scaled.items():
        rows.append(
            Row(
                device=name,
                size=LAYER,
                batch=1,
                tokens_per_frame=FRAME_TOKENS,
                method="dida" if passes else "autoregressive",
                passes=passes,
                frames_per_s=1 / seconds,
                latency_s=seconds,
                floor_arithmetic_s=2 * weights * FRAME_TOKENS * max(passes, 1) / machine.gflop_per_s / 1e9,
                floor_bandwidth_s=weights * dtype.itemsize * (passes or FRAME_TOKENS) / machine.gb_per_s / 1e9,
                note=f"one layer x {LAYERS}, {part if passes else 1} token(s) behind {FRAME_TOKENS} scaled to "
                f"{FRAME_TOKENS}; no head, and nothing is written",
            )
        )
    return rows


def list_cases(config: DecodeBench) -> list[Case]:
    """All rows, small ones first."""
    sizes = [name.strip() for name in config.sizes.split(",") if name.strip() and name.strip() != LAYER]
    if config.checkpoint is not None and config.checkpoint not in sizes:
        sizes.insert(0, config.checkpoint)

    def of(size: str) -> Iterator[Case]:
        for batch in _numbers(config.batches):
            yield Case(size, batch, "autoregressive")
            yield Case(size, batch, "transformers")
            yield from (Case(size, batch, "dida", passes) for passes in _numbers(config.passes))

    return [case for size in sizes for case in of(size)]


def compare(rows: list[Row]) -> list[Row]:
    """Fill in the ratios."""
    speeds = {(row.size, row.batch, row.method): row.frames_per_s for row in rows if not row.passes}

    def ratio(row: Row, method: str) -> float | None:
        other = speeds.get((row.size, row.batch, method))
        return None if other is None or row.frames_per_s is None else row.frames_per_s / other

    return [
        replace(row, ratio_vs_ar=ratio(row, "autoregressive"), ratio_vs_hf=ratio(row, "transformers")) for row in rows
    ]


def format_rows(rows: list[Row]) -> str:
    """A table for people."""
    lines = [f"{'size':10s} {'batch':>5s} {'method':>16s} {'states/s':>10s} {'floor':>10s} {'vs AR':>7s} {'vs HF':>7s}"]
    for row in rows:
        method = f"dida x{row.passes}" if row.passes else row.method
        floor = row.batch / max(row.floor_arithmetic_s, 1e-12)
        cells = [f"{row.size:10s}", f"{row.batch:5d}", f"{method:>16s}", _cell(row.frames_per_s, 10), _cell(floor, 10)]
        cells += [_cell(row.ratio_vs_ar, 7), _cell(row.ratio_vs_hf, 7), row.note]
        lines.append(" ".join(cells).rstrip())
    return "\n".join(lines)


def main(config: DecodeBench) -> None:
    """Measure, print a table, write JSON and a figure."""
    started = time.monotonic()
    torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    cases = list_cases(config)
    settings = {k: v for k, v in asdict(config).items() if k not in ("json", "minutes", "sizes", "batches", "passes")}
    rows = _kept(config.json, settings)
    known = {(row.size, row.batch, row.method, row.passes) for row in rows}
    machine = measure_machine(device, dtype)
    print(f"{machine.gflop_per_s:.0f} GFLOP/s, {machine.gb_per_s:.1f} GB/s on {device}, {config.threads} thread(s)")
    judged = accuracies(config, cases) if config.checkpoint is not None and config.env is not None else {}

    def keep() -> None:
        if config.json is not None:
            meta = meta_dict(make_meta(seed=0, machine=asdict(machine)))
            write_json(config.json, {"rows": [asdict(r) for r in compare(rows)], "settings": settings, "meta": meta})

    subject: Subject | None = None
    measured = ""
    for case in tqdm(cases, desc="rows", unit="row"):
        if case.key in known:
            continue
        if time.monotonic() - started > 60 * config.minutes:
            print(f"stopped after {config.minutes:g} minutes: the same command goes on with the other rows")
            break
        if subject is None or measured != case.size:
            subject, measured = Subject(case.size, config, device, dtype), case.size
        accuracy = judged.get((case.method, case.passes)) if subject.trained else None
        rows.append(subject.measure(case, machine, dtype, accuracy))
        keep()
    if LAYER in config.sizes and not any(row.size == LAYER for row in rows):
        needed = layer_parameters(EmuConfig()) * dtype.itemsize * 1.5 / 1e9
        if needed < _memory_gb(device):
            rows += measure_layer(config, machine, device, dtype)
            keep()
        else:
            print(f"{LAYER}: left out, needs {needed:.0f} GB")
    rows = compare(rows)
    print(format_rows(rows))
    if config.json is not None and rows:
        title = f"{rows[0].device}, {config.threads} thread(s), order {config.order}"
        draw_speed([asdict(row) for row in rows], title, config.json.with_suffix(""))


def _kept(path: Path | None, settings: dict[str, Any]) -> list[Row]:
    """Rows of an earlier run.

    Raises:
        ValueError: if the file was written with other settings.
    """
    if path is None or not path.exists():
        return []
    content = json.loads(path.read_text())
    if content["settings"] != json.loads(json.dumps(settings)):
        raise ValueError(f"{path} holds rows of other settings: give another --json, or remove it")
    return [Row(**row) for row in content["rows"]]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _cell(value: float | None, width: int) -> str:
    return f"{'-' if value is None else f'{value:.3g}':>{width}s}"


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return usable_memory_gb()


if __name__ == "__main__":
    main(tyro.cli(DecodeBench, description=__doc__))
