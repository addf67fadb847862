"""Stage ``dida``: discrete diffusion adaptation of a next-token model (Emu3.5, section 3.3).

The next-token loss on the clean stream is kept, so that one set of weights decodes both ways.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from emu_embodied.data.batches import encode_dataset
from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.data.subgoals import Subtasks
from emu_embodied.hardware import pick_device
from emu_embodied.models.eye import Eye
from emu_embodied.train.evaluation import Judge
from emu_embodied.train.loop import LoopResult, LossOutput, run_loop
from emu_embodied.train.meta import write_training_meta
from emu_embodied.train.numbers import NumberTraining
from emu_embodied.train.parallel import dida_loss
from emu_embodied.train.pretrain import WorldTraining, check_eye, prepare_data
from emu_embodied.train.rollout import own_samples, with_own_samples
from emu_embodied.train.subgoals import SubgoalTraining
from emu_embodied.world_config import WorldModelConfig
from emu_embodied.world_files import official_text
from emu_embodied.world_model import WorldModel


def train_dida(
    store: EpisodeStore,
    world: WorldModel,
    config: WorldTraining,
    out: Path,
    *,
    resume: bool,
    paths: tuple[str, ...] = ("uniform",),
    subtasks: Subtasks | None = None,
    eye: Eye | None = None,
) -> LoopResult:
    """Adapt a world model and keep the result in ``out``.

    ``out`` may hold the next-token model itself, which is then replaced by what it becomes. A model that is adapted
    already can be adapted further, with other paths or data, into another folder. What the data show beyond the model's
    own, further tasks of the same robot, it learns too, and with an eye the objects' places.

    Args:
        store: recorded like the model's own data.
        world: to start from.
        config: how.
        out: checkpoint folder.
        resume: go on with a run that was stopped in ``out``.
        paths: noise processes; every noisy copy draws one of them, and the model will decode with the first.
        subtasks: what the phases of an instruction are called; without it nothing is learned of subgoals.
        eye: for a model that has none.

    Raises:
        ValueError: if ``out`` holds an adapted model and ``resume`` is off, a path is unknown or named twice, or the
            dataset was recorded with other blocks, cameras or environments than the model's.
        TrainingFailed: on NaN or divergence.
    """
    check_same_recording(store, world)
    eye = world.eye or eye
    check_eye(store, eye)
    if len(set(paths)) < len(paths) or not paths:
        raise ValueError(f"paths are {', '.join(paths) or 'none'}: name at least one, and each once")
    noises = [world.path(name) for name in paths]
    held = out / "world.json"
    if held.exists() and not resume and WorldModelConfig.load(held).paths:
        raise ValueError(f"{out} holds an adapted world model: pass --resume to continue it, or another --out")
    device = pick_device(config.loop.device)
    world.frames.ibq.to(device)
    world.backbone.to(device)
    tokens = encode_dataset(
        store, world.frames, world.config.cameras, out / "tokens.safetensors", objects=eye is not None
    )
    grown = replace(
        world.config,
        env_ids=tuple(dict.fromkeys((*world.config.env_ids, *store.spec.env_ids))),
        objects=() if eye is None else eye.config.objects,
        paths=paths,
        decoding="dida",
        streams=("pictures", "numbers") if config.number_windows else world.config.streams,
    )
    rewards = world.reward_model
    if rewards is not None and not set(grown.env_ids) <= set(rewards.config.env_ids):
        rewards = None  # it never learned the further tasks
    adapted = WorldModel(grown, world.backbone, world.frames, official_text(world.text), eye, rewards)
    data = prepare_data(adapted, tokens, config.held_out)
    subgoals = SubgoalTraining(adapted, data, config, subtasks)
    adapted.config = replace(adapted.config, subgoals=subgoals.steps or world.config.subgoals)
    numbers = NumberTraining(adapted, data, config, noises)
    backbone = adapted.backbone.requires_grad_(True)
    windows = config.batch - subgoals.windows
    states = world.config.max_states

    def loss_fn(step: int, generator: torch.Generator) -> LossOutput:
        batch = data.train.sample(windows, states, data.text_train_EL, generator).to(adapted.device)
        if pool is not None:
            batch = with_own_samples(batch, pool.to(adapted.device), generator)
        output = subgoals.mix(dida_loss(adapted, batch, config, noises, generator), generator, noises)
        return numbers.mix(output, generator)

    pool = None
    if config.distilled_windows:
        pool = own_samples(adapted, data, config, out / "distilled.safetensors", resume=resume)

    def save(step: int) -> None:
        adapted.save_pretrained(out)

    judge = Judge(adapted, data, config, subgoals)
    result = run_loop(
        config.loop,
        backbone,
        loss_fn,
        out,
        stage="dida",
        resume=resume,
        describe={
            "data": store.data_hash,
            "backbone": backbone.config.to_diff_dict(),
            "path": ",".join(paths),
            "batch": config.batch,
            **subgoals.describe,
            **numbers.describe,
        },
        save=save,
        evaluate=lambda: judge.parallel() | numbers.figures(),
        unit="tokens",
    )
    write_training_meta(out, "dida", config, store, result)
    return result


def check_same_recording(store: EpisodeStore, world: WorldModel) -> None:
    """Refuse a dataset that the model cannot have been trained on.

    Raises:
        ValueError: naming what differs, with both values.
    """
    config, spec = world.config, store.spec
    clashes = []
    if spec.block != config.block:
        clashes.append(f"env steps in a block: dataset {spec.block}; model {config.block}")
    if spec.action_dim != config.action_dim:
        clashes.append(f"action dimensions: dataset {spec.action_dim}; model {config.action_dim}")
    for label, has, wants in (("proprio", spec.proprio, config.proprio), ("object", spec.objects, config.objects)):
        if wants and [f.name for f in has] != [f.name for f in wants]:
            names = [", ".join(field.name for field in fields) or "none" for fields in (has, wants)]
            clashes.append(f"{label} fields: dataset {names[0]}; model {names[1]}")
    if clashes:
        raise ValueError(f"{store.folder} does not fit the model: " + " | ".join(clashes))
