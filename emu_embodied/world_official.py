"""Emu3.5's released folder as a world model: its own ids and image blocks, a robot that it has still to learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from emu_embodied.models.checkpoints import read_config
from emu_embodied.models.folders import find_backbone, find_folders
from emu_embodied.models.ibq import IBQ
from emu_embodied.models.loading import placed, quietly
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.tokens.frames import IBQFrameTokenizer
from emu_embodied.tokens.text import TextTokenizer
from emu_embodied.world_config import WEIGHTS, WorldModelConfig


def is_official(folder: Path) -> bool:
    """Whether a folder holds a backbone that knows no actions: Emu3.5's."""
    try:
        return not read_config(find_backbone(folder)).get("action_block")
    except ValueError:
        return False


def read_official(
    folder: Path, device: str | torch.device, embodiment: WorldModelConfig | None, backbone: dict[str, Any]
) -> tuple[WorldModelConfig, EmuForCausalLM, IBQFrameTokenizer, TextTokenizer]:
    """The parts of a ``WorldModel``.

    Args:
        folder: see ``find_folders``.
        device: where to compute; with a ``device_map`` only the vision tokenizer goes there.
        embodiment: cameras, actions, proprio and the length of windows; None takes those of the shipped ``nano``.
        backbone: to ``EmuForCausalLM.from_pretrained``; ``dtype`` is as stored by default.

    Raises:
        ValueError: naming what is missing, damaged or does not fit, before any weights are read.
    """
    found = find_folders(folder)
    robot = WorldModelConfig.load(WEIGHTS / "nano" / "world.json") if embodiment is None else embodiment
    text = TextTokenizer.from_pretrained(found.text)
    frames = IBQFrameTokenizer(IBQ.from_pretrained(found.vision, device))
    config = replace(
        robot,
        data_hash="none",
        image_size=frames.image_size,
        camera_tokens=frames.grid[0] * frames.grid[1],
        codebook=frames.codebook_size,
        tokens="emu3.5",
        paths=(),
        subgoals=0,
        decoding="autoregressive",
    )
    ids = config.layout.vocabulary.size
    if (known := read_config(found.backbone).get("vocab_size")) != ids:
        raise ValueError(f"the weights in {found.backbone} know {known} ids, text and vision tokenizer make {ids}")
    with quietly(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the new action embedding, so that equal folders give equal models
        loaded = EmuForCausalLM.from_pretrained(
            found.backbone, **{"dtype": "auto", **backbone}, action_dim=robot.action_dim, action_block=robot.block
        )
    return config, placed(loaded, device), frames, text
