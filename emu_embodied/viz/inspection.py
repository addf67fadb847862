"""The picture of an inspection: what probes read, and how far imagination is from what happened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from emu_embodied.metrics.inspection import Inspection
from emu_embodied.viz.figures import COPY, IMAGINED, REAL, save_figure

COLOURS = {
    "pixels_and_words": "#b9c0c7",
    "codes": "#9ec3e6",
    "codes_and_words": REAL,
    "hidden": "#e8b477",
    "readout": IMAGINED,
}
"""Of the kinds of vectors."""


def draw_inspection(found: Inspection, title: str, path: Path) -> Path:
    """Write a PNG of three panels: probes over a guess, action sensitivity, positions ahead."""
    figure = Figure(figsize=(11, 3.4), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    probes, pictures, ahead = figure.subplots(1, 3)
    _probes(probes, found)
    _pictures(pictures, found)
    _positions(ahead, found)
    for axes in (probes, pictures, ahead):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", alpha=0.25, linewidth=0.6)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, frameon=False)
    save_figure(path, figure)
    return path


def _probes(axes: Axes, found: Inspection) -> None:
    """Errors as shares of the guess, so that centimetres and degrees stand side by side; the numbers are above."""
    axes.set_title("probes: error / constant guess", fontsize=9, loc="left")
    width = 0.8 / len(found.probes)
    for i, (kind, scores) in enumerate(found.probes.items()):
        where = np.arange(len(scores)) + (i - (len(found.probes) - 1) / 2) * width
        shares = [score.error / max(score.guess, 1e-9) for score in scores]
        axes.bar(where, shares, width, color=COLOURS.get(kind, COPY), label=kind.replace("_", " "))
        for x, share, score in zip(where, shares, scores, strict=True):
            axes.text(x, share + 0.01, f"{score.error:.1f}", ha="center", fontsize=6.5, rotation=90)
    scores = next(iter(found.probes.values()))
    axes.set_xticks(range(len(scores)), [f"{score.place} [{score.unit}]" for score in scores])
    axes.axhline(1, color=COPY, linewidth=0.8, linestyle="--")


def _pictures(axes: Axes, found: Inspection) -> None:
    axes.set_title(f"frames, PSNR [dB]: {found.sensitivity:+.2f} dB by the actions", fontsize=9, loc="left")
    rows = [(row.h, row.psnr, row.psnr_shuffled) for row in found.ahead if row.psnr is not None]
    blocks, own, foreign = (np.array(column, float) for column in zip(*rows, strict=True))
    axes.plot(blocks, own, color=IMAGINED, marker="o", markersize=3.5, label="own actions")
    axes.plot(blocks, foreign, color=COPY, marker="s", markersize=3, label="another episode's actions")
    axes.set_xlabel("blocks ahead", fontsize=8)
    axes.set_xticks(blocks)


def _positions(axes: Axes, found: Inspection) -> None:
    units = {score.place: score.unit for score in next(iter(found.probes.values()))}
    names = list(found.ahead[0].errors)
    axes.set_title("positions as imagined (dotted: as if nothing moved)", fontsize=9, loc="left")
    for i, name in enumerate(names):
        blocks = [row.h for row in found.ahead]
        [line] = axes.plot(
            blocks,
            [row.errors[name] for row in found.ahead],
            marker="o",
            markersize=3.5,
            color=f"C{i}",
            label=f"{name} [{units.get(name, '')}]",
        )
        axes.plot(blocks, [row.stays[name] for row in found.ahead], color=line.get_color(), linestyle=":", linewidth=1)
    axes.set_xlabel("blocks ahead", fontsize=8)
    axes.set_xticks([row.h for row in found.ahead])
