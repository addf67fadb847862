"""What a training run writes down while it runs."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from emu_embodied.files import write_atomically


class TrainingLog:
    """JSON lines, and TensorBoard where it is installed."""

    def __init__(
        self,
        out: Path,
        stage: str,
        step: int,
        on_log: Callable[[dict[str, float]], None] | None,
        tensorboard: bool | None,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"train_{stage}.jsonl"
        _drop_lines_after(path, step)
        self.last: dict[str, float] = {}
        self._file = path.open("a", buffering=1)
        self._on_log = on_log
        self._writer: Any = None
        if tensorboard or (tensorboard is None and importlib.util.find_spec("tensorboard") is not None):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(out / "tensorboard" / stage), purge_step=step)
        self._restart()

    def add(self, figures: Mapping[str, float | torch.Tensor], items: int, seconds: float) -> None:
        """Collect the figures of one step that took ``seconds`` and saw ``items`` images or tokens."""
        self._items += items
        self._seconds += seconds
        for name, value in figures.items():
            value = value.detach() if isinstance(value, torch.Tensor) else value
            self._sums.setdefault(name, []).append(value)

    def write(self, step: int, figures: Mapping[str, float]) -> dict[str, float]:
        """Write the means since the last line."""
        means = {name: float(sum(values)) / len(values) for name, values in self._sums.items()}
        speed = self._items / max(1e-9, self._seconds)
        line = {**means, **figures, "items_per_second": speed}
        self._put(step, line)
        self._restart()
        return line

    def write_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Write evaluation figures on a line of their own."""
        self._put(step, {f"eval/{name}": float(value) for name, value in figures.items()})

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _put(self, step: int, line: dict[str, float]) -> None:
        self.last |= {"step": step, **line}
        clean = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        if self._writer is not None:
            for name, value in line.items():
                self._writer.add_scalar(name, value, step)
        if self._on_log is not None:
            self._on_log({"step": step, **line})

    def _restart(self) -> None:
        self._sums: dict[str, list[float | torch.Tensor]] = {}
        self._items = 0
        self._seconds = 0.0


def _drop_lines_after(path: Path, step: int) -> None:
    """Forget lines that a killed run wrote after its last save: the resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line cut short by a kill
    if step:
        write_atomically(path, lambda aside: aside.write_text("".join(line + "\n" for line in kept)))
    else:
        path.unlink()
