"""What a reinforced run came to: curves as a picture and as a table, and a page about it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from emu_embodied.files import write_atomically
from emu_embodied.metrics.intervals import wilson
from emu_embodied.train.rl_log import METRICS, read_metrics

_WINDOW = 64
"""Rollouts that a point of the smoothed success curve stands for [rollouts]."""
_PANELS = (
    ("success", ("success",)),
    ("reward on the scale 1 to 10", ("reward/",)),
    ("KL to the reference [nat a token]", ("kl",)),
    ("entropy of a token [nat]", ("entropy",)),
    ("share of tokens clipped", ("clipped_low", "clipped_high")),
    ("share of the time", ("share_",)),
)


def write_report(out: Path) -> Path:
    """Draw ``out/metrics.jsonl``: ``report.png``, ``report.csv`` and ``report.md``, whose path is returned.

    Raises:
        ValueError: if there is no round to report.
    """
    lines = read_metrics(out / METRICS)
    if not lines:
        raise ValueError(f"{out / METRICS} holds no round: run `emu-embodied rl --out {out}` first")
    names = list(dict.fromkeys(name for line in lines for name in line))

    def write_csv(aside: Path) -> None:
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(lines)

    write_atomically(out / "report.csv", write_csv)
    write_atomically(out / "report.png", lambda aside: _draw(lines, aside))
    page = out / "report.md"
    write_atomically(page, lambda aside: aside.write_text(_page(lines, _meta(out))))
    return page


def smoothed_success(lines: Sequence[dict[str, float]], window: int = _WINDOW) -> tuple[np.ndarray, np.ndarray]:
    """Rollouts played, and success over about the last ``window`` of them, both float64 [rounds]."""
    rollouts = np.array([line["rollouts"] for line in lines], np.float64)
    played = np.diff(rollouts, prepend=0)
    won = np.array([line["success"] for line in lines]) * played
    rates = []
    for i in range(len(lines)):
        first = int(np.searchsorted(rollouts, rollouts[i] - window, side="right"))
        rates.append(won[first : i + 1].sum() / max(1, played[first : i + 1].sum()))
    return rollouts, np.array(rates)


def _draw(lines: Sequence[dict[str, float]], path: Path) -> None:
    rollouts, smooth = smoothed_success(lines)
    figure = Figure(figsize=(12, 6), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, sharex=True)
    for axis, (title, wanted) in zip(axes.flat, _PANELS, strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        for name in dict.fromkeys(name for line in lines for name in line):
            if any(name == w or (w.endswith(("/", "_")) and name.startswith(w)) for w in wanted):
                points = [(line["rollouts"], line[name]) for line in lines if name in line]
                label = name.removeprefix("reward/").removeprefix("share_")
                faint = name == "success"
                axis.plot(*zip(*points, strict=True), alpha=0.35 if faint else 1, label=label, linewidth=1)
    axes[0, 0].plot(rollouts, smooth, color="black", label=f"last {_WINDOW} rollouts")
    axes[0, 0].set_ylim(-0.02, 1.02)
    for axis in axes.flat:
        if axis.lines:
            axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("real rollouts")
    figure.savefig(path, format="png")


def _page(lines: Sequence[dict[str, float]], meta: dict[str, Any]) -> str:
    rollouts, smooth = smoothed_success(lines)
    first, last, total = lines[0], lines[-1], int(rollouts[-1])
    ends = [(int(rollouts[0]), first["success"])]
    ends.append((min(_WINDOW, total), float(smooth[-1])))
    said = []
    for count, rate in ends:
        low, high = wilson(round(rate * count), count)
        said.append(f"{100 * rate:.0f} % of {count} rollouts ({100 * low:.0f} to {100 * high:.0f} %)")
    rows = "\n".join(f"| {n} | {first[n]:.4g} | {last[n]:.4g} |" for n in first if n in last and n not in ("round",))
    settings = meta.get("extra", {}).get("config", {})
    about = f"Loop `{settings.get('loop', '?')}` in {', '.join(settings.get('env_ids', ['?']))}, " if settings else ""
    return (
        "# Reinforcement\n\n"
        f"{about}{total} real rollouts in {last.get('seconds', 0) / 60:.1f} min. Success in the real simulator, "
        f"actions drawn: {said[0]} in the first round, {said[1]} at the end. What the policy does at temperature 0 is "
        "measured by `emu-embodied bench --policy token`.\n\n![curves](report.png)\n\n"
        f"| figure | first round | last round |\n|---|---|---|\n{rows}\n\n"
        + (f"Command: `{meta['command']}`\n" if "command" in meta else "")
    )


def _meta(out: Path) -> dict[str, Any]:
    path = out / "meta.json"
    found: dict[str, Any] = json.loads(path.read_text()).get("rl", {}) if path.exists() else {}
    return found
