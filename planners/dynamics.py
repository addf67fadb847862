"""Two dynamics behind one call: the learned model from a belief, and the true simulator from its present state."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from emu_embodied.protocols import Dynamics, Evaluate, Objective, Simulator, WorldModel
from emu_embodied.records import Belief, Frames, Imagination, Transition

Tokenize = Callable[[Frames], torch.Tensor]
"""Frames of one state -> int64 tokens [N]."""


class ImaginedDynamics:
    """The learned model, from one belief."""

    def __init__(self, world_model: WorldModel, belief: Belief):
        self.world_model = world_model
        self.belief = belief

    def imagine(self, actions_SHKA: torch.Tensor, generator: torch.Generator | None = None) -> Imagination:
        """Imagine S action sequences float32 [S, H, K, A] from the belief."""
        return self.world_model.imagine(self.belief, actions_SHKA, generator)

    def foresee(
        self, actions_HKA: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[Imagination, Frames]:
        """One future to look at: its imagination (S = 1) and its frames, camera -> uint8 [H, height, width, 3]."""
        imagination = self.imagine(actions_HKA[None], generator)
        frames = self.world_model.render(imagination, [0], range(len(actions_HKA)))
        return imagination, {camera: images[0] for camera, images in frames.items()}


class TrueDynamics:
    """The simulator itself, from the state it is in; it is back in that state when a call returns or raises.

    Args:
        simulator: what the actions are tried on.
        tokenize: makes the tokens of a state reached; without it nothing is rendered and there are no tokens.
    """

    def __init__(self, simulator: Simulator, tokenize: Tokenize | None = None):
        self.simulator = simulator
        self.tokenize = tokenize

    def imagine(self, actions_SHKA: torch.Tensor, generator: torch.Generator | None = None) -> Imagination:
        """Simulate S action sequences float32 [S, H, K, A]; the generator is not used, the simulator is exact."""
        futures = self._simulate(actions_SHKA, render=self.tokenize is not None)
        return self._imagination(futures)

    def foresee(
        self, actions_HKA: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[Imagination, Frames]:
        """One future to look at: its imagination (S = 1) and its frames, camera -> uint8 [H, height, width, 3]."""
        [future] = self._simulate(actions_HKA[None], render=True)
        cameras = future[0].observation.frames
        frames = {camera: np.stack([step.observation.frames[camera] for step in future]) for camera in cameras}
        return self._imagination([future]), frames

    def _imagination(self, futures: list[list[Transition]]) -> Imagination:
        tokens = None
        if self.tokenize is not None:
            tokens = torch.stack(
                [torch.stack([self.tokenize(step.observation.frames) for step in future]) for future in futures]
            )
        proprio, objects = (
            np.array([[getattr(step.observation, name) for step in future] for future in futures], np.float32)
            for name in ("proprio", "objects")
        )
        return Imagination(
            tokens_SHN=tokens,
            proprio_SHP=torch.from_numpy(proprio),
            reward_SH=torch.tensor([[float(step.rewards_K[-1]) for step in future] for future in futures]),
            success_SH=torch.tensor([[float(step.success) for step in future] for future in futures]),
            objects_SHO=torch.from_numpy(objects),
        )

    def _simulate(self, actions_SHKA: torch.Tensor, *, render: bool) -> list[list[Transition]]:
        plans = actions_SHKA.detach().cpu().numpy().astype(np.float32, copy=False)
        present = self.simulator.snapshot()
        futures = []
        try:
            for actions_HKA in plans:
                self.simulator.restore(present)
                futures.append([self.simulator.step_block(action_KA, render=render) for action_KA in actions_HKA])
        finally:
            self.simulator.restore(present)
        return futures


def evaluator(dynamics: Dynamics, objective: Objective, generator: torch.Generator | None = None) -> Evaluate:
    """What a planner is given: ``objective`` of ``dynamics.imagine``, so that it sees neither."""

    def evaluate(actions_SHKA: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return objective(dynamics.imagine(actions_SHKA, generator))

    return evaluate
