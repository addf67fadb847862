"""World models of random weights and windows to train them on: what speed and toy scenes are measured with."""

from __future__ import annotations

import numpy as np
import torch

from emu_embodied.data.batches import WindowBatch
from emu_embodied.models.ibq import IBQ
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.presets import Preset
from emu_embodied.records import Field, Observation
from emu_embodied.tokens.frames import IBQFrameTokenizer
from emu_embodied.world_config import WorldModelConfig
from emu_embodied.world_model import WorldModel

PROPRIO = tuple(Field(f"p{i}", "1", -1.0, 1.0) for i in range(8))
"""Proprio of the robot that there is not."""
ACTION_DIM = 4


def untrained(row: Preset, *, paths: tuple[str, ...] = (), seed: int = 0) -> WorldModel:
    """A world model of a preset with random weights, adapted in name to ``paths``."""
    config = WorldModelConfig(
        env_ids=("Random-v0",),
        data_hash="0" * 64,
        cameras=row.cameras,
        image_size=row.image_size,
        camera_tokens=(row.image_size // row.ibq.cell) ** 2,
        codebook=row.ibq.n_embed,
        block=row.block,
        action_dim=ACTION_DIM,
        proprio=PROPRIO,
        text_length=row.text_length,
        action_bins=row.action_bins,
        state_bins=row.state_bins,
        reward_bins=row.reward_bins,
        context_states=row.context_states,
        max_states=row.max_states,
        paths=paths,
        decoding="dida" if paths else "autoregressive",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = EmuForCausalLM(row.backbone(ACTION_DIM))
        ibq = IBQ(row.ibq)
    return WorldModel(config, backbone, IBQFrameTokenizer(ibq))


def random_observation(world: WorldModel, seed: int = 0) -> Observation:
    """A picture of noise, proprio in the middle of its range."""
    config, generator = world.config, torch.Generator().manual_seed(seed)
    shape = (config.image_size, config.image_size, 3)
    frames = {camera: torch.randint(256, shape, generator=generator).byte().numpy() for camera in config.cameras}
    middle = np.array([(field.low + field.high) / 2 for field in config.proprio], np.float32)
    return Observation(frames, middle, "push")


def random_windows(world: WorldModel, count: int, seed: int = 0) -> WindowBatch:
    """Windows of noise."""
    config, layout, generator = world.config, world.layout, torch.Generator().manual_seed(seed)
    states = config.max_states
    text = layout.text_ids(world.text.encode("push"))
    return WindowBatch(
        text.expand(count, -1),
        torch.randint(config.codebook, (count, states, len(layout.frame_slots)), generator=generator),
        torch.rand(count, states, layout.num_proprio, generator=generator) * 2 - 1,
        torch.rand(count, states - 1, config.block, config.action_dim, generator=generator) * 2 - 1,
        torch.rand(count, states, generator=generator),
        torch.rand(count, states, generator=generator) < 0.1,
        torch.ones(count, dtype=torch.bool),
    )
