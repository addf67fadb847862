"""The seams. Real and fake implementations satisfy them alike; nothing here imports a simulator or a network.

Shape letters: see ``emu_embodied.records``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from emu_embodied.records import Belief, Field, Frames, Imagination, Observation, Plan, Subgoal, Transition

if TYPE_CHECKING:
    import torch


@runtime_checkable
class FrameTokenizer(Protocol):
    """Frames of one camera to token ids (codes) and back."""

    def encode(self, frames: np.ndarray | torch.Tensor) -> torch.Tensor:
        """uint8 [B, height, width, 3] -> int64 codes [B, N] in [0, codebook size)."""
        ...

    def decode(self, codes: torch.Tensor) -> np.ndarray:
        """int64 codes [B, N] -> uint8 [B, height, width, 3]."""
        ...

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """int64 codes [..., N] -> float32 code vectors [..., N, code dim], the space goal distances are measured in."""
        ...


class Simulator(Protocol):
    """An environment whose state can be saved, restored and stepped in blocks of K env steps."""

    proprio_fields: tuple[Field, ...]
    object_fields: tuple[Field, ...]
    """What ``Observation.objects`` holds; empty where nothing is told."""
    block: int

    def snapshot(self) -> Any:
        """The complete state; stepping after ``restore`` gives the same bytes."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Return to a snapshot taken from this environment (same id, same episode)."""
        ...

    def step_block(self, actions_KA: np.ndarray, *, render: bool = True) -> Transition:
        """Apply K actions in [-1, 1]; frames are drawn only for the state reached, and only if ``render``."""
        ...

    def observe(self, *, render: bool = True) -> Observation:
        """The current state as an observation."""
        ...


class WorldModel(Protocol):
    """Predicts what a robot would see, feel and be rewarded for."""

    @property
    def block(self) -> int:
        """K, env steps in an action block [env steps]."""
        ...

    @property
    def horizon(self) -> int:
        """Blocks that one stretch of imagination covers."""
        ...

    @property
    def frames(self) -> FrameTokenizer:
        """Its vision tokenizer, whose code vectors distances between frames are measured with."""
        ...

    def encode_frames(self, frames: Frames) -> torch.Tensor:
        """Frames of one state -> int64 codes [N] of all its cameras."""
        ...

    def observe(self, history: Sequence[Observation], actions: Sequence[np.ndarray] = ()) -> Belief:
        """Encode a history and the ``len(history) - 1`` action blocks [K, A] between its observations."""
        ...

    def extend(self, belief: Belief, action_KA: np.ndarray, observation: Observation) -> Belief:
        """Append what really happened; nothing already in the belief is recomputed."""
        ...

    def imagine(
        self, belief: Belief, actions_SHKA: torch.Tensor, generator: torch.Generator | None = None
    ) -> Imagination:
        """Imagine S futures, one for each action sequence [H, K, A]."""
        ...

    def render(self, imagination: Imagination, plans: Sequence[int], horizons: Sequence[int]) -> Frames:
        """Decode imagined frames: camera -> uint8 [len(plans), len(horizons), height, width, 3]."""
        ...


@runtime_checkable
class SubgoalModel(Protocol):
    """Says what to do next, in words and pictures, from any state of a task."""

    def propose(
        self, observation: Observation, steps: int, generator: torch.Generator | None = None
    ) -> tuple[Subgoal, ...]:
        """The next subtasks, at most ``steps``; fewer where nothing is left to do after them, none where it is done."""
        ...


class Dynamics(Protocol):
    """What a planner's candidates are evaluated with: the learned model from a belief, or the true simulator."""

    def imagine(self, actions_SHKA: torch.Tensor, generator: torch.Generator | None = None) -> Imagination:
        """Run S action sequences from the current state."""
        ...


class Objective(Protocol):
    """What a good future is."""

    def __call__(self, imagination: Imagination) -> torch.Tensor:
        """Cost float32 [S], lower is better."""
        ...


class Evaluate(Protocol):
    """All that a planner sees of the world."""

    def __call__(self, actions_SHKA: torch.Tensor) -> torch.Tensor:
        """Cost float32 [S] of S action sequences in [-1, 1]."""
        ...


class Planner(Protocol):
    """Searches action sequences. Never sees a model."""

    def plan(self, evaluate: Evaluate, warm_start: torch.Tensor | None, generator: torch.Generator) -> Plan:
        """Search from ``warm_start`` (float32 [H, K, A], or None for a cold start)."""
        ...


class Policy(Protocol):
    """Chooses the next action block."""

    def reset(self, observation: Observation) -> None:
        """Start an episode."""
        ...

    def act(self, observation: Observation) -> np.ndarray:
        """The next action block, float32 [K, A] in [-1, 1]."""
        ...
