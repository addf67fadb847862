"""Stage ``world``: next-token training over whole interleaved sequences (Emu3.5, section 3.2)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from emu_embodied.data.batches import TokenDataset, encode_dataset
from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.files import write_json
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.presets import Preset
from emu_embodied.provenance import make_meta
from emu_embodied.tokens.frames import IBQFrameTokenizer
from emu_embodied.tokens.states import ProprioTokenizer
from emu_embodied.train.evaluation import Judge
from emu_embodied.train.loop import LoopConfig, LoopResult, LossOutput, run_loop
from emu_embodied.train.losses import LossWeights, state_loss
from emu_embodied.train.windows import action_loss, clean_logits, window_tokens
from emu_embodied.world_model import WorldModel, WorldModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldTraining:
    """How the transformer is trained, in either stage."""

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=4000, warmup_steps=100, ema_decay=0.995))
    """Length, rate and device."""
    batch: int = 8
    """Windows in a batch [windows]."""
    weights: LossWeights = field(default_factory=LossWeights)
    """Weights of the kinds of token."""
    context_noise: float = 0.15
    """Largest share of frame codes of a window replaced by random ones."""
    held_out: float = 0.05
    """Share of episodes kept for evaluation."""
    noise_shift: float = 3.0
    """DiDA: t = 1 - shift s / (1 + (shift - 1) s) with s ~ U(0, 1); larger means noisier (URSA's law)."""
    source_share: float = 0.5
    """DiDA: share of noisy copies that are pure noise (t = 0), the only thing a one-pass decoder ever sees."""


@dataclass(frozen=True, slots=True)
class WorldData:
    """A dataset ready for training a world model.

    Attributes:
        train: windows to learn from.
        held_out: windows to judge by.
        text_train_EL: text segments of the training episodes.
        text_held_EL: text segments of the held-out ones.
    """

    train: TokenDataset
    held_out: TokenDataset
    text_train_EL: torch.Tensor
    text_held_EL: torch.Tensor


def prepare_data(world: WorldModel, tokens: TokenDataset, held_out: float) -> WorldData:
    """Split by episode and tokenise the instructions."""
    parts = tokens.split(held_out)
    texts = [torch.stack([world.layout.text_ids(world.text.encode(i)) for i in part.instructions]) for part in parts]
    return WorldData(*parts, *texts)


def new_world(
    store: EpisodeStore, preset: Preset, frames: IBQFrameTokenizer, tokens: TokenDataset, seed: int
) -> WorldModel:
    """An untrained world model that fits a dataset.

    Raises:
        ValueError: if the dataset's block size or frame size is not the preset's (with both values).
    """
    spec = store.spec
    if spec.block != preset.block:
        raise ValueError(
            f"{store.folder} was recorded in blocks of {spec.block} env steps; the preset has {preset.block}"
        )
    rows = tokens.rows()
    spread = torch.quantile(tokens.proprio_MP[rows].float(), torch.tensor([0.001, 0.999]), dim=0)
    config = WorldModelConfig(
        env_ids=spec.env_ids,
        data_hash=store.data_hash,
        cameras=preset.cameras,
        image_size=preset.image_size,
        camera_tokens=tokens.codes_MN.shape[1] // len(preset.cameras),
        codebook=preset.ibq.n_embed,
        block=spec.block,
        action_dim=spec.action_dim,
        proprio=ProprioTokenizer.fit(spec.proprio, spread[0].tolist(), spread[1].tolist(), preset.state_bins).fields,
        text_length=preset.text_length,
        action_bins=preset.action_bins,
        state_bins=preset.state_bins,
        reward_bins=preset.reward_bins,
        context_states=preset.context_states,
        max_states=preset.max_states,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # module initialisers know only the global generator
        backbone = EmuForCausalLM(preset.backbone(spec.action_dim))
    return WorldModel(config, backbone, frames)


def train_world(
    store: EpisodeStore, preset: Preset, frames: IBQFrameTokenizer, config: WorldTraining, out: Path, *, resume: bool
) -> LoopResult:
    """Train a backbone by next token and keep it in ``out`` as a checkpoint folder.

    Raises:
        ValueError: if ``out`` holds a trained backbone and ``resume`` is off, or the dataset does not fit the preset.
        TrainingFailed: on NaN or divergence.
    """
    if (out / "world.json").exists() and not resume:
        raise ValueError(f"{out} holds a world model: pass --resume to continue it, or another --out")
    tokens = encode_dataset(store, frames, preset.cameras, out / "tokens.safetensors")
    world = new_world(store, preset, frames, tokens, config.loop.seed)
    data = prepare_data(world, tokens, config.held_out)
    backbone = world.backbone.requires_grad_(True)

    def loss_fn(step: int, generator: torch.Generator) -> LossOutput:
        batch = data.train.sample(config.batch, preset.max_states, data.text_train_EL, generator).to(world.device)
        window = window_tokens(world, batch, config.context_noise, generator)
        positions = torch.arange(window.ids_BL.shape[1], device=world.device)
        hidden = backbone.core(window.embeds_BLD, positions, mask=None)
        loss, logs = state_loss(clean_logits(backbone, world.layout, hidden), window.targets, config.weights)
        imitation = action_loss(backbone, world.layout, hidden, window, batch.imitate_B)
        return LossOutput(
            loss + config.weights.action * imitation, {**logs, "action": imitation.detach()}, window.ids_BL.numel()
        )

    def save(step: int) -> None:
        world.save_pretrained(out)

    result = run_loop(
        config.loop,
        backbone,
        loss_fn,
        out,
        stage="world",
        resume=resume,
        describe={"data": store.data_hash, "backbone": backbone.config.to_diff_dict(), "batch": config.batch},
        save=save,
        evaluate=Judge(world, data, config).next_token,
        unit="tokens",
    )
    save(result.step)
    write_training_meta(out, "world", config, store, result)
    return result


def write_training_meta(out: Path, stage: str, config: WorldTraining, store: EpisodeStore, result: LoopResult) -> None:
    """Record where a checkpoint comes from in ``meta.json``, one entry for each stage."""
    meta = make_meta(
        seed=config.loop.seed,
        data_hash=store.data_hash,
        config=asdict(config),
        steps=result.step,
        seconds=round(result.seconds),
        figures=result.logs,
    )
    path = out / "meta.json"
    stages = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {**stages, stage: asdict(meta)})
