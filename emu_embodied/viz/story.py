"""A generated story as files: pictures, Markdown, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emu_embodied.files import write_atomically

KINDS = {"text": "text", "global_cot": "plan of the whole", "image_cot": "thought before a picture", "user": "told"}
"""Kind of a passage -> what a reader is told it is."""
_STYLE = """
body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; } p { white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; display: block; } figure { margin: 1.2rem 0; }
figcaption, .facts, summary { color: #777; font-size: .85rem; }
details { margin: .8rem 0; padding: .4rem .8rem; border: 1px solid #8884; border-radius: 4px; }
.user { border-left: 3px solid #3667a6; padding-left: .8rem; } .note { color: #b35900; }
:root { color-scheme: light dark; }
"""


@dataclass(frozen=True, slots=True)
class Passage:
    """A stretch of text.

    Attributes:
        text: as generated (or, of kind ``user``, as told).
        kind: a key of ``KINDS``; chains of thought are kept apart from what is meant to be read.
    """

    text: str
    kind: str = "text"


@dataclass(frozen=True, slots=True)
class Picture:
    """A complete picture.

    Attributes:
        file: its name in the story's folder.
        width: [pixels].
        height: [pixels].
    """

    file: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """What was asked and what came, in order."""

    task: str
    """Kind of generation (``t2i``, ``howto`` ...)."""
    prompt: str
    """As the user gave it."""
    references: tuple[Picture, ...] = ()
    """Pictures given with the prompt, in the story's folder."""
    segments: tuple[Passage | Picture, ...] = ()
    """What came."""
    notes: tuple[str, ...] = ()
    """What a reader should know of how it came (malformed parts, a limit reached ...)."""
    finished: bool = True
    """False for a story that was stopped."""

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The generated pictures."""
        return tuple(segment for segment in self.segments if isinstance(segment, Picture))


def write_picture(path: Path, pixels: np.ndarray) -> Picture:
    """Write uint8 pixels [height, width, 3] as a PNG that is whole or absent."""
    write_atomically(path, Image.fromarray(pixels).save)
    return Picture(path.name, pixels.shape[1], pixels.shape[0])


def write_story(story: Story, folder: Path) -> list[Path]:
    """Write ``story.md`` and ``story.html`` into the folder that holds the story's pictures; returns the two files."""
    files = []
    for name, text in (("story.md", to_markdown(story)), ("story.html", to_html(story, folder))):
        # A lone surrogate (of a prompt that was no UTF-8) is no reason to fail.
        content = text.encode("utf-8", errors="replace")
        write_atomically(folder / name, lambda aside, content=content: aside.write_bytes(content))  # type: ignore[misc]
        files.append(folder / name)
    return files


def to_markdown(story: Story) -> str:
    """The story for people and editors; what the model wrote cannot turn into markup, links or pictures of its own."""
    blocks = [f"# {_escape_markdown(_title(story))}"]
    blocks += [f"![given]({picture.file})" for picture in story.references]
    for segment in story.segments:
        if isinstance(segment, Picture):
            blocks.append(f"![{segment.file}]({segment.file})")
        elif text := _escape_markdown(segment.text.strip()):
            quoted = f"{KINDS[segment.kind]}: {text}".replace("\n", "\n> ")
            blocks.append(text if segment.kind == "text" else f"> {quoted}")
    blocks += [f"*Note: {_escape_markdown(note)}*" for note in _remarks(story)]
    return "\n\n".join(blocks) + "\n"


def to_html(story: Story, folder: Path) -> str:
    """One page with its pictures inside; every text is escaped, there is no script, nothing is loaded."""
    title = html.escape(_title(story))
    body = [f"<h1>{title}</h1>", f'<p class="facts">{html.escape(story.task)}</p>']
    body += [_figure(picture, folder, "given") for picture in story.references]
    for segment in story.segments:
        if isinstance(segment, Picture):
            body.append(_figure(segment, folder, f"{segment.file}, {segment.width} x {segment.height}"))
        elif text := html.escape(segment.text.strip()):
            if segment.kind in ("text", "user"):
                body.append(f'<p class="{segment.kind}">{text}</p>')
            else:
                body.append(f"<details><summary>{KINDS[segment.kind]}</summary><p>{text}</p></details>")
    body += [f'<p class="note">{html.escape(note)}</p>' for note in _remarks(story)]
    content = "\n".join(body)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{content}\n</body>\n</html>\n"
    )


def segments_to_json(segments: Iterable[Passage | Picture]) -> list[dict[str, Any]]:
    """JSON-ready records, each with its ``kind`` (``image`` for a picture)."""
    return [
        {"kind": "image", "file": segment.file, "width": segment.width, "height": segment.height}
        if isinstance(segment, Picture)
        else {"kind": segment.kind, "text": segment.text}
        for segment in segments
    ]


def slug(text: str, length: int = 40) -> str:
    """A short folder name: the letters and digits (of any script) of a text, joined by ``-``, or ``untitled``."""
    joined = "-".join(re.findall(r"[^\W_]+", text.lower()))
    while len(joined.encode("utf-8", errors="replace")) > length:
        joined = joined.rpartition("-")[0] if "-" in joined else joined[:-1]
    return joined or "untitled"


def _title(story: Story) -> str:
    return " ".join(story.prompt.split()) or story.task


def _remarks(story: Story) -> tuple[str, ...]:
    return story.notes if story.finished else (*story.notes, "stopped before the end; what was complete is kept")


def _figure(picture: Picture, folder: Path, caption: str) -> str:
    source = base64.b64encode((folder / picture.file).read_bytes()).decode()
    text = html.escape(caption)
    return (
        f'<figure><img src="data:image/png;base64,{source}" alt="{text}" width="{picture.width}" '
        f'height="{picture.height}"><figcaption>{text}</figcaption></figure>'
    )


def _escape_markdown(text: str) -> str:
    escaped = re.sub(r"([\\`*_\[\]<>&|~])", r"\\\1", text)
    return re.sub(r"^(\s*)([#+=-])", r"\1\\\2", escaped, flags=re.MULTILINE)
