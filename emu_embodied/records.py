"""What flows between the rooms: typed records instead of dictionaries.

Shape letters, used as suffixes here and in all tensor code: B batch, S candidate plans, H horizon in blocks,
K env steps in a block, A action dims, P proprio dims, O object dims, T tokens or blocks in time, N frame tokens of one
state (all cameras), C cameras, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

    from emu_embodied.models.cache import KVCache

Frames = dict[str, np.ndarray]
"""Camera name -> uint8 image [height, width, 3]."""

Stream = Literal["pictures", "numbers"]
"""What a state is written as: its frames and its numbers, or its numbers alone (proprio, objects, reward, success)."""


@dataclass(frozen=True, slots=True)
class Field:
    """One entry of a proprio vector: its name, unit and range."""

    name: str
    unit: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Observation:
    """What a robot sees between two action blocks.

    Attributes:
        frames: camera -> uint8 [height, width, 3]; empty when rendering was not asked for.
        proprio: float32 [P], in the units of the environment's ``proprio_fields``.
        instruction: what the robot was told to do.
        objects: float32 [O], where the things are that the task is about, in the units of the environment's
            ``object_fields``. The simulator's knowledge, for judges and as what is learned: no model reads it here.
    """

    frames: Frames
    proprio: np.ndarray
    instruction: str
    objects: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


@dataclass(frozen=True, slots=True)
class Transition:
    """The verdict of a simulator on one action block.

    Attributes:
        observation: the state reached.
        rewards_K: float32 [K], the reward of the state after every env step, each in [0, 1].
        terms: the named reward terms of the state reached, each in [0, 1].
        success: whether the state reached solves the task.
        success_any: whether any of the K states passed through does.
        truncated: whether the episode's step budget is used up.
    """

    observation: Observation
    rewards_K: np.ndarray
    terms: dict[str, float]
    success: bool
    success_any: bool
    truncated: bool


@dataclass(frozen=True, slots=True)
class Episode:
    """One recorded episode of T blocks (T + 1 states).

    Attributes:
        env_id: Gymnasium id it was recorded from, e.g. ``PandaPush-v0``.
        seed: the environment's reset seed.
        source: the behaviour that chose the actions: ``expert``, ``noisy``, ``random`` or ``play``.
        instruction: the instruction given.
        frames: camera -> uint8 [T + 1, height, width, 3].
        proprio_TP: float32 [T + 1, P].
        actions_TKA: float32 [T, K, A] in [-1, 1].
        rewards_TK: float32 [T, K].
        reward_T: float32 [T + 1], reward of each recorded state (a function of the state, so the first has one too).
        success_T: bool [T + 1].
        phases: T labels of what the behaviour was doing in each block (``approach``, ``grasp`` ...).
        objects_TO: float32 [T + 1, O], see ``Observation.objects``.
    """

    env_id: str
    seed: int
    source: str
    instruction: str
    frames: dict[str, np.ndarray]
    proprio_TP: np.ndarray
    actions_TKA: np.ndarray
    rewards_TK: np.ndarray
    reward_T: np.ndarray
    success_T: np.ndarray
    phases: tuple[str, ...]
    objects_TO: np.ndarray

    def __len__(self) -> int:
        """Number of blocks T."""
        return len(self.actions_TKA)


@dataclass(frozen=True, slots=True)
class Belief:
    """What a world model knows at a decision: the prefix KV cache, computed once and shared by all candidates.

    Attributes:
        cache: keys and values of the instruction and of every observed state and executed action (batch 1).
        tokens_N: int64 [N], frame tokens of the latest observed state.
        proprio_P: float32 [P], its proprio.
        objects_O: float32 [O], where the model sees the things that the task is about; empty if it knows of none.
        history: the observations in the cache, oldest first.
        actions: the action blocks between them, ``len(history) - 1`` arrays [K, A].
    """

    cache: KVCache
    tokens_N: torch.Tensor
    proprio_P: torch.Tensor
    objects_O: torch.Tensor
    history: tuple[Observation, ...]
    actions: tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True)
class Imagination:
    """S imagined (or simulated) futures of H blocks. No pixels: ``WorldModel.render`` makes those that are looked at.

    Attributes:
        tokens_SHN: int64 [S, H, N] frame tokens, or None where the true simulator ran without rendering, or a
            model in its stream of numbers.
        proprio_SHP: float32 [S, H, P] in the units of the environment.
        reward_SH: float32 [S, H], reward of each state reached, in [0, 1].
        success_SH: float32 [S, H], probability (or 0/1 from a simulator) that the state reached solves the task.
        objects_SHO: float32 [S, H, O], where the things are that the task is about; None where nothing is known of
            them.
    """

    tokens_SHN: torch.Tensor | None
    proprio_SHP: torch.Tensor
    reward_SH: torch.Tensor
    success_SH: torch.Tensor
    objects_SHO: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a planner decided.

    Attributes:
        actions_HKA: float32 [H, K, A] in [-1, 1].
        cost: the evaluated cost of these very actions.
        best_costs: per iteration, the lowest cost seen so far.
        evaluations: number of candidate sequences evaluated.
    """

    actions_HKA: torch.Tensor
    cost: float
    best_costs: tuple[float, ...] = ()
    evaluations: int = 0


@dataclass(frozen=True, slots=True)
class Subgoal:
    """A subtask: in words, and as the state that completes it. What a model cannot foretell is None.

    Attributes:
        text: its sentence.
        tokens_N: int64 [N], frame tokens of that state.
        proprio_P: float32 [P], its proprio in the units of the environment.
        reward: its reward in [0, 1].
        success: probability that it solves the task.
        frames: its pictures, where the model made them as pixels; else they are decoded from the tokens.
    """

    text: str
    tokens_N: torch.Tensor
    proprio_P: torch.Tensor | None = None
    reward: float | None = None
    success: float | None = None
    frames: Frames = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Meta:
    """Where a result or checkpoint comes from; written beside every one (see ``emu_embodied.provenance``)."""

    command: str
    seed: int | None = None
    data_hash: str | None = None
    revision: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
