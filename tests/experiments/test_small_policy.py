"""The small policy is small: what it sees comes from its eye."""

from __future__ import annotations

from emu_embodied.experiments.small_policy import PRESET


def test_the_preset_is_small():
    shape = PRESET.backbone(4)
    assert PRESET.ibq.cell == PRESET.image_size // 2 and shape.hidden_size * shape.num_hidden_layers < 256
