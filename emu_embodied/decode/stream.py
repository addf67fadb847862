"""The grammar of interleaved text and images, token by token: what may follow, and what the tokens say.

One state machine serves generation (it says what may come next) and reading (it makes events of whatever comes, well
formed or not)::

    answer = [BOG plan EOG] (text | [BOC thought EOC] image)* ESS EOS
    image  = BOI h*w IMG row EOL ... row EOI
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from emu_embodied.decode.events import Event, ImageDone, ImageStarted, Note, TextChunk, TextKind
from emu_embodied.tokens.image_block import Markup
from emu_embodied.tokens.vocabulary import IdRange

ToBytes = Callable[[Sequence[int]], bytes]
"""Bytes of text ids, ``TextTokenizer.decode_bytes``."""


@dataclass(frozen=True, slots=True)
class Step:
    """What may come next.

    Attributes:
        part: ``text``, the ``size`` of an image, or its ``visual`` tokens (row and image ends included).
        ids: from which ids; one single id where the grammar leaves no choice.
    """

    part: Literal["text", "size", "visual"]
    ids: IdRange

    @property
    def forced(self) -> int | None:
        """The only id possible, or None."""
        return self.ids.start if self.ids.size == 1 else None


class StreamGrammar:
    """Where one stream stands. A batch of streams is a list of these; a token costs a few Python operations.

    Args:
        markup: the ids that give structure.
        to_bytes: bytes of text ids.
        size: (rows, columns) that every image must have; None leaves the first one's size open.
        same_size: whether the images after the first must have its size.

    Attributes:
        images: complete images so far.
        started: images begun so far.
        ended: whether EOS came.
    """

    def __init__(
        self, markup: Markup, to_bytes: ToBytes, size: tuple[int, int] | None = None, same_size: bool = True
    ) -> None:
        self.markup = markup
        self.images = 0
        self.started = 0
        self.ended = False
        self._to_bytes = to_bytes
        self._size = size
        self._same_size = same_size
        self._kind: TextKind = "text"
        self._partial = codecs.getincrementaldecoder("utf-8")("replace")
        self._header: list[int] | None = None  # ids since BOI, while an image's size is written
        self._rows: list[list[int]] | None = None  # codes so far, while an image's body is written
        self._stated: tuple[int, int] | None = None  # the size that the image's header gave
        self._lost = False  # whether the last token was one that stands where it may not, so that a run is noted once
        self._opens = {markup.bog: "global_cot", markup.boc: "image_cot"}
        self._closes = {markup.eog: "global_cot", markup.eoc: "image_cot"}
        self._stray = {markup.img: "IMG", markup.eol: "EOL", markup.eoi: "EOI"}

    @property
    def in_image(self) -> bool:
        """Whether the next token belongs to an image that BOI opened."""
        return self._header is not None or self._rows is not None

    def step(self) -> Step:
        """What may come next, as the official code has it: text may hold any token below the visual ones."""
        markup = self.markup
        if self._rows is not None:
            rows, columns = self._stated or (1, 1)
            if len(self._rows[-1]) < columns:
                return Step("visual", markup.vision)
            return Step("visual", _only(markup.eol if len(self._rows) < rows else markup.eoi))
        if self._header is None:
            return Step("text", markup.text)
        place = len(self._header)
        if self._size is not None:
            return Step("size", _only([*markup.size_ids(self._size), markup.img][place]))
        # A free size has two digits on each side, and none starts with 0.
        free = {0: IdRange(markup.digits.start + 1, 9), 1: markup.digits, 2: _only(markup.times)}
        free |= {3: free[0], 4: free[1], 5: _only(markup.img)}
        return Step("size", free[place])

    def push(self, token: int) -> list[Event]:
        """Take in the next token, whatever it is.

        Returns:
            What it completes, in order; often nothing.
        """
        if self._header is not None:
            return self._push_header(token)
        if self._rows is not None:
            return self._push_body(token)
        return self._push_text(token)

    def close(self) -> list[Event]:
        """The stream ends here: the text that was held back, and notes on what is incomplete."""
        events = self._flush()
        if self._header is not None:
            events.append(Note("the stream ends in an image's size: no image was made of it"))
        elif self._rows is not None:
            events += self._finish_image("the stream ends")
        elif self._kind != "text":
            events.append(Note(f"the stream ends within a thought ({self._kind}) that was not closed"))
        self._header = self._rows = None
        return events

    def _push_text(self, token: int) -> list[Event]:
        markup = self.markup
        if token in self._stray or not 0 <= token < markup.text.stop:
            what = self._stray.get(
                token, "a visual token" if markup.text.stop <= token < markup.vision.stop else "an id"
            )
            noted, self._lost = self._lost, True
            return [] if noted else [Note(f"{what} ({token}) stands where text belongs: left out")]
        self._lost = False
        if token == markup.boi:
            events = [*self._flush(), *self._leave_thought()]
            self._header, self._stated = [], None
            self.started += 1
            return events
        if token in self._opens:
            events = [*self._flush(), *self._leave_thought()]
            self._kind = "global_cot" if token == markup.bog else "image_cot"
            return events
        if token in self._closes:
            if self._closes[token] != self._kind:
                return [Note(f"the end of a thought ({self._closes[token]}) that was not open: left out")]
            text = self._partial.decode(b"", True)
            closed = TextChunk(text, self._kind, ends=True)
            self._partial.reset()
            self._kind = "text"
            return [closed]
        if token in (markup.bos, markup.bss, markup.ess, markup.eos):
            events = self._flush()
            if token == markup.eos:
                self.ended = True
                events += self._leave_thought()
            return events
        text = self._partial.decode(self._to_bytes([token]))
        return [TextChunk(text, self._kind)] if text else []

    def _push_header(self, token: int) -> list[Event]:
        markup = self.markup
        assert self._header is not None
        if token == markup.times or markup.digits.start <= token < markup.digits.stop:
            self._header.append(token)
            return []
        self._stated = markup.read_size(self._header)
        if token == markup.img and self._stated is not None:
            self._header, self._rows = None, [[]]
            if self._same_size and self._size is None:
                self._size = self._stated
            return [ImageStarted(self.images, self._stated)]
        self._header = None
        if token in (markup.img, markup.eol) or markup.text.stop <= token < markup.vision.stop:
            self._rows = [[]]
            self._stated = None
            note = Note("an image does not say its size: its rows are taken as they come")
            return [note, *(self._push_body(token) if token != markup.img else [])]
        end = [] if token == markup.eoi else self._push_text(token)
        return [Note("an image ends before its first code: left out"), *end]

    def _push_body(self, token: int) -> list[Event]:
        markup = self.markup
        assert self._rows is not None
        if markup.text.stop <= token < markup.vision.stop:
            self._rows[-1].append(token - markup.vision.start)
            return []
        if token == markup.eol:
            self._rows.append([])
            return []
        if token == markup.eoi:
            return self._finish_image()
        return [*self._finish_image("text follows"), *self._push_text(token)]

    def _finish_image(self, interrupted: str = "") -> list[Event]:
        """Make an image of the rows that are there if they form a grid, as the official decoder does."""
        assert self._rows is not None
        rows, stated = [row for row in self._rows if row], self._stated
        self._rows = None
        found = (len(rows), len(rows[0]) if rows else 0)
        even = bool(rows) and all(len(row) == found[1] for row in rows)
        if not even or (interrupted and found != stated):
            whole = sum(len(row) == stated[1] for row in rows) if stated else len(rows)
            why = f"{interrupted} before its end" if interrupted else "its rows differ in length"
            of = f" of {stated[0]}" if stated else ""
            return [Note(f"image {self.images} is left out: {why} ({whole}{of} rows)")]
        done = ImageDone(self.images, torch.tensor(rows, dtype=torch.long))
        self.images += 1
        if interrupted:
            return [done, Note(f"image {done.index} has all its codes but no EOI: {interrupted}")]
        if stated is not None and found != stated:
            return [
                done,
                Note(f"image {done.index} says {stated[0]} x {stated[1]} codes, it has {found[0]} x {found[1]}"),
            ]
        return [done]

    def _flush(self) -> list[Event]:
        """Text that was held back because its last character is incomplete."""
        text = self._partial.decode(b"", True)
        self._partial.reset()
        return [TextChunk(text, self._kind)] if text else []

    def _leave_thought(self) -> list[Event]:
        if self._kind == "text":
            return []
        note = Note(f"a thought ({self._kind}) was not closed")
        self._kind = "text"
        return [note]


def _only(token: int) -> IdRange:
    return IdRange(token, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One part of an answer.

    Attributes:
        kind: ``image`` or what the text is.
        text: the text, empty for images.
        codes: int64 [h, w] of an image, None for text.
    """

    kind: TextKind | Literal["image"]
    text: str = ""
    codes: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a stream of ids says.

    Attributes:
        segments: its complete parts in order; text of nothing but white space is left out, as in the official decoder.
        notes: what is malformed or incomplete.
    """

    segments: tuple[Segment, ...]
    notes: tuple[str, ...]


def read_stream(ids: Iterable[int], markup: Markup, to_bytes: ToBytes) -> Answer:
    """Read a finished or broken stream: everything complete is kept, the rest is noted. Never raises."""
    grammar = StreamGrammar(markup, to_bytes)
    events: list[Event] = []
    for token in ids:
        events += grammar.push(int(token))
    return collect([*events, *grammar.close()])


def collect(events: Iterable[Event]) -> Answer:
    """Join the events of a stream into segments."""
    segments: list[Segment] = []
    notes: list[str] = []
    pieces: list[str] = []
    kind: TextKind = "text"

    def join() -> None:
        text = "".join(pieces)
        pieces.clear()
        if text.strip() or (text and kind != "text"):
            segments.append(Segment(kind, text))

    for event in events:
        if isinstance(event, TextChunk):
            if event.kind != kind:
                join()
                kind = event.kind
            pieces.append(event.text)
            if event.ends:
                join()
                kind = "text"
        elif isinstance(event, ImageDone):
            join()
            kind = "text"
            segments.append(Segment("image", codes=event.codes))
        elif isinstance(event, Note):
            notes.append(event.text)
    join()
    return Answer(tuple(segments), tuple(notes))
