"""One-block predictions on held-out windows: the figures logged during training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from emu_embodied.decode.grammar import StateLogits, expected_bin
from emu_embodied.decode.paths import StatePath
from emu_embodied.train.noise import noisy_logits
from emu_embodied.train.windows import WindowTokens, clean_logits, window_tokens
from emu_embodied.world_model import WorldModel

if TYPE_CHECKING:
    from emu_embodied.train.pretrain import WorldData, WorldTraining
    from emu_embodied.train.subgoals import SubgoalTraining

WINDOWS = 64
"""Held-out windows an evaluation reads."""


class Judge:
    """Draws the same held-out windows every time and scores the model on them, on subgoals too where these are learned.

    A figure that is not defined (no code changed, a constant reward) is NaN.
    """

    def __init__(
        self, world: WorldModel, data: WorldData, config: WorldTraining, subgoals: SubgoalTraining | None = None
    ) -> None:
        self.world, self.data, self.config, self.subgoals = world, data, config, subgoals
        self.paths = [world.path(name) for name in world.config.paths]

    def next_token(self) -> dict[str, float]:
        """Figures of the clean stream, every earlier token given (teacher forcing)."""
        figures = self._average(self._clean)
        return figures | (self.subgoals.figures() if self.subgoals is not None else {})

    def parallel(self) -> dict[str, float]:
        """Figures of one parallel pass from the source of the first path, the state before given.

        Of further paths that the model is adapted with, the accuracies come under ``<figure>/<path>``.
        """
        first, *others = self.paths
        figures = self._average(partial(self._noisy, first))
        for path in others:
            found = self._average(partial(self._noisy, path))
            figures |= {f"{name}/{path.name}": found[name] for name in ("token_accuracy", "changed_token_accuracy")}
        return figures | (self.subgoals.figures(first) if self.subgoals is not None else {})

    def _clean(self, window: WindowTokens, generator: torch.Generator) -> StateLogits:
        backbone = self.world.backbone
        positions = torch.arange(window.embeds_BLD.shape[1], device=self.world.device)
        hidden = backbone.core(window.embeds_BLD, positions, mask=None)
        return clean_logits(backbone, self.world.layout, hidden, window)

    def _noisy(self, path: StatePath, window: WindowTokens, generator: torch.Generator) -> StateLogits:
        return noisy_logits(self.world, window, path.source(window.before, generator)).noisy

    @torch.no_grad()
    def _average(self, predict: Callable[[WindowTokens, torch.Generator], StateLogits]) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)
        backbone, states = self.world.backbone, self.world.config.max_states
        training = backbone.training
        backbone.eval()
        right, changed, reward, error = [], [], [], []
        for _ in range(max(1, WINDOWS // self.config.batch)):
            batch = self.data.held_out.sample(self.config.batch, states, self.data.text_held_EL, generator)
            batch = batch.to(self.world.device)
            window = window_tokens(self.world, batch, 0.0, generator)
            logits = predict(window, generator)
            right.append(logits.frame.argmax(-1) == window.targets.codes_MN)
            changed.append(window.targets.changed_MN)
            foretold = self.world.reward.decode(expected_bin(logits.reward))
            reward.append(torch.stack([foretold, batch.reward_BT[:, 1:].flatten()]))
            felt = self.world.proprio.decode(expected_bin(logits.proprio))
            error.append((felt - batch.proprio_BTP[:, 1:].flatten(0, 1)).abs())
        backbone.train(training)
        errors_MP, known = torch.cat(error), len(self.world.config.proprio)
        hits, moved, pairs = torch.cat(right).float(), torch.cat(changed), torch.cat(reward, 1)
        pictured = {
            "token_accuracy": float(hits.mean()),
            "changed_token_accuracy": float(hits[moved].mean()),
            "changed_share": float(moved.float().mean()),
        }
        return {
            **(pictured if self.world.config.stream == "pictures" else {}),
            "reward_corr": float(torch.corrcoef(pairs)[0, 1]),
            "proprio_mae": float(errors_MP[:, :known].mean()),
            **({"object_mae": float(errors_MP[:, known:].mean())} if self.world.config.objects else {}),
        }
