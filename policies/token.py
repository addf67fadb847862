"""The backbone acts by itself: it emits the action tokens of the next block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from emu_embodied.records import Observation

if TYPE_CHECKING:
    from emu_embodied.acting import Actor, Situations


@dataclass(frozen=True, kw_only=True, slots=True)
class ActingSettings:
    """How the token policy decides."""

    temperature: float = 0.0
    """Of the draw of action tokens; 0 takes the most likely."""
    context_states: int | None = None
    """Latest states it looks at [states]; what the checkpoint was cloned with by default (``acting.Actor``)."""

    def __post_init__(self) -> None:
        """Check the temperature; how many states are known is the weights' to say.

        Raises:
            ValueError: if it is negative.
        """
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}, it has to be at least 0")


class TokenPolicy:
    """Acts in one environment.

    Args:
        actor: emits the tokens.
        temperature: of the draw, at least 0.
        seed: of the draw; every episode starts from it.
    """

    def __init__(self, actor: Actor, *, temperature: float = 0.0, seed: int = 0) -> None:
        self.actor = actor
        self.temperature = temperature
        self.seed = seed
        self._generator = torch.Generator()
        self._situation: Situations | None = None
        self._action_KA: np.ndarray | None = None

    def reset(self, observation: Observation) -> None:
        """Start an episode."""
        self._generator.manual_seed(self.seed)
        self._situation, self._action_KA = None, None

    def act(self, observation: Observation) -> np.ndarray:
        """The next block float32 [K, A]; the one returned before is taken to have led to ``observation``."""
        if self._situation is None or self._action_KA is None:
            self._situation = self.actor.see([observation])
        else:
            self._situation = self.actor.follow(self._situation, self._action_KA[None], [observation])
        sample = self.actor.act(self._situation, self._generator, self.temperature)
        self._action_KA = sample.actions_BKA[0].cpu().numpy()
        return self._action_KA
