"""Stage ``eye``: single pictures and where the simulator says that things are.

Shape letters: M states in memory, C cameras, H/W pixels, O numbers, E episodes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.data.split import held_out_episodes
from emu_embodied.models.eye import Eye, EyeConfig
from emu_embodied.models.ibq import to_pixels
from emu_embodied.tokens.states import ProprioTokenizer
from emu_embodied.train.loop import LoopConfig, LoopResult, LossOutput, run_loop
from emu_embodied.train.meta import write_training_meta


@dataclass(frozen=True, kw_only=True, slots=True)
class EyeTraining:
    """How an eye is trained."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=4000, learning_rate=1e-3, ema_decay=0.99, weight_decay=1e-4)
    )
    """Length, rate and device."""
    batch: int = 64
    """States in a batch [states]."""
    max_states: int = 80_000
    """States kept in memory, drawn at random from the dataset; 80,000 of one 64-px camera take 1 GB [states]."""
    held_out: float = 0.05
    """Share of episodes kept for evaluation."""
    eval_states: int = 1024
    """Held-out states the figures are measured on [states]."""
    knee: float = 0.05
    """Errors below it cost their square, larger ones themselves [half of a number's range]: a thing that is hidden must
    not outweigh a hundred that are nearly found."""


@dataclass(frozen=True, slots=True)
class Sights:
    """States in memory.

    Attributes:
        frames_MCHWC: uint8.
        objects_MO: float32, in the fields' units.
        episode_M: int64, number of each state's instruction.
        instructions: of the episodes.
    """

    frames_MCHWC: torch.Tensor
    objects_MO: torch.Tensor
    episode_M: torch.Tensor
    instructions: tuple[str, ...]

    def seen(self, eye: Eye, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What an eye says of some states, [B, O] with the ranges mapped to [-1, 1], and what it should say."""
        frames = self.frames_MCHWC[chosen].to(eye.device)
        pixels = to_pixels(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).flatten(1, 2)
        text_BL = eye.text([self.instructions[i] for i in self.episode_M[chosen].tolist()])
        wanted_BO = (self.objects_MO[chosen].to(eye.device) - eye.middle) / eye.half_range
        return eye(pixels, text_BL).float(), wanted_BO


def train_eye(
    store: EpisodeStore,
    cameras: tuple[str, ...],
    image_size: int,
    config: EyeTraining,
    out: Path,
    *,
    resume: bool,
) -> tuple[Eye, LoopResult]:
    """Train an eye for what a dataset tells of objects and keep it in ``out/eye``.

    Args:
        store: dataset.
        cameras: whose frames it reads, together.
        image_size: their side [pixels].
        config: how it is trained.
        out: the run's folder.
        resume: go on from an earlier run in ``out``.

    Returns:
        The eye with the averaged weights, on the training device, and how the run ended.

    Raises:
        ValueError: if ``out`` holds an eye and ``resume`` is off, or the dataset tells of no objects or lacks a camera.
        TrainingFailed: on NaN or divergence.
    """
    folder = out / "eye"
    if folder.exists() and not resume:
        raise ValueError(f"{folder} exists: pass --resume to train it further, or another --out")
    _check_dataset(store, cameras, image_size)
    held = held_out_episodes(len(store), config.held_out)
    generator = np.random.default_rng(config.loop.seed)
    frames = _read(store, np.flatnonzero(~held), cameras, config.max_states, generator)
    judged = _read(store, np.flatnonzero(held), cameras, config.eval_states, generator)
    low, high = np.quantile(frames.objects_MO.numpy(), [0.001, 0.999], axis=0).tolist()
    fields = ProprioTokenizer.fit(store.spec.objects, low, high, bins=2).fields
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.loop.seed)  # module initialisers know only the global generator
        eye = Eye(EyeConfig(cameras=cameras, image_size=image_size, objects=fields))

    def loss_fn(step: int, generator: torch.Generator) -> LossOutput:
        chosen = torch.randint(len(frames.objects_MO), (config.batch,), generator=generator)
        loss = F.smooth_l1_loss(*frames.seen(eye, chosen), beta=config.knee)
        return LossOutput(loss, items=config.batch)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        """Median error of every number in its unit; half of the things are found within it."""
        rows = torch.arange(len(judged.objects_MO))
        errors = []
        for part in rows.split(256):
            found_BO, wanted_BO = judged.seen(eye, part)
            errors.append((found_BO - wanted_BO).abs() * eye.half_range)
        median_O = torch.cat(errors).median(0).values
        return {f"error/{field.name}": float(e) for field, e in zip(fields, median_O, strict=True)}

    result = run_loop(
        config.loop,
        eye,
        loss_fn,
        out,
        stage="eye",
        resume=resume,
        describe={"data": store.data_hash, "cameras": list(cameras), "batch": config.batch, "eye": asdict(eye.config)},
        save=lambda step: eye.save_pretrained(folder),
        evaluate=evaluate,
        unit="states",
    )
    write_training_meta(out, "eye", config, store, result)
    return eye.eval().requires_grad_(False), result


def _read(
    store: EpisodeStore, episodes: np.ndarray, cameras: tuple[str, ...], limit: int, generator: np.random.Generator
) -> Sights:
    """Of every episode the same share of its states, at most ``limit`` in all."""
    states = sum(store.entries[i].length + 1 for i in episodes)
    share = min(1.0, limit / max(states, 1))
    frames: list[np.ndarray] = []
    objects: list[np.ndarray] = []
    of: list[np.ndarray] = []
    texts: list[str] = []
    for episode in tqdm(store.iter_valid(episodes), desc="read frames", total=len(episodes), unit="ep"):
        kept = np.flatnonzero(generator.random(len(episode) + 1) < share)
        frames.append(np.stack([episode.frames[camera][kept] for camera in cameras], 1))
        objects.append(episode.objects_TO[kept])
        of.append(np.full(len(kept), len(texts)))
        texts.append(episode.instruction)
    if not texts or not sum(map(len, of)):
        raise ValueError(f"{store.folder} has no readable episode: run `emu-embodied collect` first")
    return Sights(
        torch.from_numpy(np.concatenate(frames)),
        torch.from_numpy(np.concatenate(objects)).float(),
        torch.from_numpy(np.concatenate(of)),
        tuple(texts),
    )


def _check_dataset(store: EpisodeStore, cameras: tuple[str, ...], image_size: int) -> None:
    if not store.spec.objects:
        raise ValueError(f"{store.folder} does not tell where things are: collect it anew with this version")
    for camera in cameras:
        found = store.spec.cameras.get(camera)
        if found != (image_size, image_size):
            have = ", ".join(f"{name} {size[0]} x {size[1]}" for name, size in sorted(store.spec.cameras.items()))
            raise ValueError(f"{store.folder} has {have}; the preset reads {camera!r} at {image_size} x {image_size}")
