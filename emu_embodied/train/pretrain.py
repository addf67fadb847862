"""Stage ``world``: next-token training over whole interleaved sequences (Emu3.5, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from emu_embodied.data.batches import TokenDataset, WindowBatch, encode_dataset, fingerprint
from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.data.subgoals import Subtasks
from emu_embodied.hardware import pick_device
from emu_embodied.models.eye import Eye
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.presets import Preset
from emu_embodied.records import Field
from emu_embodied.tokens.frames import IBQFrameTokenizer
from emu_embodied.tokens.states import ProprioTokenizer
from emu_embodied.train.evaluation import Judge
from emu_embodied.train.loop import LoopConfig, LoopResult, LossOutput, run_loop
from emu_embodied.train.losses import LossWeights, state_loss
from emu_embodied.train.meta import write_training_meta
from emu_embodied.train.ordered import order_bins
from emu_embodied.train.state import has_state
from emu_embodied.train.subgoals import SubgoalTraining
from emu_embodied.train.windows import action_loss, clean_logits, window_tokens
from emu_embodied.world_config import WorldModelConfig
from emu_embodied.world_model import WorldModel


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldTraining:
    """How the transformer is trained, in either stage."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=4000, warmup_steps=100, ema_decay=0.995, optimizer="muon", learning_rate=3e-3
        )
    )
    """Length, rate and device."""
    batch: int = 8
    """Windows in a batch [windows]."""
    weights: LossWeights = field(default_factory=LossWeights)
    """Weights of the kinds of token."""
    context_noise: float = 0.15
    """Largest share of frame codes of a window replaced by random ones."""
    object_noise: float = 2.0
    """Largest standard deviation of what a window is shown of the objects' places [bins]: in use they are what the eye
    reads off a frame, not the truth."""
    changes: bool = True
    """Whether a new model reads its numbers out as moves from the state before, not as places
    (``WorldModelConfig.changes``)."""
    held_out: float = 0.05
    """Share of episodes kept for evaluation."""
    noise_shift: float = 3.0
    """DiDA: t = 1 - shift s / (1 + (shift - 1) s) with s ~ U(0, 1); larger means noisier (URSA's law)."""
    source_share: float = 0.5
    """DiDA: share of noisy copies that are pure noise (t = 0), the only thing a one-pass decoder ever sees."""
    flex_attention: bool = False
    """DiDA: compute attention by FlexAttention on a GPU. Off until a measurement there (``experiments/bench_adapt.py``)
    shows it faster than the pieces that the mask leaves."""
    async_times: bool = True
    """DiDA: every state of a window has its own t, as in decoding, where finished states stand before an open one; else
    a window has one."""
    own_steps: int = 0
    """DiDA: how often the model's predictions (one parallel pass, without gradient) are put in place of the states that
    the next are predicted from, in ``own_share`` of the windows; 1 or 2 make it robust to its own mistakes over as many
    blocks, at a forward each. Off by default, since where futures branch it teaches to leave the branch that was
    imagined, and context noise does much of the same for nothing."""
    own_share: float = 0.25
    """DiDA: share of the windows that ``own_steps`` speaks of."""
    distilled_windows: int = 0
    """DiDA: windows whose states the next-token model samples itself, once before training; half of every batch is then
    drawn from them (Emu3.5's self-distillation). Off by default: it pays where the data are few or the futures so many
    that one pass averages over them, and a simulator gives data for less."""
    number_windows: int = 0
    """DiDA: windows of numbers alone beside those of ``batch``, for a model with an eye [windows]; 0 leaves that stream
    untrained."""
    subgoal_share: float = 0.25
    """Share of a batch's windows that are of subtasks and their keyframes, in [0, 1); 0 trains without them."""
    subgoal_steps: int = 2
    """Subtasks in such a window [subtasks]."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: naming the field and its range.
        """
        for name in ("own_steps", "distilled_windows", "number_windows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, it has to be at least 0")
        for name in ("own_share", "source_share", "context_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it has to lie in [0, 1]")


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
    """Split by episode and tokenise the instructions.

    Raises:
        ValueError: if a part has no episode as long as a training window, or an instruction is too long.
    """
    parts = tokens.split(held_out)
    for part in parts:
        part.places(world.config.max_states)
    texts = [torch.stack([world.layout.text_ids(world.text.encode(i)) for i in part.instructions]) for part in parts]
    return WorldData(*parts, *texts)


def new_world(
    store: EpisodeStore,
    preset: Preset,
    frames: IBQFrameTokenizer,
    tokens: TokenDataset,
    seed: int,
    eye: Eye | None = None,
    *,
    changes: bool = True,
) -> WorldModel:
    """An untrained world model that fits a dataset, and knows of the objects that its eye reads."""
    spec = store.spec
    config = WorldModelConfig(
        env_ids=spec.env_ids,
        data_hash=store.data_hash,
        cameras=preset.cameras,
        image_size=preset.image_size,
        camera_tokens=tokens.codes_MN.shape[1] // len(preset.cameras),
        codebook=preset.ibq.n_embed,
        block=spec.block,
        action_dim=spec.action_dim,
        proprio=fitted_fields(store, tokens, preset.state_bins),
        objects=() if eye is None else eye.config.objects,
        text_length=preset.text_length,
        action_bins=preset.action_bins,
        state_bins=preset.state_bins,
        reward_bins=preset.reward_bins,
        context_states=preset.context_states,
        max_states=preset.max_states,
        changes=changes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # module initialisers know only the global generator
        backbone = EmuForCausalLM(preset.backbone(spec.action_dim))
        order_bins(backbone, config.layout.vocabulary)
    return WorldModel(config, backbone, frames, eye=eye)


def fitted_fields(store: EpisodeStore, tokens: TokenDataset, bins: int) -> tuple[Field, ...]:
    """Proprio fields with the range that a dataset covers."""
    fields = store.spec.proprio
    numbers_MP = tokens.proprio_MP[tokens.rows(), : len(fields)].float()
    low, high = torch.quantile(numbers_MP, torch.tensor([0.001, 0.999]), dim=0).tolist()
    return ProprioTokenizer.fit(fields, low, high, bins).fields


def check_eye(store: EpisodeStore, eye: Eye | None) -> None:
    """Refuse an eye for other objects than a dataset tells of.

    Raises:
        ValueError: naming both.
    """
    if eye is None:
        return
    reads, told = ([field.name for field in fields] for fields in (eye.config.objects, store.spec.objects))
    if reads != told:
        raise ValueError(f"the eye reads {', '.join(reads)}; {store.folder} tells of {', '.join(told) or 'nothing'}")


def check_fits_preset(store: EpisodeStore, preset: Preset, frames: IBQFrameTokenizer) -> None:
    """Refuse a dataset or a tokenizer that a preset cannot be trained with, before anything is computed.

    Raises:
        ValueError: naming what differs, with both values.
    """
    if preset.tokens != "compact":
        raise ValueError(
            "the preset emu3.5 is BAAI's released model, which is not trained from nothing here: load its folder with "
            "WorldModel.from_pretrained, save it, and adapt that with `train dida --init`"
        )
    if store.spec.block != preset.block:
        raise ValueError(
            f"{store.folder} was recorded in blocks of {store.spec.block} env steps; the preset has {preset.block}"
        )
    if frames.codebook_size != preset.ibq.n_embed or frames.image_size != preset.image_size:
        raise ValueError(
            f"the tokenizer has {frames.codebook_size} codes for {frames.image_size}-px frames; the preset has "
            f"{preset.ibq.n_embed} for {preset.image_size}-px frames"
        )


def train_world(
    store: EpisodeStore,
    preset: Preset,
    frames: IBQFrameTokenizer,
    config: WorldTraining,
    out: Path,
    *,
    resume: bool,
    subtasks: Subtasks | None = None,
    eye: Eye | None = None,
) -> LoopResult:
    """Train a backbone by next token and keep it in ``out`` as a checkpoint folder.

    Args:
        store: dataset.
        preset: size and shape.
        frames: vision tokenizer.
        config: how.
        out: checkpoint folder.
        resume: go on with a run that was stopped in ``out``.
        subtasks: what the phases of an instruction are called; without it nothing is learned of subgoals.
        eye: reads where things are; without it the model knows of no objects.

    Raises:
        ValueError: if ``out`` holds a world model that this would overwrite (it can be resumed as long as its training
            state is there and it was not adapted), or the dataset does not fit the preset.
        TrainingFailed: on NaN or divergence.
    """
    check_fits_preset(store, preset, frames)
    check_eye(store, eye)
    _check_out(out, resume)
    frames.ibq.to(pick_device(config.loop.device))
    tokens = encode_dataset(store, frames, preset.cameras, out / "tokens.safetensors", objects=eye is not None)
    world = new_world(store, preset, frames, tokens, config.loop.seed, eye, changes=config.changes)
    data = prepare_data(world, tokens, config.held_out)
    subgoals = SubgoalTraining(world, data, config, subtasks)
    world.config = replace(world.config, subgoals=subgoals.steps)
    backbone = world.backbone.requires_grad_(True)
    windows = config.batch - subgoals.windows

    def loss_fn(step: int, generator: torch.Generator) -> LossOutput:
        batch = data.train.sample(windows, preset.max_states, data.text_train_EL, generator).to(world.device)
        return subgoals.mix(next_token_loss(world, batch, config, generator), generator)

    def save(step: int) -> None:
        world.save_pretrained(out)

    result = run_loop(
        config.loop,
        backbone,
        loss_fn,
        out,
        stage="world",
        resume=resume,
        describe={
            "data": store.data_hash,
            "tokenizer": fingerprint(frames),
            "backbone": backbone.config.to_diff_dict(),
            "batch": config.batch,
            **subgoals.describe,
        },
        save=save,
        evaluate=Judge(world, data, config, subgoals).next_token,
        unit="tokens",
    )
    write_training_meta(out, "world", config, store, result)
    return result


def next_token_loss(
    world: WorldModel, batch: WindowBatch, config: WorldTraining, generator: torch.Generator
) -> LossOutput:
    """Loss of predicting every token of a batch of windows from those before it."""
    window = window_tokens(world, batch, config.context_noise, generator, object_noise=config.object_noise)
    positions = torch.arange(window.embeds_BLD.shape[1], device=world.device)
    hidden = world.backbone.core(window.embeds_BLD, positions, mask=None)
    found = clean_logits(world.backbone, world.layout, hidden, window)
    loss, logs = state_loss(found, window.targets, config.weights)
    imitation = action_loss(world.backbone, world.layout, hidden, window, batch.imitate_B)
    return LossOutput(
        loss + config.weights.action * imitation,
        {**logs, "action": imitation.detach()},
        window.embeds_BLD[..., 0].numel(),
    )


def _check_out(out: Path, resume: bool) -> None:
    if not (out / "world.json").exists():
        return
    if not resume:
        raise ValueError(f"{out} holds a world model: pass --resume to continue it, or another --out")
    if WorldModelConfig.load(out / "world.json").paths:
        raise ValueError(f"{out} holds an adapted world model, which this stage would undo: train into another --out")
    if not has_state(out / "training" / "world"):
        raise ValueError(f"{out} holds a world model without the state of its training: train into another --out")
