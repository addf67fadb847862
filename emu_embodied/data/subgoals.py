"""Subtasks and their keyframes in recorded episodes, and the windows that a model learns to name and picture them from.

A *subtask* is a phase of a demonstration; its *keyframe* is the state in which the demonstration has completed it
(Emu3.5, section 6: the observation at the end of a segment).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from emu_embodied.data.batches import TokenDataset

Subtasks = Callable[[str], Mapping[str, str]]
"""Instruction -> phase -> sentence, phases in the order in which they bring the task forward (empty: it has none)."""

DONE = 0
"""Number of the sentence that says nothing: there is nothing left to do."""
UNKNOWN = -1
"""Instead of a sentence's number: nobody showed how to go on from this state."""

DONE_SHARE = 0.1
"""Share of windows that start where nothing is left to do; most recorded states are such."""


@dataclass(frozen=True, slots=True)
class SubgoalBatch:
    """B windows of a state and the n subtasks that follow, each with its keyframe (T = n + 1 states).

    Attributes:
        text_BL: int64 text segments of the instructions.
        subtasks_BTL: int64 [B, n, text_tokens] text segments of the subtasks; where nothing follows, a segment that
            begins with ``eos``.
        codes_BTN: int64 frame codes of the states.
        proprio_BTP: float32, in the environment's units.
        reward_BT: float32 in [0, 1].
        success_BT: bool.
        follows_BT: int64, number of the sentence that follows each state: ``DONE``, or ``UNKNOWN`` where that is not
            known or the window has ended before.
    """

    text_BL: torch.Tensor
    subtasks_BTL: torch.Tensor
    codes_BTN: torch.Tensor
    proprio_BTP: torch.Tensor
    reward_BT: torch.Tensor
    success_BT: torch.Tensor
    follows_BT: torch.Tensor

    @property
    def shown_BT(self) -> torch.Tensor:
        """Bool [B, n]: whether a subtask of the window is one, and its keyframe was seen."""
        return self.follows_BT[:, :-1] > DONE

    def to(self, device: torch.device) -> SubgoalBatch:
        """The same batch on another device."""
        return SubgoalBatch(*(getattr(self, name).to(device) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class SubgoalIndex:
    """Where the subtasks of a dataset part begin and end.

    Attributes:
        tokens: the dataset part.
        sentences: all sentences; number ``DONE`` is empty.
        follows_M: int64 [M], number of the sentence of the subtask underway in each row, ``DONE`` or ``UNKNOWN``.
        keyframe_M: int64 [M], row of the keyframe of that subtask; the row itself where there is none.
        starts_W: int64 rows that windows start from, all whose sentence is known.
        episode_W: int64, their episodes.
        weight_W: float32, how often they are drawn: every environment alike, ``DONE_SHARE`` of them done, the others in
            proportion to the blocks that are left to their keyframe.
    """

    tokens: TokenDataset
    sentences: tuple[str, ...]
    follows_M: torch.Tensor
    keyframe_M: torch.Tensor
    starts_W: torch.Tensor
    episode_W: torch.Tensor
    weight_W: torch.Tensor

    @classmethod
    def build(cls, tokens: TokenDataset, subtasks: Subtasks) -> SubgoalIndex:
        """Find the subtasks of all episodes that are worth imitating and succeed."""
        rows = len(tokens.reward_M)
        numbers: dict[str, int] = {"": DONE}
        follows_M = torch.full((rows,), UNKNOWN)
        keyframe_M = torch.arange(rows)
        starts, episodes = [], []
        for episode, instruction in enumerate(tokens.instructions):
            first, length = int(tokens.first_E[episode]), int(tokens.length_E[episode])
            success_T = tokens.success_M[first : first + length].tolist()
            if not tokens.imitate_E[episode] or not any(success_T):
                continue
            sentences = subtasks(instruction)
            found = segments(tokens.phases[episode], success_T, tuple(sentences))
            for state, (phase, keyframe) in enumerate(found):
                if phase is None:
                    continue
                follows_M[first + state] = numbers.setdefault(sentences.get(phase, ""), len(numbers))
                keyframe_M[first + state] = first + keyframe
                starts.append(first + state)
                episodes.append(episode)
        starts_W, episode_W = torch.tensor(starts, dtype=torch.long), torch.tensor(episodes, dtype=torch.long)
        weight_W = _weights(tokens.env_E[episode_W], keyframe_M[starts_W] - starts_W)
        return cls(tokens, tuple(numbers), follows_M, keyframe_M, starts_W, episode_W, weight_W)

    def sample(
        self,
        batch: int,
        steps: int,
        text_ids_EL: torch.Tensor,
        sentence_ids_SL: torch.Tensor,
        generator: torch.Generator,
    ) -> SubgoalBatch:
        """Draw windows from any known state of any demonstration.

        Args:
            batch: B.
            steps: subtasks n in a window.
            text_ids_EL: text segments of this part's episodes.
            sentence_ids_SL: text segments of ``sentences``.
            generator: CPU generator.
        """
        drawn = torch.multinomial(self.weight_W, batch, replacement=True, generator=generator)
        rows = [self.starts_W[drawn]]
        for _ in range(steps):
            rows.append(self.keyframe_M[rows[-1]])
        rows_BT = torch.stack(rows, 1)
        follows_BT = self.follows_M[rows_BT]
        # What comes after the end, or after a gap in what is known, is not part of the window.
        over_BT = (follows_BT <= DONE).int().cummax(1).values.bool()
        follows_BT[:, 1:][over_BT[:, :-1]] = UNKNOWN
        tokens = self.tokens
        return SubgoalBatch(
            text_ids_EL[self.episode_W[drawn]],
            sentence_ids_SL[follows_BT[:, :-1].clamp(min=DONE)],
            tokens.codes_MN[rows_BT].long(),
            tokens.proprio_MP[rows_BT],
            tokens.reward_M[rows_BT],
            tokens.success_M[rows_BT],
            follows_BT,
        )


def segments(phases: Sequence[str], success_T: Sequence[bool], order: Sequence[str]) -> list[tuple[str | None, int]]:
    """The subtask underway in each state of an episode, and the state that completes it.

    Blocks of one phase in a row are one subtask. Blocks whose phase is no subtask (noise that lasted a while) belong to
    the subtask that they interrupted. A subtask is complete where the task is, or where one that is later in ``order``
    begins; one that is followed by an earlier one has failed, and what should have come of it was not seen.

    Args:
        phases: T labels.
        success_T: T + 1 flags.
        order: phases that are subtasks, in the order in which they bring the task forward.

    Returns:
        (phase, state) for each of the T + 1 states: the phase is ``""`` where the task is done and None where the way
        on is not known; the state is its own number in both cases.
    """
    ranks = {phase: rank for rank, phase in enumerate(order)}
    known = [ranks.get(phase) for phase in phases]
    for t in range(1, len(known)):
        known[t] = known[t - 1] if known[t] is None else known[t]
    for t in reversed(range(len(known) - 1)):
        known[t] = known[t + 1] if known[t] is None else known[t]
    last = len(phases)
    found: list[tuple[str | None, int]] = [(None, t) for t in range(last + 1)]
    for t in reversed(range(last + 1)):
        rank = known[t] if t < last else None
        if success_T[t]:
            found[t] = ("", t)
        elif rank is None or t + 1 > last:
            continue
        elif success_T[t + 1]:
            found[t] = (order[rank], t + 1)
        elif t + 1 < last and (after := known[t + 1]) is not None:
            if after > rank:
                found[t] = (order[rank], t + 1)
            elif after == rank and found[t + 1][0] is not None:
                found[t] = (order[rank], found[t + 1][1])
    return found


def _weights(env_W: torch.Tensor, blocks_W: torch.Tensor) -> torch.Tensor:
    """How often windows are drawn whose keyframe is ``blocks_W`` blocks away; 0 blocks: nothing is left to do.

    Proportional to the blocks: near its keyframe an arm in motion shows where it is going, and nothing has to be looked
    for; far from it the instruction and the picture decide.
    """
    weight_W = torch.zeros(len(env_W))
    for env in env_W.unique():
        for done, share in ((True, DONE_SHARE), (False, 1 - DONE_SHARE)):
            chosen_W = (env_W == env) & ((blocks_W == 0) == done)
            parts = blocks_W[chosen_W].float().clamp(min=1)
            weight_W[chosen_W] = share * parts / parts.sum().clamp(min=1)
    return weight_W
