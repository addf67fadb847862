"""Exploring a world by words: one instruction and one picture at a time, or a free walk that the model narrates.

Emu3.5 was released without example prompts for this, and without a format for several instructions. Here the first
instruction stands in the official ``explore`` template, and each further one opens another turn of its conversation,
behind what was seen, told and shown before. Guidance compares with the pictures alone, as for the other tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from emu_embodied.decode.events import Event, Finished, ImageDone, Note
from emu_embodied.decode.guidance import RowPrompt
from emu_embodied.decode.interleaved import generate, guidance_of
from emu_embodied.decode.settings import GenerationSettings
from emu_embodied.decode.stream import StreamGrammar
from emu_embodied.interleaved import GenerationRequest, InterleavedModel
from emu_embodied.tokens.image_block import Markup, block_length

TEXT_ROOM = 512
"""Tokens of text that are kept free beside the next pictures [tokens]."""
_USUAL_SIZE = (45, 45)  # of pictures of 720 x 720 pixels, which exploration was tuned on


@dataclass(frozen=True, slots=True)
class _Turn:
    """One instruction and its answer; pictures are codes int64 [h, w]."""

    instruction: str
    seen: tuple[torch.Tensor, ...]
    answer: tuple[int, ...] = ()
    shown: tuple[torch.Tensor, ...] = ()


class Explorer:
    """A walk through an imagined world; what was said and shown so far is what the next step continues.

    Args:
        model: Emu3.5 with its tokenizers.
        settings: how to draw; None takes those of the ``explore`` task.
        generator: draws; needed unless the settings are greedy.

    Raises:
        ValueError: if the generator is missing.
    """

    def __init__(
        self,
        model: InterleavedModel,
        settings: GenerationSettings | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model = model
        self.settings = GenerationSettings.for_task("explore") if settings is None else settings
        if generator is None and not self.settings.greedy:
            raise ValueError("sampling needs a seeded torch.Generator: give one, or set greedy in the settings")
        self._generator = generator
        self._turns: list[_Turn] = []
        self._seen: list[torch.Tensor] = []

    @property
    def steps(self) -> int:
        """Instructions answered that are still remembered."""
        return len(self._turns)

    def see(self, image: np.ndarray) -> None:
        """Look at a picture, uint8 [height, width, 3], e.g. what an arm's camera shows now; the next step starts there.

        Raises:
            ValueError: if it is smaller than a cell.
        """
        self._seen.append(self.model.encode_image(image, self.settings.image_area))

    def step(self, instruction: str, *, pictures: int = 1, stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Follow one instruction until ``pictures`` pictures were shown; events end with ``Finished``.

        A stream that is not read to its end leaves the walk as it was.

        Args:
            instruction: where to go, what to look at; or, with more pictures, what to explore freely.
            pictures: how many to show.
            stop: asked before every token.

        Raises:
            ValueError: for an empty instruction, or if not even this turn fits the model's context.
        """
        if pictures < 1:
            raise ValueError(f"{pictures} pictures: a step shows at least 1")
        turn = _Turn(instruction, tuple(self._seen))
        GenerationRequest(task="explore", prompt=instruction)  # refuses what no prompt may be
        turns = [*self._turns, turn]
        needed = pictures * block_length(self._size(turns) or _USUAL_SIZE) + TEXT_ROOM
        context = self.model.backbone.config.max_position_embeddings
        forgotten = 0
        while len(self._rows(turns)[0].ids) + needed > context and len(turns) > 1:
            oldest, turns = turns[0], turns[1:]
            last = (*oldest.seen, *oldest.shown)[-1:]
            turns[0] = replace(turns[0], seen=(*last, *turns[0].seen))
            forgotten += 1
        if (length := len(self._rows(turns)[0].ids) + needed) > context:
            raise ValueError(
                f"{pictures} pictures need {length} tokens, the model reads {context}: ask for fewer or smaller ones"
            )
        return self._step(turns, pictures, stop, forgotten)

    def wander(self, prompt: str, steps: int, stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Explore freely for ``steps`` pictures: the model chooses where to go, and says so.

        A walk longer than the context goes on in a new turn with the same prompt; every turn ends with ``Finished``.

        Raises:
            ValueError: as ``step``.
        """
        if steps < 1:
            raise ValueError(f"{steps} steps: a walk has at least 1")
        left = steps
        while left:
            shown = 0
            for event in self.step(prompt, pictures=min(left, self._most_pictures(prompt)), stop=stop):
                shown += isinstance(event, ImageDone)
                yield event
                if isinstance(event, Finished) and event.reason == "stopped":
                    return
            if not shown:
                return
            left -= shown

    def _most_pictures(self, prompt: str) -> int:
        """How many pictures one turn has room for when all but the last picture is forgotten."""
        turn = _Turn(prompt, tuple(self._seen))
        block = block_length(self._size([*self._turns, turn]) or _USUAL_SIZE)
        free = self.model.backbone.config.max_position_embeddings - len(self._rows([turn])[0].ids) - TEXT_ROOM
        return max(1, free // block - 1)

    def _step(self, turns: list[_Turn], pictures: int, stop: Callable[[], bool], forgotten: int) -> Iterator[Event]:
        if forgotten:
            yield Note(
                f"the model's context is full: the first {forgotten} of its turns are forgotten, but for a picture"
            )
        model, size = self.model, self._size(turns)
        settings = replace(self.settings, max_images=pictures)
        grammar = StreamGrammar(model.markup, model.text.decode_bytes, size, settings.same_size)
        shown: list[torch.Tensor] = []
        for event in generate(model.backbone, grammar, self._rows(turns), settings, self._generator, stop):
            if isinstance(event, ImageDone):
                shown.append(event.codes)
                yield replace(event, pixels=model.decode_image(event.codes))
            elif isinstance(event, Finished):
                self._turns = [*turns[:-1], replace(turns[-1], answer=event.tokens, shown=tuple(shown))]
                self._seen = []
                yield event
            else:
                yield event

    def _size(self, turns: list[_Turn]) -> tuple[int, int] | None:
        """Size of the next pictures: as asked for, else that of the latest picture, else the model's choice."""
        latest = [codes for turn in turns for codes in (*turn.seen, *turn.shown)][-1:]
        if self.settings.size is not None or not self.settings.same_size or not latest:
            return self.settings.size
        return (latest[0].shape[0], latest[0].shape[1])

    def _rows(self, turns: list[_Turn]) -> list[RowPrompt]:
        """The conversation, its pictures without words, and nothing of it; as many as guidance compares."""
        model, markup = self.model, self.model.markup
        first = GenerationRequest(task="explore", prompt=turns[0].instruction)
        full, bare, nothing = (list(row.ids) for row in model.prompt_rows(first, turns[0].seen))
        for before, turn in pairwise(turns):
            full += [*_closed(before.answer, markup), *model.text.encode(f" USER: {turn.instruction}")]
            for codes in (*before.shown, *turn.seen):
                bare += markup.block(codes)
            for codes in turn.seen:
                full += markup.block(codes)
            full += [*model.text.encode(" ASSISTANT: "), markup.bss]
        return [RowPrompt(ids) for ids in (full, bare, nothing)][: guidance_of(self.settings).rows]


def _closed(answer: tuple[int, ...], markup: Markup) -> list[int]:
    """An answer as it stands before another turn: without an image that was broken off, and ended by ESS."""
    kept = list(answer)
    opened = max((i for i, token in enumerate(kept) if token == markup.boi), default=None)
    if opened is not None and markup.eoi not in kept[opened:]:
        kept = kept[:opened]
    while kept and kept[-1] in (markup.ess, markup.eos):
        kept.pop()
    return [*kept, markup.ess]
