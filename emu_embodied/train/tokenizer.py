"""Stage ``tokenizer``: an IBQ trained on the frames of a dataset.

Two things keep a small one useful. Pixels that differ from the camera's median background (arm, objects) weigh more,
because they are few and they are what plans are about. And the codebook is started from what a trained encoder gives,
and unused codes are moved there, because a codebook that starts at random collapses to a handful of codes.

Shape letters: M frames in memory, B batch, H/W pixels, C cameras.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.data.split import held_out_episodes
from emu_embodied.models.ibq import IBQ, IBQConfig, code_usage, to_pixels
from emu_embodied.tokens.frames import IBQFrameTokenizer
from emu_embodied.train.loop import LoopConfig, LoopResult, LossOutput, TrainingFailed, run_loop, schedule_progress
from emu_embodied.train.meta import write_training_meta

_REWRITTEN = (
    "quantize.embedding.weight",
    "quant_conv.weight",
    "quant_conv.bias",
)
"""What ``IBQ.initialise_codebook`` sets by hand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerTraining:
    """How a vision tokenizer is trained."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=6000, learning_rate=2e-3, ema_decay=0.99, schedule="wsd")
    )
    """Length, rate and device."""
    batch: int = 16
    """Frames in a batch [frames]."""
    max_frames: int = 60_000
    """Frames kept in memory, drawn at random from the dataset; 60,000 of 64 px take 740 MB [frames]."""
    held_out: float = 0.05
    """Share of episodes kept for evaluation."""
    eval_frames: int = 512
    """Held-out frames the figures are measured on [frames]."""
    moving_weight: float = 8.0
    """Extra weight of a pixel that differs from its camera's background."""
    moving_threshold: int = 16
    """Difference from the background, in any colour channel, that counts as moving [levels of 255]."""
    l2_weight: float = 1.0
    """Weight of the squared error beside the absolute one."""
    edge_weight: float = 0.5
    """Weight of the error of differences between neighbouring pixels."""
    quantise_weight: float = 0.25
    """Weight of pulling codes and encoder outputs together."""
    entropy_weight: float = 0.02
    """Weight of the entropy gap (low when each position is sure and the batch as a whole is diverse)."""
    warmup_plain: int = 400
    """First steps, without quantisation; then the codebook starts from the encoder's outputs [steps]."""
    revive_every: int = 100
    """Steps between moving codes that were not used since the last time to where the encoder's outputs are [steps]."""
    revive_until: float = 0.7
    """Share of the run after which codes are left alone."""
    min_used: float = 0.05
    """Least share of the codebook that held-out frames must use; below, the run stops as collapsed."""
    collapse_grace: int = 500
    """Steps after the codebook's start before ``min_used`` is asked for [steps]."""


@dataclass(frozen=True, slots=True)
class FrameSet:
    """Frames in memory.

    Attributes:
        frames_MHWC: uint8 [M, height, width, 3].
        camera_M: int64, which camera took each.
        background_CHWC: uint8 [C, height, width, 3], median over time of each camera.
    """

    frames_MHWC: torch.Tensor
    camera_M: torch.Tensor
    background_CHWC: torch.Tensor

    def moving(self, chosen: torch.Tensor, threshold: int) -> torch.Tensor:
        """Bool [len(chosen), height, width]: pixels whose colour differs from the background by more."""
        background = self.background_CHWC[self.camera_M[chosen]].short()
        return ((self.frames_MHWC[chosen].short() - background).abs() > threshold).any(-1)


def train_tokenizer(
    store: EpisodeStore,
    ibq: IBQConfig,
    cameras: tuple[str, ...],
    config: TokenizerTraining,
    out: Path,
    *,
    resume: bool,
) -> tuple[IBQFrameTokenizer, LoopResult]:
    """Train one tokenizer for all ``cameras`` and keep it in ``out/tokenizer``.

    Args:
        store: the dataset whose frames are learned.
        ibq: shape of the network.
        cameras: cameras whose frames it reads.
        config: how it is trained.
        out: the run's folder.
        resume: go on from an earlier run in ``out``.

    Returns:
        The tokenizer with the averaged weights, on the training device, and how the run ended.

    Raises:
        ValueError: if ``out`` holds a tokenizer and ``resume`` is off, or the dataset's cameras do not fit.
        TrainingFailed: on NaN, divergence, or a codebook that collapsed.
    """
    folder = out / "tokenizer"
    if folder.exists() and not resume:
        raise ValueError(f"{folder} exists: pass --resume to train it further, or another --out")
    _check_cameras(store, ibq, cameras)
    training, held_out = load_frames(store, cameras, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.loop.seed)  # module initialisers know only the global generator
        trainer = TokenizerTrainer(IBQ(ibq), training, held_out, config)
    result = run_loop(
        config.loop,
        trainer,
        trainer.loss,
        out,
        stage="tokenizer",
        resume=resume,
        describe={
            "data": store.data_hash,
            "cameras": list(cameras),
            "ibq": asdict(ibq),
            "training": {name: value for name, value in asdict(config).items() if name != "loop"},
        },
        save=lambda step: trainer.ibq.save_pretrained(folder),
        evaluate=trainer.evaluate,
        unit="images",
    )
    write_training_meta(out, "tokenizer", config, store, result)
    return IBQFrameTokenizer(trainer.ibq), result


def load_frames(store: EpisodeStore, cameras: tuple[str, ...], config: TokenizerTraining) -> tuple[FrameSet, FrameSet]:
    """Draw training and held-out frames; both share the training frames' backgrounds.

    Raises:
        ValueError: if there are too few episodes to hold one out.
    """
    if not len(store):
        raise ValueError(f"{store.folder} has no readable episode: run `emu-embodied collect` first")
    index = np.arange(len(store))
    held = held_out_episodes(len(index), config.held_out)
    generator = np.random.default_rng(config.loop.seed)
    frames, camera = _draw_frames(store, index[~held], cameras, config.max_frames, generator)
    background = torch.stack([_median(frames[camera == number]) for number in range(len(cameras))])
    training = FrameSet(frames, camera, background)
    return training, FrameSet(*_draw_frames(store, index[held], cameras, config.eval_frames, generator), background)


class TokenizerTrainer(nn.Module):
    """An IBQ with its data, loss and figures.

    Args:
        ibq: what is trained.
        training: frames to learn.
        held_out: frames to judge by.
        config: how it is trained.
    """

    used: torch.Tensor
    age: torch.Tensor

    def __init__(self, ibq: IBQ, training: FrameSet, held_out: FrameSet, config: TokenizerTraining) -> None:
        super().__init__()
        self.ibq = ibq.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self.register_buffer("used", torch.zeros(ibq.config.n_embed, dtype=torch.int64))
        self.register_buffer("age", torch.zeros((), dtype=torch.int64))
        self._training = training
        self._held_out = held_out
        self._config = config
        self._started = time.monotonic()

    def loss(self, step: int, generator: torch.Generator) -> LossOutput:
        """One step's loss: reconstruction first, with quantisation from step ``warmup_plain`` on."""
        config = self._config
        rewritten = self._tend_codebook(step, generator)
        pixels, moving = self._batch(generator)
        if step < config.warmup_plain:
            painted = self.ibq.plain(pixels)
            loss, logs = self._reconstruction(painted, pixels, moving)
            return LossOutput(loss, logs, len(pixels), guarded=False, rewritten=rewritten)
        output = self.ibq(pixels)
        reconstruction, logs = self._reconstruction(output.reconstruction, pixels, moving)
        self.used += torch.bincount(output.codes.flatten(), minlength=len(self.used))
        self.age += 1
        # The gap is at least -log K; the constant keeps the loss positive, as the divergence guard needs it.
        gap = output.entropy_loss + math.log(len(self.used))
        loss = reconstruction + config.quantise_weight * output.quantise_loss + config.entropy_weight * gap
        logs |= {"quantise": output.quantise_loss.detach(), "entropy": output.entropy_loss.detach()}
        return LossOutput(loss, logs, len(pixels), rewritten=rewritten)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out figures: PSNR [dB], share of codes used, perplexity [codes], idempotence.

        Raises:
            TrainingFailed: if the codebook has collapsed.
        """
        config, held_out = self._config, self._held_out
        frames = held_out.frames_MHWC
        age = int(self.age)
        pixels = to_pixels(frames.to(self.used.device))
        codes = self.ibq.encode(pixels)
        if age:
            painted = self.ibq.decode(codes).clamp(-1, 1)
        else:
            painted = torch.cat([self.ibq.plain(part) for part in pixels.split(128)]).clamp(-1, 1)
        error = ((painted - pixels) * 0.5).square().mean(1)
        moving = held_out.moving(torch.arange(len(frames)), config.moving_threshold).to(error.device)
        figures = {"psnr": _psnr(error), "psnr_moving": _psnr(error[moving])}
        if not age:
            return figures
        usage = code_usage(codes, len(self.used))
        again = self.ibq.encode(painted)
        figures |= {
            "codes_used": usage.used,
            "perplexity": usage.perplexity,
            "idempotence": (again == codes).float().mean().item(),
        }
        # A slice with fewer codes than the codebook has cannot use all of it.
        possible = min(1.0, codes.numel() / len(self.used))
        if age >= config.collapse_grace and usage.used < config.min_used * possible:
            raise TrainingFailed(
                f"the codebook collapsed: {usage.used:.1%} of {len(self.used)} codes in use on held-out frames, {age} "
                f"steps after its start (least {config.min_used:.0%}); raise entropy_weight or lower the learning rate"
            )
        return figures

    def _batch(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Random frames: pixels [B, 3, H, W] in [-1, 1] and the moving ones, bool [B, H, W]."""
        chosen = torch.randint(len(self._training.frames_MHWC), (self._config.batch,), generator=generator)
        moving = self._training.moving(chosen, self._config.moving_threshold)
        device = self.used.device
        return to_pixels(self._training.frames_MHWC[chosen].to(device)), moving.to(device)

    def _reconstruction(
        self, painted: torch.Tensor, pixels: torch.Tensor, moving: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config = self._config
        weight = 1 + config.moving_weight * moving.float().unsqueeze(1)
        weight = weight / weight.mean()
        difference = painted.float() - pixels
        l1 = (weight * difference.abs()).mean()
        l2 = (weight * difference.square()).mean()
        down = (weight[..., 1:, :] * difference.diff(dim=-2).abs()).mean()
        across = (weight[..., 1:] * difference.diff(dim=-1).abs()).mean()
        loss = l1 + config.l2_weight * l2 + config.edge_weight * (down + across)
        return loss, {"l1": l1.detach(), "l2": l2.detach(), "edge": (down + across).detach()}

    @torch.no_grad()
    def _tend_codebook(self, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Start the codebook, or move unused codes; returns which parameter rows were set by hand."""
        config = self._config
        since = step - config.warmup_plain
        if since == 0:
            self.ibq.initialise_codebook(self._sample_vectors(generator, 16 * len(self.used)), generator)
            named = dict(self.ibq.named_parameters())
            self.used.zero_()
            return {f"ibq.{name}": torch.ones(len(named[name]), dtype=torch.bool) for name in _REWRITTEN}
        if since < 0 or since % config.revive_every:
            return {}
        if schedule_progress(config.loop, step, time.monotonic() - self._started) > config.revive_until:
            return {}
        unused = self.used == 0
        self.used.zero_()
        if not unused.any():
            return {}
        self.ibq.revive(unused, self._sample_vectors(generator, 4 * len(self.used)), generator)
        return {"ibq.quantize.embedding.weight": unused}

    def _sample_vectors(self, generator: torch.Generator, least: int) -> torch.Tensor:
        """Encoder outputs [B', h, w, D] of as many batches as give at least ``least`` vectors."""
        parts: list[torch.Tensor] = []
        while sum(part[..., 0].numel() for part in parts) < least:
            parts.append(self.ibq.vectors(self._batch(generator)[0]))
        return torch.cat(parts)


def _check_cameras(store: EpisodeStore, ibq: IBQConfig, cameras: tuple[str, ...]) -> None:
    for camera in cameras:
        if camera not in store.spec.cameras:
            known = ", ".join(sorted(store.spec.cameras))
            raise ValueError(f"camera {camera!r} is not in {store.folder}; it has {known}")
        size = store.spec.cameras[camera]
        if size != (ibq.resolution, ibq.resolution):
            raise ValueError(
                f"camera {camera!r} of {store.folder} has {size[0]} x {size[1]} pixels, the tokenizer reads "
                f"{ibq.resolution} x {ibq.resolution}: collect at that size"
            )


def _draw_frames(
    store: EpisodeStore, episodes: Iterable[int], cameras: tuple[str, ...], limit: int, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """At most ``limit`` frames of the episodes, by reservoir sampling, and the camera of each."""
    kept: list[np.ndarray] = []
    camera_of: list[int] = []
    seen = 0
    for episode in store.iter_valid(episodes):
        for number, camera in enumerate(cameras):
            for frame in episode.frames[camera]:
                seen += 1
                if len(kept) < limit:
                    kept.append(frame.copy())
                    camera_of.append(number)
                elif (place := int(generator.integers(seen))) < limit:
                    kept[place] = frame.copy()
                    camera_of[place] = number
    if not kept:
        raise ValueError(f"{store.folder}: no readable episode with frames of {', '.join(cameras)}")
    return torch.from_numpy(np.stack(kept)), torch.tensor(camera_of)


def _median(frames: torch.Tensor, most: int = 1000) -> torch.Tensor:
    """Median over a spread of at most ``most`` frames, uint8 [H, W, 3]."""
    stride = -(-len(frames) // most)
    return frames[::stride].median(dim=0).values


def _psnr(error: torch.Tensor) -> float:
    """PSNR [dB] of squared errors on a [0, 1] scale, pooled over all pixels."""
    return float(-10 * error.mean().clamp_min(1e-10).log10()) if error.numel() else 0.0
