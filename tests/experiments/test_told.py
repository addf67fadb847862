"""The told policy reads the simulator's numbers, and no others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from emu_embodied.experiments.told import PRESET, ToldActor
from emu_embodied.records import Field, Observation

from tests.tiny import make_world, observation, make_episode  # isort: skip


def test_objects_are_the_simulators():
    objects = (Field("ball_x", "m", 0.0, 1.0), Field("ball_y", "m", 0.0, 1.0))
    world = make_world(objects=objects)
    seen = observation(make_episode(), 0)
    told = [replace(seen, objects=np.array(place, np.float32)) for place in ((0.1, 0.9), (0.6, 0.2))]
    found = ToldActor(world).see(told)
    numbers = world.proprio.decode(found.proprio_BTP[:, 0].long())
    expected = torch.tensor([[0.1, 0.9], [0.6, 0.2]])
    assert float((numbers[:, -2:] - expected).abs().max()) <= 0.5 / world.config.state_bins + 1e-6
    proprio = world.proprio.encode(torch.from_numpy(np.concatenate([seen.proprio, told[0].objects])))
    assert torch.equal(found.proprio_BTP[0, 0].long(), proprio)
    assert isinstance(told[0], Observation)


def test_the_preset_is_small():
    shape = PRESET.backbone(4)
    assert PRESET.ibq.cell == PRESET.image_size // 2 and shape.hidden_size * shape.num_hidden_layers < 256
