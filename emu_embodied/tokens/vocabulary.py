"""Id ranges of one shared vocabulary: text | special | vision | action | state | reward | success.

Our presets lay the ranges out one after another. Emu3.5's released ids are another instance of the same record: text
and special ids and the 131,072 visual codes where BAAI put them; the ranges that its vocabulary has no place for
(action, state, reward, success) reuse the least frequent BPE ids at the end of the text range, as BAAI's UniVLA did for
actions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class IdRange:
    """Consecutive ids ``start .. start + size - 1``."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        """One past the last id."""
        return self.start + self.size

    def ids(self, local: torch.Tensor) -> torch.Tensor:
        """Local indices in [0, size) -> vocabulary ids."""
        return local + self.start

    def local(self, ids: torch.Tensor) -> torch.Tensor:
        """Vocabulary ids -> local indices.

        Raises:
            ValueError: if an id lies outside the range.
        """
        local = ids - self.start
        if bool(((local < 0) | (local >= self.size)).any()):
            raise ValueError(f"ids outside [{self.start}, {self.stop}): the sequence is not laid out as expected")
        return local


SPECIALS = ("pad", "bos", "eos", "boi", "eoi", "boa", "reward", "success")
"""``boi`` opens a camera's tokens, ``boa`` an action block; ``reward`` and ``success`` fill the slots where those are
read out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """Where every kind of token lives.

    Attributes:
        special: special token name -> id, for the names in ``SPECIALS``.
    """

    text: IdRange
    special: dict[str, int]
    vision: IdRange
    action: IdRange
    state: IdRange
    reward: IdRange
    success: IdRange
    size: int

    @classmethod
    def compact(cls, *, text: int, vision: int, action: int, state: int, reward: int) -> Vocabulary:
        """The ranges one after another, with the given sizes."""
        starts, total = [], 0
        for size in (text, len(SPECIALS), vision, action, state, reward, 2):
            starts.append(IdRange(total, size))
            total += size
        text_r, special_r, vision_r, action_r, state_r, reward_r, success_r = starts
        return cls(
            text=text_r,
            special={name: special_r.start + i for i, name in enumerate(SPECIALS)},
            vision=vision_r,
            action=action_r,
            state=state_r,
            reward=reward_r,
            success=success_r,
            size=total,
        )

    @classmethod
    def emu35(cls, *, vision: int = 131_072, action: int = 256, state: int = 256, reward: int = 64) -> Vocabulary:
        """The ids of BAAI's released model (282,926 of them), with the given numbers of codes and bins."""
        bpe_end = 151_643
        success_r = IdRange(bpe_end - 2, 2)
        reward_r = IdRange(success_r.start - reward, reward)
        state_r = IdRange(reward_r.start - state, state)
        return cls(
            text=IdRange(0, bpe_end),
            special={
                "pad": 151_643,
                "bos": 151_849,
                "eos": 151_850,
                "boi": 151_852,
                "eoi": 151_853,
                "boa": 151_844,
                "reward": 151_841,
                "success": 151_842,
            },
            vision=IdRange(151_854, vision),
            action=IdRange(state_r.start - action, action),
            state=state_r,
            reward=reward_r,
            success=success_r,
            size=151_854 + vision,
        )
