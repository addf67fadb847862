"""What a stream of text and images consists of, in the order in which it is generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

TextKind = Literal["text", "global_cot", "image_cot"]
"""Plain text, the plan of the whole answer (BOG..EOG), or the thought before one image (BOC..EOC)."""


@dataclass(frozen=True, slots=True)
class TextChunk:
    """A piece of text as it comes; pieces of one kind that follow each other belong together.

    Attributes:
        text: whole characters, never empty.
        kind: what it is part of.
        ends: whether a span closes with this piece (EOG or EOC); ``text`` may then be empty.
    """

    text: str
    kind: TextKind = "text"
    ends: bool = False


@dataclass(frozen=True, slots=True)
class ImageStarted:
    """An image's size is known; its codes follow.

    Attributes:
        index: 0 for the first generated image.
        size: (rows, columns) of codes.
    """

    index: int
    size: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class ImageDone:
    """An image is complete.

    Attributes:
        index: as in ``ImageStarted``.
        codes: int64 [h, w], local indices into the vision tokenizer's codebook, on the CPU.
        pixels: uint8 [height, width, 3], or None where no vision tokenizer is at hand.
    """

    index: int
    codes: torch.Tensor
    pixels: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """Something about the stream that a reader should know, e.g. that it is malformed.

    Attributes:
        text: one sentence.
    """

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of every stream.

    Attributes:
        reason: ``end`` (the model closed its answer), ``length`` (``max_new_tokens`` reached), ``images``
            (``max_images`` reached) or ``stopped`` (from outside).
        tokens: all generated ids, forced ones included.
    """

    reason: Literal["end", "length", "images", "stopped"]
    tokens: tuple[int, ...] = ()


Event = TextChunk | ImageStarted | ImageDone | Note | Finished
