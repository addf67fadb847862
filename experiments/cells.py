"""Experiments that are stopped and gone on with: one JSON file of cells, each measured once and written as it comes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emu_embodied.files import write_atomically, write_json
from emu_embodied.provenance import make_meta, meta_dict


class Cells:
    """The cells of a file: read when it is opened, written whenever one is added.

    Args:
        file: JSON, ``{"rows": [{"key": {...}, ...}], "meta": {...}}``.
        seed: for the record.
        data_hash: for the record.

    Raises:
        ValueError: if the file holds something else.
    """

    def __init__(self, file: Path, *, seed: int, data_hash: str | None = None) -> None:
        self.file = file
        self._meta = meta_dict(make_meta(seed=seed, data_hash=data_hash))
        self._rows: list[dict[str, Any]] = []
        if file.exists():
            try:
                self._rows = json.loads(file.read_text())["rows"]
                for row in self._rows:
                    row["key"].items()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{file} holds no cells of an experiment ({error!r}); give another --out") from error

    def get(self, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The cell of a key, measured if it is not there.

        Args:
            key: everything that determines the cell, JSON-ready.
            measure: gives its figures, JSON-ready.
        """
        wanted = json.loads(json.dumps(key))
        for row in self._rows:
            if row["key"] == wanted:
                return row
        self._rows.append({"key": wanted, **json.loads(json.dumps(measure()))})
        write_json(self.file, {"rows": self._rows, "meta": self._meta})
        return self._rows[-1]


def write_markdown(path: Path, title: str, header: Sequence[str], lines: Sequence[Sequence[str]], notes: str) -> str:
    """Write a table with what there is to say of it; returns the text."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    table = "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))
    text = f"# {title}\n\n{table}\n\n{notes}\n"
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    return text


def percent(value: float) -> str:
    """A share for people."""
    return f"{100 * value:.0f} %"


def between(interval: Sequence[float]) -> str:
    """An interval of shares for people."""
    low, high = interval
    return f"{100 * low:.0f} to {100 * high:.0f} %"
