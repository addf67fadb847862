"""Files of prompts, and how several processes share one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emu_embodied.viz.story import slug

_KEYS = {"prompt", "image", "images", "reference_image", "task", "seed"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt of a file."""

    index: int
    """Its place among the prompts, from 0."""
    text: str
    """What to generate."""
    images: tuple[Path, ...] = ()
    """Pictures given with it."""
    task: str | None = None
    """Kind of generation; None takes the command's."""
    seed: int | None = None
    """Seed of its draws; None follows from the command's."""

    @property
    def folder(self) -> str:
        """Name of its folder: the place, then what it says."""
        return f"{self.index:04d}-{slug(self.text)}"


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file with a prompt on each line; empty lines are skipped.

    A line is text; or a JSON string; or a JSON object with ``prompt`` and, if wanted, ``image`` (or ``images``, or
    ``reference_image`` as in Emu3.5's configurations: one path or a list, relative to the file), ``task`` and ``seed``.

    Raises:
        ValueError: naming the file and line, if it is missing, empty or not of this form.
    """
    if not path.is_file():
        raise ValueError(f"the file of prompts {path} is missing")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompts.append(_parse(line.strip(), len(prompts), path.parent))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not prompts:
        raise ValueError(f"{path} holds no prompts: write one on each line")
    return prompts


def share_of(prompts: Sequence[Prompt], workers: int, worker: int) -> list[Prompt]:
    """The prompts of one of several processes: every ``workers``-th, from ``worker`` on.

    Raises:
        ValueError: if there is no such worker.
    """
    if workers < 1 or not 0 <= worker < workers:
        raise ValueError(f"worker {worker} of {workers}: --worker-id goes from 0 to --num-workers - 1")
    return list(prompts[worker::workers])


def _parse(line: str, index: int, folder: Path) -> Prompt:
    content: Any = line
    if line[0] in '{"':
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            if line[0] == "{":
                raise ValueError(f"not JSON ({error}), though it begins with '{{'") from error
    if isinstance(content, str):
        content = {"prompt": content}
    if unknown := sorted(content.keys() - _KEYS):
        near = difflib.get_close_matches(unknown[0], _KEYS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(_KEYS))}"
        raise ValueError(f"unknown key {unknown[0]!r}; {hint}")
    text = content.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the prompt is empty: say what to generate")
    images = [name for key in ("image", "images", "reference_image") for name in _names(content.get(key))]
    for key, kind in (("task", str), ("seed", int)):
        if content.get(key) is not None and not isinstance(content[key], kind):
            raise ValueError(f"{key} is {content[key]!r}, not {kind.__name__}")
    return Prompt(
        index=index,
        text=text,
        images=tuple(folder / name for name in images),
        task=content.get("task"),
        seed=content.get("seed"),
    )


def _names(value: Any) -> list[str]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"an image is {value!r}: give a path or a list of paths")
    return names
