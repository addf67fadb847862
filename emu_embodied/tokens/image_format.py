"""What stands around and between the codes of one picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt

import torch

_DIGITS, _TIMES = 15, 9
"""Ids of ``0`` and ``*`` among Emu3.5's byte-pair ranks."""
_EOL, _IMG, _BOI, _EOI = 151_846, 151_851, 151_852, 151_853


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """Fixed ids of one picture of N codes, row by row.

    Attributes:
        opening: ids before the first code.
        row_end: ids between rows.
        closing: ids after the last code.
        columns: codes in a row; None if rows are not set apart.
    """

    opening: tuple[int, ...]
    row_end: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    columns: int | None = None

    @classmethod
    def emu35(cls, codes: int) -> ImageFormat:
        """Emu3.5's own block of a square picture: ``BOI h*w IMG row EOL row ... row EOI``.

        Raises:
            ValueError: if ``codes`` is no square number.
        """
        side = isqrt(codes)
        if side * side != codes:
            raise ValueError(f"{codes} codes are no square picture: Emu3.5's image block needs rows and columns")
        digits = tuple(_DIGITS + int(digit) for digit in str(side))
        return cls((_BOI, *digits, _TIMES, *digits, _IMG), (_EOL,), (_EOI,), side)

    def length(self, codes: int) -> int:
        """Tokens of a picture of so many codes."""
        return len(self.opening) + codes + self._row_ends(codes) * len(self.row_end) + len(self.closing)

    def slots(self, codes: int) -> torch.Tensor:
        """int64 [codes]: where in the picture its codes stand."""
        places = torch.arange(codes)
        if self.columns is not None:
            places += places // self.columns * len(self.row_end)
        return places + len(self.opening)

    def fixed(self, codes: int) -> Iterator[tuple[int, int]]:
        """(place in the picture, id) of every token that is no code."""
        yield from enumerate(self.opening)
        for row in range(1, self._row_ends(codes) + 1):
            assert self.columns is not None
            start = len(self.opening) + row * self.columns + (row - 1) * len(self.row_end)
            yield from enumerate(self.row_end, start)
        yield from enumerate(self.closing, self.length(codes) - len(self.closing))

    def _row_ends(self, codes: int) -> int:
        return 0 if self.columns is None else (codes - 1) // self.columns
