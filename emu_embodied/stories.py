"""A stream of text and images as it becomes files: what is complete is on disk, whenever the stream ends."""

from __future__ import annotations

import hashlib
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emu_embodied.decode.events import Event, Finished, ImageDone, ImageStarted, Note, TextChunk
from emu_embodied.files import write_json
from emu_embodied.provenance import meta_dict
from emu_embodied.records import Meta
from emu_embodied.viz.story import Passage, Picture, Story, segments_to_json, write_picture, write_story

if TYPE_CHECKING:
    from emu_embodied.interleaved import GenerationRequest

RESULT = "result.json"
"""Written last; a folder without it, or one whose ``finished`` is false, is not a finished story."""


class StoryLog:
    """Takes the events of one or more streams and keeps them as a story in a folder.

    Args:
        folder: made if needed; the files of an earlier story in it are removed.
        task: kind of generation.
        prompt: what was asked.
        images: what was given, uint8 [height, width, 3] each.
        say: shows a piece of text, without a line break of its own, as soon as it comes.
    """

    def __init__(
        self,
        folder: Path,
        task: str,
        prompt: str,
        images: Sequence[np.ndarray] = (),
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in (RESULT, "story.md", "story.html", "image_*.png", "given_*.png"):
            for path in folder.glob(pattern):
                path.unlink()
        self.folder = folder
        self.story = Story(task=task, prompt=prompt, finished=False)
        self._say = say
        self._references = tuple(write_picture(folder / f"given_{i:02d}.png", image) for i, image in enumerate(images))
        self._segments: list[Passage | Picture] = []
        self._notes: list[str] = []
        self._closed = True  # whether the last passage is complete, so that more text begins another
        self._tokens = 0
        self._visual = 0
        self._pictures = 0
        self._reason: str | None = None
        self._start = time.perf_counter()

    def tell(self, instruction: str) -> None:
        """Note what the user said between two streams."""
        self._segments.append(Passage(instruction, "user"))
        self._closed = True

    def take(self, event: Event) -> None:
        """Keep and show one event."""
        if isinstance(event, TextChunk):
            self._add_text(event)
        elif isinstance(event, ImageStarted):
            self._closed = True
            self._say(f"\n(picture of {event.size[0]} x {event.size[1]} cells ...)\n")
        elif isinstance(event, ImageDone):
            self._add_picture(event)
        elif isinstance(event, Note):
            self._notes.append(event.text)
            self._say(f"\n(note: {printable(event.text)})\n")
        elif isinstance(event, Finished):
            self._reason = event.reason
            self._tokens += len(event.tokens)
            if event.reason == "length":
                self._notes.append("cut off: the number of new tokens was used up")

    def take_all(self, events: Iterable[Event]) -> None:
        """Keep and show a stream; Ctrl-C ends it, after what is complete was written by ``close``."""
        for event in events:
            self.take(event)

    def close(self, *, finished: bool, meta: Meta, request: dict[str, Any], **facts: Any) -> Path:
        """Write ``story.md``, ``story.html`` and, last, ``result.json``.

        Args:
            finished: whether all streams ended by themselves.
            meta: where the result comes from.
            request: what was asked, JSON-ready; whoever skips finished work compares it.
            **facts: more for the result, JSON-ready.

        Returns:
            The result file.
        """
        self.story = Story(
            task=self.story.task,
            prompt=self.story.prompt,
            references=self._references,
            segments=tuple(self._segments),
            notes=tuple(self._notes),
            finished=finished and self._reason != "stopped",
        )
        write_story(self.story, self.folder)
        result = {
            "finished": self.story.finished,
            "reason": self._reason or "interrupted",
            "request": request,
            "given": [picture.file for picture in self._references],
            "segments": segments_to_json(self._segments),
            "notes": self._notes,
            "images": self._pictures,
            "tokens": {"generated": self._tokens, "visual": self._visual},
            "seconds": round(time.perf_counter() - self._start, 2),
            **facts,
            "meta": meta_dict(meta),
        }
        write_json(self.folder / RESULT, result)
        return self.folder / RESULT

    def _add_text(self, chunk: TextChunk) -> None:
        last = self._segments[-1] if self._segments else None
        if not self._closed and isinstance(last, Passage) and last.kind == chunk.kind:
            self._segments[-1] = Passage(last.text + chunk.text, chunk.kind)
        elif chunk.text:
            self._segments.append(Passage(chunk.text, chunk.kind))
        self._closed = chunk.ends
        self._say(printable(chunk.text) + ("\n" if chunk.ends else ""))

    def _add_picture(self, event: ImageDone) -> None:
        self._closed = True
        self._visual += event.codes.numel()
        if event.pixels is None:
            self._notes.append(f"image {self._pictures} came without a vision tokenizer: only its codes are known")
            return
        path = self.folder / f"image_{self._pictures:02d}.png"
        self._pictures += 1
        self._segments.append(write_picture(path, event.pixels))
        self._say(f"{path}\n")


def describe_request(request: GenerationRequest, seed: int | None, **more: Any) -> dict[str, Any]:
    """A request as JSON; images by a hash of their pixels, so that equal requests are equal records."""
    settings = asdict(request.resolved)
    return {
        "task": request.task.lower(),
        "prompt": request.prompt,
        "images": [fingerprint(image) for image in request.images],
        "steps": request.steps,
        "seed": seed,
        "settings": {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        **more,
    }


def fingerprint(image: np.ndarray) -> str:
    """A short hash of an image's shape and pixels."""
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()[:16]


def printable(text: str) -> str:
    """The text without what would control a terminal; line breaks and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))
