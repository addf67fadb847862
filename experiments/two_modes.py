"""A future that branches: does parallel decoding keep both branches, and does it keep them apart?

A scene whose next frame is one of two, each with probability 1/2; they differ in half of their tokens. A tiny model
learns it, by all noise processes at once. Sampling then has two ways to fail: *collapse* (one of the frames never
comes) and *mixture* (a frame with tokens of both, which never happened): tokens that are decoded in one pass do not
know of each other, so one pass mixes, and more passes mix less.

python -m emu_embodied.experiments.two_modes --out results/two_modes
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from emu_embodied.data.batches import WindowBatch
from emu_embodied.experiments.untrained import random_windows, untrained
from emu_embodied.files import write_atomically, write_json
from emu_embodied.models.ibq import IBQConfig
from emu_embodied.presets import Preset
from emu_embodied.provenance import make_meta, meta_dict
from emu_embodied.train.adapt import dida_loss
from emu_embodied.train.pretrain import WorldTraining
from emu_embodied.train.rollout import imagined
from emu_embodied.world_model import WorldModel

PRESET = Preset(
    layers=2, width=48, mlp=96, heads=2, kv_heads=1, head_dim=24, image_size=16, block=1, text_length=4,
    action_bins=4, state_bins=8, reward_bins=4, context_states=1, max_states=2,
    ibq=IBQConfig(
        patch=2, ch=8, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resolution=16, z_channels=4, embed_dim=4,
        n_embed=24, norm_groups=4,
    ),
)  # fmt: skip
"""16 tokens a frame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoModes:
    """What to train and to measure."""

    paths: str = "uniform,metric,state_coupled,mask"
    """Noise processes, with commas between."""
    steps: int = 1000
    """Training steps."""
    batch: int = 16
    """Windows in a batch [windows]."""
    passes: str = "1,2,4,8,16"
    """Passes to decode with, with commas between."""
    temperatures: str = "1,0"
    """Sampling temperatures, with commas between; 0 takes the most likely token, so that only the noise
    that decoding starts from can choose a frame."""
    samples: int = 512
    """Frames decoded for each row, in 32 rounds of noise."""
    seed: int = 0
    """Of weights, training and sampling."""
    threads: int = 1
    """CPU threads [threads]."""
    out: Path | None = None
    """Folder for ``two_modes.csv`` and ``two_modes.json``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeRow:
    """What one way of decoding shows of the two frames."""

    method: str
    """``autoregressive`` or a noise process."""
    passes: int
    """Parallel passes; 0 for next token."""
    temperature: float
    first: float
    """Share of decoded frames that are exactly the first of both."""
    second: float
    """Share that are exactly the second."""
    mixed: float
    """Share of all others."""
    leaning: float
    """Share of frames with more tokens of the first than of the second (ties count half)."""

    @property
    def rarer(self) -> float:
        """Share of the frame that comes more rarely, by leaning: 0.5 is right, 0 is collapse."""
        return min(self.leaning, 1 - self.leaning)


@dataclass(frozen=True, slots=True)
class TwoFrames:
    """The scene.

    Attributes:
        window: one window; its second state is still to be chosen.
        frames_2N: codes of the two frames.
    """

    window: WindowBatch
    frames_2N: torch.Tensor

    @property
    def differs_N(self) -> torch.Tensor:
        """Where the frames differ."""
        return self.frames_2N[0] != self.frames_2N[1]

    def batch(self, count: int, generator: torch.Generator) -> WindowBatch:
        """Windows, each with one of both frames."""
        rows = torch.zeros(count, dtype=torch.long)
        window = WindowBatch(*(getattr(self.window, name)[rows] for name in WindowBatch.__slots__))
        chosen = self.frames_2N[torch.randint(2, (count,), generator=generator)]
        return replace(window, codes_BTN=torch.stack([window.codes_BTN[:, 0], chosen], 1))


def make_scene(world: WorldModel, seed: int) -> TwoFrames:
    """A random state and two frames that may follow it; in every other token both are the state's own."""
    window = random_windows(world, 1, seed)
    now_N = window.codes_BTN[0, 0]
    moving_N = torch.arange(len(now_N)) % 2 == 0
    size = world.config.codebook
    frames = [torch.where(moving_N, (now_N + step) % size, now_N) for step in (size // 3, 2 * size // 3)]
    return TwoFrames(window, torch.stack(frames))


def train(world: WorldModel, scene: TwoFrames, config: TwoModes) -> float:
    """Adapt a model to the scene by all its paths; returns the last loss."""
    paths = [world.path(name) for name in world.config.paths]
    training = WorldTraining(context_noise=0.0)
    backbone = world.backbone.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=5e-3, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=config.steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(config.seed)
    loss = torch.tensor(0.0)
    for _ in tqdm(range(config.steps), desc="two modes", unit="step"):
        loss = dida_loss(world, scene.batch(config.batch, generator), training, paths, generator).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    backbone.requires_grad_(False).eval()
    return float(loss.detach())


@torch.inference_mode()
def mode_shares(world: WorldModel, scene: TwoFrames, method: str, passes: int, samples: int, seed: int) -> ModeRow:
    """How often a decoder shows which frame."""
    generator = torch.Generator().manual_seed(seed)
    rounds = min(32, samples)
    batch = scene.batch(samples // rounds, generator)
    decoded = [imagined(world, world.decoder, batch, generator).codes_BTN[:, 1] for _ in range(rounds)]
    codes_SN = torch.cat(decoded)
    first_S, second_S = ((codes_SN == frame).all(-1).float() for frame in scene.frames_2N)
    moving_SM = codes_SN[:, scene.differs_N]
    votes = [(moving_SM == frame[scene.differs_N]).sum(-1) for frame in scene.frames_2N]
    leaning_S = (votes[0] > votes[1]).float() + 0.5 * (votes[0] == votes[1]).float()
    first, second = float(first_S.mean()), float(second_S.mean())
    return ModeRow(
        method=method,
        passes=passes,
        temperature=world.config.temperature,
        first=first,
        second=second,
        mixed=1 - first - second,
        leaning=float(leaning_S.mean()),
    )


def measure(config: TwoModes) -> list[ModeRow]:
    """Train, then decode in every way."""
    world = untrained(PRESET, paths=tuple(config.paths.split(",")), seed=config.seed)
    scene = make_scene(world, config.seed)
    train(world, scene, config)
    rows = []
    for temperature in (float(part) for part in config.temperatures.split(",")):
        sequential = world.with_decoding("autoregressive", temperature=temperature)
        rows.append(mode_shares(sequential, scene, "autoregressive", 0, config.samples, config.seed))
        for name in world.config.paths:
            for passes in (int(part) for part in config.passes.split(",")):
                other = world.with_decoding("dida", path=name, passes=passes, temperature=temperature)
                rows.append(mode_shares(other, scene, name, passes, config.samples, config.seed))
    return rows


def write_rows(out: Path, rows: Sequence[ModeRow], config: TwoModes) -> None:
    """Write ``two_modes.csv`` and ``two_modes.json``."""

    def write(aside: Path) -> None:
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(ModeRow)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)

    write_atomically(out / "two_modes.csv", write)
    meta = make_meta(seed=config.seed, steps=config.steps, samples=config.samples)
    write_json(out / "two_modes.json", {"rows": [asdict(row) for row in rows], "meta": meta_dict(meta)})


def main(config: TwoModes) -> None:
    """Measure, print a table, write it."""
    torch.set_num_threads(config.threads)
    rows = measure(config)
    print(f"{'method':15s} {'passes':>6s} {'T':>4s} {'first':>6s} {'second':>6s} {'mixed':>6s} {'leaning':>7s}")
    for row in rows:
        print(
            f"{row.method:15s} {row.passes:6d} {row.temperature:4.1f} {row.first:6.2f} {row.second:6.2f} "
            f"{row.mixed:6.2f} {row.leaning:7.2f}"
        )
    if config.out is not None:
        write_rows(config.out, rows, config)


if __name__ == "__main__":
    main(tyro.cli(TwoModes))
