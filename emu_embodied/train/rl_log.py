"""What a reinforced run writes down round by round, and when its figures say that it collapses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from emu_embodied.files import write_atomically

METRICS = "metrics.jsonl"
"""One line for each round."""


def collapse(lines: Sequence[Mapping[str, float]], bounds: Mapping[str, tuple[float, float]], patience: int) -> str:
    """Which diagnostic has been out of its bounds for ``patience`` rounds in a row, in words; empty if none has.

    Args:
        lines: of the log.
        bounds: diagnostic -> lowest and highest value.
        patience: rounds.
    """
    recent = lines[-patience:]
    for name, (low, high) in bounds.items():
        values = [line[name] for line in recent if name in line]
        if len(values) == patience and all(not low <= value <= high for value in values):
            shown = ", ".join(f"{value:.3g}" for value in values)
            return f"{name} was {shown} in the last {patience} rounds, and has to stay in [{low:.3g}, {high:.3g}]"
    return ""


class RLLog:
    """``metrics.jsonl``, cut back to the round that a run is resumed from.

    Args:
        path: the file.
        rounds: that were saved.
        on_line: called with every new line.

    Raises:
        ValueError: if it lacks rounds that were saved.

    Attributes:
        lines: one for each round.
    """

    def __init__(self, path: Path, rounds: int, on_line: Callable[[dict[str, float]], None] | None) -> None:
        self._path = path
        self._on_line = on_line
        self.lines = [line for line in read_metrics(path) if line["round"] < rounds]
        if len(self.lines) < rounds:
            raise ValueError(f"{path} holds {len(self.lines)} rounds of {rounds}: restore it, or give another --out")
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        write_atomically(path, lambda aside: aside.write_text(text))

    @property
    def rollouts(self) -> int:
        """Real rollouts so far."""
        return int(self.lines[-1]["rollouts"]) if self.lines else 0

    def write(self, number: int, figures: Mapping[str, float]) -> None:
        """Add the line of a round; figures that are not finite are left out."""
        line = {"round": number, **{name: value for name, value in figures.items() if math.isfinite(value)}}
        self.lines.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._on_line is not None:
            self._on_line(line)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a ``metrics.jsonl``; a last one that a kill cut short is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "round" in line:
            lines.append(line)
    return lines
