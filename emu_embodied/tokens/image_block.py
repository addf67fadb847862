"""Emu3.5's image block: ``BOI h*w IMG row EOL row ... row EOI``, and how large an image may be.

h and w count codes and are written as decimal digits, each its own text token. EOL stands between rows only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from emu_embodied.tokens.text import TextTokenizer
from emu_embodied.tokens.vocabulary import IdRange

ASPECTS = {
    "4:3": (55, 73), "21:9": (41, 97), "16:9": (47, 85), "3:2": (52, 78), "1:1": (64, 64),
    "3:4": (73, 55), "9:16": (85, 47), "2:3": (78, 52),
}  # fmt: skip
"""Width to height -> (rows, columns) of codes, the official grids of about 1024 x 1024 pixels."""


@dataclass(frozen=True, slots=True)
class Markup:
    """Ids that give a stream its structure; found by name, so that they fit any tokenizer of this family.

    Attributes:
        text: ids below the first visual one: words, digits and all special tokens.
        vision: ids of the codebook.
        digits: ids of ``0`` to ``9``, one after another.
        times: id of ``*``.
        bos: begin of sequence.
        eos: end of sequence.
        boi: begin of image.
        img: end of an image's size, begin of its codes.
        eol: end of a row of codes.
        eoi: end of image.
        bss: begin of the assistant's answer.
        ess: its end.
        bog: begin of the thought about the whole answer.
        eog: its end.
        boc: begin of the thought about one image.
        eoc: its end.
    """

    text: IdRange
    vision: IdRange
    digits: IdRange
    times: int
    bos: int
    eos: int
    boi: int
    img: int
    eol: int
    eoi: int
    bss: int
    ess: int
    bog: int
    eog: int
    boc: int
    eoc: int

    @classmethod
    def of(cls, tokenizer: TextTokenizer, codebook: int) -> Markup:
        """The ids of a tokenizer with a vision tokenizer of ``codebook`` codes.

        Raises:
            ValueError: if the tokenizer lacks a token, or splits digits otherwise.
        """

        def named(name: str) -> int:
            token = tokenizer.special_id(f"<|{name}|>")
            if token is None:
                raise ValueError(f"the text tokenizer has no token <|{name}|>: it is not Emu3.5's")
            return token

        written = tokenizer.encode("0123456789*")
        if len(written) != 11 or written[:10] != list(range(written[0], written[0] + 10)):
            raise ValueError("the text tokenizer does not write digits as ten tokens in a row: it is not Emu3.5's")
        first = tokenizer.first_visual
        return cls(
            text=IdRange(0, first),
            vision=IdRange(first, codebook),
            digits=IdRange(written[0], 10),
            times=written[10],
            bos=named("extra_203"),
            eos=named("extra_204"),
            boi=named("image start"),
            img=named("image token"),
            eol=named("extra_200"),
            eoi=named("image end"),
            bss=named("extra_100"),
            ess=named("extra_101"),
            bog=named("extra_60"),
            eog=named("extra_61"),
            boc=named("extra_50"),
            eoc=named("extra_51"),
        )

    def size_ids(self, size: tuple[int, int]) -> list[int]:
        """``h*w`` as ids."""
        rows, columns = ([self.digits.start + int(digit) for digit in str(side)] for side in size)
        return [*rows, self.times, *columns]

    def read_size(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """(rows, columns) of the ids between BOI and IMG, or None if they are not two numbers from 1 on."""
        zero = self.digits.start
        written = "".join("*" if i == self.times else str(i - zero) if 0 <= i - zero < 10 else "?" for i in ids)
        sides = written.split("*")
        if len(sides) != 2 or not all(side.isdigit() and len(side) <= 4 and int(side) for side in sides):
            return None
        return int(sides[0]), int(sides[1])

    def block(self, codes: torch.Tensor) -> list[int]:
        """The image block of codes, int64 [h, w] in [0, codebook).

        Raises:
            ValueError: if the codes are no grid, or outside the codebook.
        """
        if codes.dim() != 2 or 0 in codes.shape:
            raise ValueError(f"codes of shape {tuple(codes.shape)}: expected one image's grid [h, w]")
        ids = self.block_ids(self.vision.ids(codes).tolist())
        if not 0 <= int(codes.min()) <= int(codes.max()) < self.vision.size:
            raise ValueError(f"codes outside [0, {self.vision.size}): they are of another vision tokenizer")
        return ids

    def block_ids(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """The image block of rows of visual ids."""
        ids = [self.boi, *self.size_ids((len(rows), len(rows[0]))), self.img]
        for number, row in enumerate(rows):
            ids += [self.eol, *row] if number else row
        return [*ids, self.eoi]

    def parse_block(self, ids: Sequence[int]) -> torch.Tensor:
        """Codes int64 [h, w] of one whole image block.

        Raises:
            ValueError: saying where the ids leave the form of a block.
        """
        ids = list(ids)
        if len(ids) < 3 or ids[0] != self.boi or ids[-1] != self.eoi or self.img not in ids:
            raise ValueError("not an image block: it must start with BOI, end with EOI and have IMG after its size")
        start = ids.index(self.img)
        size = self.read_size(ids[1:start])
        if size is None:
            raise ValueError("not an image block: between BOI and IMG stand no two numbers with * between")
        body = ids[start + 1 : -1]
        rows = [body[i : i + size[1]] for i in range(0, len(body), size[1] + 1)]
        ends = body[size[1] :: size[1] + 1]
        if len(body) != size[0] * (size[1] + 1) - 1 or any(end != self.eol for end in ends):
            raise ValueError(f"not an image block: it says {size[0]} rows of {size[1]} codes and holds others")
        return self.vision.local(torch.tensor(rows, dtype=torch.long))


def block_length(size: tuple[int, int]) -> int:
    """Tokens of an image block of (rows, columns): h w codes, h - 1 EOL, the size's digits, ``*``, BOI, IMG and EOI."""
    return size[0] * size[1] + size[0] + 3 + len(f"{size[0]}{size[1]}")


def resized(height: int, width: int, area: int, cell: int = 16) -> tuple[int, int]:
    """(rows, columns) of codes of an image brought to about ``area`` pixels, its shape kept (the official arithmetic).

    Args:
        height: of the image [pixels].
        width: likewise.
        area: wanted [pixels].
        cell: side of one code's cell [pixels].

    Raises:
        ValueError: if the image is smaller than a cell, or has no whole cell at this area.
    """
    if height < cell or width < cell:
        raise ValueError(f"an image of {height} x {width} pixels is smaller than one cell of {cell} x {cell} pixels")
    aspect = width / height
    new_height = int((area / aspect) ** 0.5)
    new_width = int(new_height * aspect)
    rows, columns = (new_height + cell // 2) // cell, (new_width + cell // 2) // cell
    if rows < 1 or columns < 1:
        raise ValueError(
            f"an image of {height} x {width} pixels has no whole cell left at an area of {area} pixels: "
            f"give a larger area, or one less narrow"
        )
    return rows, columns


def grid(aspect: str, area: int | None = None, cell: int = 16) -> tuple[int, int] | None:
    """(rows, columns) of codes of an aspect ``W:H`` or a size ``HxW`` in pixels; None for ``auto``, the model's choice.

    Args:
        aspect: ``auto``; one of ``ASPECTS`` or any other ``W:H``; or ``HxW`` in pixels, rounded to whole cells.
        area: of aspects [pixels]; None takes ``ASPECTS``' own grids, and about 1024 x 1024 pixels for others.
        cell: side of one code's cell [pixels].

    Raises:
        ValueError: if it is none of these, or out of range (1 to 999 cells on each side).
    """
    if aspect == "auto":
        return None
    if area is None and aspect in ASPECTS:
        return ASPECTS[aspect]
    parts = aspect.replace("x", ":").split(":")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(
            f"image size {aspect!r}: give auto, an aspect W:H such as {', '.join(ASPECTS)}, or pixels HxW "
            "such as 512x768"
        )
    first, second = (int(part) for part in parts)
    if "x" in aspect:
        size = ((first + cell // 2) // cell, (second + cell // 2) // cell)
    else:
        side = math.sqrt((area or 1 << 20) * second / first)
        size = (int(side + cell / 2) // cell, int(side * first / second + cell / 2) // cell)
    if not all(1 <= side <= 999 for side in size):
        raise ValueError(
            f"image size {aspect!r} is {size[0]} x {size[1]} cells of {cell} pixels: 1 to 999 are possible"
        )
    return size
