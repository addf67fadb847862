"""The loss of stage ``dida``: states from noisy copies of them, and next tokens of the clean stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from emu_embodied.data.batches import WindowBatch
from emu_embodied.decode.paths import StatePath
from emu_embodied.train.loop import LossOutput
from emu_embodied.train.losses import state_loss
from emu_embodied.train.noise import draw_copies, noisy_logits, sample_times
from emu_embodied.train.rollout import self_fed
from emu_embodied.train.windows import action_loss
from emu_embodied.world_model import WorldModel

if TYPE_CHECKING:
    from emu_embodied.train.pretrain import WorldTraining


def dida_loss(
    world: WorldModel,
    batch: WindowBatch,
    config: WorldTraining,
    paths: Sequence[StatePath],
    generator: torch.Generator,
) -> LossOutput:
    """Loss of predicting states from noisy copies of them, and of next-token prediction on the clean stream.

    Args:
        world: being adapted.
        batch: on its device.
        config: how.
        paths: noise processes, one of which every copy draws.
        generator: CPU generator.
    """
    window, fed = self_fed(world, batch, config, paths, generator)
    shape = (len(batch.codes_BTN), len(window.starts))
    times = sample_times(shape, config.noise_shift, config.source_share, generator, asynchronous=config.async_times)
    views = noisy_logits(world, window, draw_copies(paths, window, times, generator), flex=config.flex_attention)
    noisy, logs = state_loss(views.noisy, window.targets, config.weights)
    true_M = slice(fed * shape[1], None)  # a state that was imagined otherwise says nothing of the data's next token
    clean, clean_logs = state_loss(views.clean.at(true_M), window.targets.at(true_M), config.weights)
    imitate_B = batch.imitate_B & (torch.arange(shape[0], device=world.device) >= fed)
    imitation = action_loss(world.backbone, world.layout, views.hidden_BLD, window, imitate_B)
    logs |= {f"clean/{name}": value for name, value in clean_logs.items()}
    return LossOutput(
        noisy + clean + config.weights.action * imitation,
        {**logs, "action": imitation.detach()},
        window.embeds_BLD[..., 0].numel() + times.numel() * world.layout.state_tokens,
    )
