"""The figure of ``bench_decode``: frames per second over the batch, one panel for each size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from emu_embodied.files import write_atomically

COLOURS = {"autoregressive": "#333333", "transformers": "#8a929a"}
PASSES = ("#1f6fb4", "#2f8f4e", "#e07a10", "#8a4fb0", "#b3403a")
"""Of parallel decoding, by rising number of passes."""


def draw_speed(rows: Sequence[dict[str, Any]], title: str, stem: Path) -> list[Path]:
    """Write ``stem.svg`` and ``stem.png``: measured lines, and dotted the arithmetic floor of each.

    Args:
        rows: of ``bench_decode``; those without a speed are left out.
        title: above the panels.
        stem: path without its suffix.
    """
    rows = [row for row in rows if row["frames_per_s"] is not None]
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    numbers = sorted({row["passes"] for row in rows if row["passes"]})
    figure = Figure(figsize=(4.2 * max(len(sizes), 1), 4.2), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    for axes, size in zip(figure.subplots(1, max(len(sizes), 1), squeeze=False)[0], sizes, strict=False):
        here = [row for row in rows if row["size"] == size]
        for method, passes in dict.fromkeys((row["method"], row["passes"]) for row in here):
            line = sorted(
                (row for row in here if (row["method"], row["passes"]) == (method, passes)),
                key=lambda row: row["batch"],
            )
            colour = COLOURS.get(method) or PASSES[numbers.index(passes) % len(PASSES)]
            batches = [row["batch"] for row in line]
            label = f"DiDA, {passes} {'pass' if passes == 1 else 'passes'}" if passes else method
            axes.plot(batches, [row["frames_per_s"] for row in line], "o-", color=colour, markersize=4, label=label)
            if method != "transformers":
                floor = [row["batch"] / row["floor_arithmetic_s"] for row in line]
                axes.plot(batches, floor, ":", color=colour, linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="candidates", ylabel="imagined states/s")
        ticks = sorted({row["batch"] for row in here})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_title(f"{size}, {here[0]['tokens_per_frame']} tokens a state", fontsize=10, loc="left")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7.5, frameon=False)
    figure.suptitle(f"{title} (dotted: what arithmetic allows)", fontsize=10)
    figure.tight_layout()
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
    for file in files:
        write_atomically(file, lambda aside: figure.savefig(aside, format=aside.suffix[1:]))
    return files
