"""Interleaving and parsing: the only file that knows the order of tokens.

    sequence := text  state  (action  state)*
              | text  state  (text  state)*  [eos]
    text     := bos  <text_length bytes, padded>
    state    := (boi <N_c codes>) for each camera   <P proprio bins>  reward  success
                (or each camera's codes in Emu3.5's own image block, see ``image_format``)
    action   := boa  <A action bins>

What follows a state says which role the model plays: ``boa`` the world (an action, and the state it leads to), ``bos``
the planner (the sentence of a subtask, and the state that completes it), ``eos`` that nothing is left to do.

As in Emu3.5 the logits at position j predict the token at j + 1. The ``reward`` and ``success`` slots hold fixed
special tokens: their values are read out (at the position before the slot), never fed back, so that an agent needs no
reward from the world it acts in and an imagined reward cannot feed on an earlier one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from emu_embodied.tokens.image_format import ImageFormat
from emu_embodied.tokens.vocabulary import IdRange, Vocabulary

MASKED = -1
"""In place of a code or bin: a slot without content, embedded as the special token ``pad``."""


@dataclass(frozen=True, slots=True)
class StateTokens:
    """The tokens of states that carry information, as local ids.

    Attributes:
        codes: int64 frame codes [..., N].
        proprio: int64 bins [..., P].
    """

    codes: torch.Tensor
    proprio: torch.Tensor

    def expand(self, count: int) -> StateTokens:
        """One state ([N], [P]) as ``count`` equal ones, without copying."""
        return StateTokens(self.codes.expand(count, -1), self.proprio.expand(count, -1))


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceLayout:
    """Where everything stands. Lengths and offsets in tokens.

    Attributes:
        vocabulary: the id ranges.
        text_length: bytes (with Emu3.5's ids, tokens) reserved for the instruction; shorter ones are padded, longer
            ones refused.
        cameras: camera names, in order.
        camera_tokens: codes N_c of one camera's frame.
        num_proprio: P, and after them O where the model writes down where it sees the objects (see ``WorldModel``).
        action_dim: A.
        image: fixed ids around and between the codes of a frame; None for ``boi`` before them and no others.
        changes: whether proprio bins are read out as moves from those of the state before; what is written in the
            stream is the bins themselves in any case.
    """

    vocabulary: Vocabulary
    text_length: int
    cameras: tuple[str, ...]
    camera_tokens: int
    num_proprio: int
    action_dim: int
    image: ImageFormat | None = None
    changes: bool = False

    @property
    def text_tokens(self) -> int:
        """Length of the text segment."""
        return 1 + self.text_length

    @property
    def state_tokens(self) -> int:
        """Length of a state segment."""
        return len(self.cameras) * self._camera_length + self.num_proprio + 2

    @property
    def action_tokens(self) -> int:
        """Length of an action segment."""
        return 1 + self.action_dim

    @property
    def step_tokens(self) -> int:
        """Length of a state and the action after it."""
        return self.state_tokens + self.action_tokens

    @property
    def subgoal_tokens(self) -> int:
        """Length of a subtask's sentence and the state that completes it."""
        return self.text_tokens + self.state_tokens

    @property
    def follow_ids(self) -> IdRange:
        """What may follow a state in the planner's role: ``bos``, a subtask, or ``eos``, nothing."""
        return IdRange(self.vocabulary.special["bos"], 2)

    @property
    def sentence_ids(self) -> IdRange:
        """What may stand in a sentence: text, or as the last of the range ``pad``, which ends it."""
        return IdRange(self.vocabulary.text.start, self.vocabulary.text.size + 1)

    @property
    def frame_slots(self) -> torch.Tensor:
        """int64 [N]: where in a state the codes of all cameras stand."""
        return (self._camera_starts[:, None] + self._format.slots(self.camera_tokens)).flatten()

    @property
    def proprio_slots(self) -> torch.Tensor:
        """int64 [P]: where in a state the proprio bins stand."""
        return torch.arange(self.num_proprio) + self.reward_slot - self.num_proprio

    @property
    def reward_slot(self) -> int:
        """Where in a state the reward is read out."""
        return self.state_tokens - 2

    @property
    def success_slot(self) -> int:
        """Where in a state success is read out."""
        return self.state_tokens - 1

    def state_offset(self, index: int) -> int:
        """Position of the first token of state ``index``."""
        return self.text_tokens + index * self.step_tokens

    def action_offset(self, index: int) -> int:
        """Position of the first token of the action after state ``index``."""
        return self.state_offset(index) + self.state_tokens

    def length(self, num_states: int) -> int:
        """Tokens of a sequence that ends with a state."""
        return self.state_offset(num_states - 1) + self.state_tokens

    def keyframe_offset(self, index: int) -> int:
        """Position of the first token of keyframe ``index`` in a sequence of subtasks."""
        return self.text_tokens + (index + 1) * self.subgoal_tokens

    def subgoal_length(self, steps: int) -> int:
        """Tokens of a sequence of ``steps`` subtasks that ends with a state."""
        return self.keyframe_offset(steps - 1) + self.state_tokens

    def readouts(self) -> tuple[tuple[str, torch.Tensor, IdRange], ...]:
        """(kind, positions in the state whose logits predict it, the ids it may take): the grammar of a state."""
        v = self.vocabulary
        return (
            ("frame", self.frame_slots - 1, v.vision),
            ("proprio", self.proprio_slots - 1, v.state),
            ("reward", torch.tensor([self.reward_slot - 1]), v.reward),
            ("success", torch.tensor([self.success_slot - 1]), v.success),
        )

    def text_ids(self, text: list[int]) -> torch.Tensor:
        """Ids of an instruction's bytes -> int64 [text_tokens].

        Raises:
            ValueError: if the instruction is longer than ``text_length``.
        """
        if len(text) > self.text_length:
            unit = "bytes" if self.image is None else "tokens"
            raise ValueError(f"instruction of {len(text)} {unit}; this model reads at most {self.text_length}")
        special = self.vocabulary.special
        padding = [special["pad"]] * (self.text_length - len(text))
        return torch.tensor([special["bos"], *text, *padding])

    def end_ids(self) -> torch.Tensor:
        """What stands in a subtask's place where nothing is left to do -> int64 [text_tokens]."""
        special = self.vocabulary.special
        return torch.tensor([special["eos"], *[special["pad"]] * self.text_length])

    def state_ids(self, codes_N: torch.Tensor, proprio_P: torch.Tensor) -> torch.Tensor:
        """Codes [..., N] and proprio bins [..., P], ``MASKED`` where there is none -> int64 [..., state_tokens]."""
        v = self.vocabulary
        ids = torch.empty(*codes_N.shape[:-1], self.state_tokens, dtype=torch.long, device=codes_N.device)
        for place, token in self._format.fixed(self.camera_tokens):
            ids[..., self._camera_starts + place] = token
        ids[..., self.frame_slots] = self._ids(v.vision, codes_N.long())
        ids[..., self.proprio_slots] = self._ids(v.state, proprio_P.long())
        ids[..., self.reward_slot] = v.special["reward"]
        ids[..., self.success_slot] = v.special["success"]
        return ids

    @property
    def _format(self) -> ImageFormat:
        return ImageFormat((self.vocabulary.special["boi"],)) if self.image is None else self.image

    @property
    def _camera_length(self) -> int:
        return self._format.length(self.camera_tokens)

    @property
    def _camera_starts(self) -> torch.Tensor:
        return torch.arange(len(self.cameras)) * self._camera_length

    def _ids(self, span: IdRange, local: torch.Tensor) -> torch.Tensor:
        return torch.where(local == MASKED, self.vocabulary.special["pad"], span.ids(local))

    def parse_state(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [..., state_tokens] -> codes [..., N], proprio bins [..., P].

        Raises:
            ValueError: if a slot holds an id of another kind.
        """
        v = self.vocabulary
        return v.vision.local(ids[..., self.frame_slots]), v.state.local(ids[..., self.proprio_slots])

    def action_ids(self, bins_A: torch.Tensor) -> torch.Tensor:
        """Action bins [..., A] -> int64 [..., action_tokens]."""
        boa = torch.full((*bins_A.shape[:-1], 1), self.vocabulary.special["boa"], device=bins_A.device)
        return torch.cat([boa, self.vocabulary.action.ids(bins_A.long())], -1)

    def interleave(self, text_BL: torch.Tensor, states_BTL: torch.Tensor, between_BTL: torch.Tensor) -> torch.Tensor:
        """Put segments in order.

        Args:
            text_BL: [B, text_tokens, ...]; ids, or vectors with their width as last dimension.
            states_BTL: [B, T, state_tokens, ...].
            between_BTL: [B, T - 1, action_tokens, ...], or in the planner's role [B, T - 1, text_tokens, ...].

        Returns:
            [B, length(T), ...]; in the planner's role [B, subgoal_length(T - 1), ...].
        """
        steps = torch.cat([states_BTL[:, :-1], between_BTL], 2).flatten(1, 2)
        return torch.cat([text_BL, steps, states_BTL[:, -1]], 1)

    def parse(self, stream_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Undo ``interleave``: [B, length(T), ...] -> text, states and actions, shaped as it takes them.

        Raises:
            ValueError: if the length is not that of a sequence which ends with a state.
        """
        return self._parse(stream_BL, self.action_tokens)

    def parse_subgoals(self, stream_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Undo ``interleave`` in the planner's role: text, states and subtasks.

        Raises:
            ValueError: if the length is not that of a sequence which ends with a state.
        """
        return self._parse(stream_BL, self.text_tokens)

    def _parse(self, stream_BL: torch.Tensor, between: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        length, step = stream_BL.shape[1], self.state_tokens + between
        num_steps, rest = divmod(length - self.length(1), step)
        if num_steps < 0 or rest:
            raise ValueError(
                f"{length} tokens are no sequence: one of T states has {self.length(1)} + (T - 1) x {step}"
            )
        text, last = stream_BL[:, : self.text_tokens], stream_BL[:, -self.state_tokens :]
        steps = stream_BL[:, self.text_tokens : length - self.state_tokens]
        steps = steps.unflatten(1, (num_steps, step))
        states = torch.cat([steps[:, :, : self.state_tokens], last[:, None]], 1)
        return text, states, steps[:, :, self.state_tokens :]
