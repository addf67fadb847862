"""A checkpoint of random weights, small enough for any test, that reads what a Panda's environment shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from emu_embodied.envs.registry import make
from emu_embodied.experiments import untrained as module
from emu_embodied.experiments.two_modes import PRESET
from emu_embodied.world_model import WorldModel

ROW = replace(PRESET, block=5, text_length=48, context_states=2, max_states=4)


def small_checkpoint(folder: Path, env_id: str = "PandaReach-v0", **changes: object) -> Path:
    """Write one; ``changes`` are of its ``world.json``."""
    simulator = make(env_id, image_size=ROW.image_size)
    fields = tuple(simulator.proprio_fields)
    simulator.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PROPRIO", fields)
        world = module.untrained(ROW, paths=("uniform",))
    config = replace(world.config, **({"env_ids": (env_id,)} | changes))
    WorldModel(config, world.backbone, world.frames).save_pretrained(folder)
    return folder
