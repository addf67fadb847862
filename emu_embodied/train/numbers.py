"""The stream of numbers: the world role learned on states without frames, beside those with frames.

A window of numbers is some five times shorter than one with a frame in every state: as many tokens teach several times
as many transitions, and imagination costs as much less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from emu_embodied.decode.paths import StatePath
from emu_embodied.train.evaluation import Judge
from emu_embodied.train.loop import LossOutput
from emu_embodied.train.parallel import dida_loss
from emu_embodied.world_model import WorldModel

if TYPE_CHECKING:
    from emu_embodied.train.pretrain import WorldData, WorldTraining


class NumberTraining:
    """Windows of numbers beside a batch of others; none if ``config.number_windows`` is 0.

    Args:
        world: being adapted; its configuration names the stream if there are such windows.
        data: the windows with frames.
        config: how.
        paths: noise processes.
    """

    def __init__(self, world: WorldModel, data: WorldData, config: WorldTraining, paths: Sequence[StatePath]) -> None:
        self.config, self.paths = config, paths
        self.world = world.with_stream("numbers") if config.number_windows else None
        self.data = replace(data, train=data.train.without_frames(), held_out=data.held_out.without_frames())

    @property
    def describe(self) -> dict[str, int]:
        """What a run that is resumed has to agree on."""
        return {} if self.world is None else {"number_windows": self.config.number_windows}

    def mix(self, output: LossOutput, generator: torch.Generator) -> LossOutput:
        """Add the loss of these windows to that of the rest of a batch."""
        if self.world is None:
            return output
        states, texts_EL = self.world.config.max_states, self.data.text_train_EL
        batch = self.data.train.sample(self.config.number_windows, states, texts_EL, generator)
        own = dida_loss(self.world, batch.to(self.world.device), self.config, self.paths, generator)
        logs = {**output.logs, **{f"numbers/{name}": value for name, value in own.logs.items()}}
        return replace(output, loss=output.loss + own.loss, logs=logs, items=output.items + own.items)

    def figures(self) -> dict[str, float]:
        """What one parallel pass foretells of held-out numbers, see ``Judge``."""
        if self.world is None:
            return {}
        config = replace(self.config, batch=self.config.number_windows)
        return {f"numbers/{name}": value for name, value in Judge(self.world, self.data, config).parallel().items()}
