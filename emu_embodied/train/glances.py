"""Learning to see where the things are: single pictures beside the windows of a batch.

A window shows the objects of every state but the first beside those of the state before, from which they are easily
copied, so windows alone teach little of how a picture shows them. A picture costs a fraction of a window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from emu_embodied.data.batches import TokenDataset
from emu_embodied.decode.glance import glance
from emu_embodied.decode.grammar import expected_bin
from emu_embodied.train.loop import LossOutput
from emu_embodied.train.losses import ordinal_cross_entropy
from emu_embodied.train.windows import disturbed
from emu_embodied.world_model import WorldModel

if TYPE_CHECKING:
    from emu_embodied.train.pretrain import WorldData, WorldTraining

_JUDGED = 128
"""Held-out pictures an evaluation reads."""


def with_glances(
    output: LossOutput, world: WorldModel, data: WorldData, config: WorldTraining, generator: torch.Generator
) -> LossOutput:
    """Add the loss of ``config.glances`` training pictures to that of a batch; nothing for a model without objects.

    Args:
        output: of the rest of the batch.
        world: being trained.
        data: training pictures and their instructions.
        config: how many, context noise and weights.
        generator: of the step.
    """
    if not world.config.objects or not config.glances:
        return output
    text_BL, codes_BN, numbers_BP = _draw(world, data.train, data.text_train_EL, config.glances, generator)
    codes_BN = disturbed(codes_BN[:, None], world.config.codebook, config.context_noise, generator)[:, 0]
    known, target = world.proprio.encode(numbers_BP).split([len(world.config.proprio), len(world.config.objects)], 1)
    logits = glance(world.backbone, world.layout, text_BL, codes_BN, known)
    loss = ordinal_cross_entropy(logits, target, config.weights.smoothing)
    logs = {**output.logs, "perception": loss.detach()}
    return LossOutput(output.loss + config.weights.perception * loss, logs, output.items + text_BL.numel())


@torch.no_grad()
def perceived_error(world: WorldModel, data: WorldData) -> dict[str, float]:
    """Mean absolute error of the objects read off the same held-out pictures every time, in the fields' units."""
    if not world.config.objects:
        return {}
    generator = torch.Generator().manual_seed(0)
    text_BL, codes_BN, numbers_BP = _draw(world, data.held_out, data.text_held_EL, _JUDGED, generator)
    known = len(world.config.proprio)
    bins = world.proprio.encode(numbers_BP)[:, :known]
    logits = glance(world.backbone, world.layout, text_BL, codes_BN, bins)
    read = world.proprio.decode(torch.cat([bins, expected_bin(logits)], 1))[:, known:]
    error_O = (read - numbers_BP[:, known:]).abs().mean(0)
    return {f"perceived/{field.name}": float(e) for field, e in zip(world.config.objects, error_O, strict=True)}


def _draw(
    world: WorldModel, part: TokenDataset, text_EL: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = part.sample(count, 1, text_EL, generator).to(world.device)
    return batch.text_BL, batch.codes_BTN[:, 0], batch.proprio_BTP[:, 0]
