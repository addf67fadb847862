"""The pieces of a world model: whether they fit, and as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from emu_embodied.models.eye import Eye
from emu_embodied.models.ibq import IBQ
from emu_embodied.models.loading import placed, quietly
from emu_embodied.models.reward_model import RewardModel
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.tokens.frames import IBQFrameTokenizer
from emu_embodied.tokens.text import ByteTokenizer, TextTokenizer
from emu_embodied.world_config import WorldModelConfig

Pieces = tuple[EmuForCausalLM, IBQFrameTokenizer, TextTokenizer | None, Eye | None, RewardModel | None]


def read_pieces(
    folder: Path, tokens: Literal["compact", "emu3.5"], device: str | torch.device, backbone: dict[str, Any]
) -> Pieces:
    """Read what ``write_pieces`` wrote.

    Args:
        folder: checkpoint folder.
        tokens: which ids it was written with.
        device: where to compute.
        backbone: to ``EmuForCausalLM.from_pretrained``.

    Raises:
        ValueError: for a missing, damaged or foreign file.
    """
    with quietly():
        loaded = placed(EmuForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **backbone}), device)
    frames = IBQFrameTokenizer(IBQ.from_pretrained(folder / "tokenizer", device))
    text = TextTokenizer.from_pretrained(folder) if tokens == "emu3.5" else None
    rewards = folder / RewardModel.kind
    reward_model = RewardModel.from_pretrained(rewards, device) if rewards.is_dir() else None
    return loaded, frames, text, read_eye(folder, device), reward_model


def read_eye(folder: Path, device: str | torch.device = "cpu") -> Eye | None:
    """The eye of a checkpoint folder, if it has one.

    Raises:
        ValueError: naming a file that is damaged.
    """
    return Eye.from_pretrained(folder / Eye.kind, device) if (folder / Eye.kind).is_dir() else None


def write_pieces(
    folder: Path,
    backbone: EmuForCausalLM,
    frames: IBQFrameTokenizer,
    text: TextTokenizer | None,
    eye: Eye | None,
    reward_model: RewardModel | None,
) -> None:
    """Write config.json, model.safetensors, tokenizer/, any eye/ and reward/ and any ``emu3.tiktoken``."""
    folder.mkdir(parents=True, exist_ok=True)
    with quietly():
        backbone.save_pretrained(folder)
    frames.save_pretrained(folder / "tokenizer")
    if text is not None:
        text.save_pretrained(folder)
    for piece in (eye, reward_model):
        if piece is not None:
            piece.save_pretrained(folder / piece.kind)


def check_pieces(
    config: WorldModelConfig,
    backbone: EmuForCausalLM,
    frames: IBQFrameTokenizer,
    text: TextTokenizer | None,
    eye: Eye | None,
    reward_model: RewardModel | None,
) -> None:
    """Whether the pieces are those that a configuration names.

    Raises:
        ValueError: naming what differs, with both values.
    """
    layout = config.layout
    if backbone.config.vocab_size != layout.vocabulary.size:
        raise ValueError(f"backbone has {backbone.config.vocab_size} ids, world.json lays out {layout.vocabulary.size}")
    actions = (backbone.config.action_block, backbone.config.action_dim)
    if actions != (config.block, config.action_dim):
        raise ValueError(
            f"backbone embeds action blocks of {actions}, world.json names {(config.block, config.action_dim)}"
        )
    rows, columns = frames.grid
    if (frames.codebook_size, frames.image_size, rows * columns) != (
        config.codebook,
        config.image_size,
        config.camera_tokens,
    ):
        raise ValueError(
            f"tokenizer makes {rows * columns} tokens of {frames.codebook_size} codes from {frames.image_size}-px "
            f"frames, world.json names {config.camera_tokens} of {config.codebook} from {config.image_size} px"
        )
    if (config.tokens == "emu3.5") != (text is not None):
        raise ValueError("Emu3.5's ids and Emu3.5's text tokenizer belong together: give both or neither")
    if config.objects and eye is None:
        names = ", ".join(field.name for field in config.objects)
        raise ValueError(f"world.json names objects ({names}) and there is no eye that reads them off a picture")
    if eye is not None and (eye.config.objects, eye.config.cameras, eye.config.image_size) != (
        config.objects,
        config.cameras,
        config.image_size,
    ):
        raise ValueError("the eye reads other cameras, or says other numbers, than world.json names")
    if reward_model is not None:
        check_reward_model(config, reward_model)


def check_reward_model(config: WorldModelConfig, reward_model: RewardModel) -> None:
    """Whether a reward model judges the states of a world model, in all of its tasks.

    Raises:
        ValueError: naming what differs.
    """
    own = reward_model.config
    reads = [field.name for field in (*own.proprio, *own.objects)]
    named = [field.name for field in (*config.proprio, *config.objects)]
    if reads != named:
        raise ValueError(f"the reward model reads {', '.join(reads)}; world.json names {', '.join(named)}")
    if unknown := [env_id for env_id in config.env_ids if env_id not in own.env_ids]:
        raise ValueError(f"the reward model never learned {', '.join(unknown)}: train it on data of all tasks")


def official_text(text: ByteTokenizer | TextTokenizer) -> TextTokenizer | None:
    """Emu3.5's text tokenizer, or None for bytes, which need no file."""
    return text if isinstance(text, TextTokenizer) else None
