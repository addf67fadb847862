"""The figure of ``compare_planners``: success and what it cost over the budget, a line for each search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from emu_embodied.files import write_atomically

COLOURS = ("#1f6fb4", "#e07a10", "#2f8f4e", "#8a4fb0", "#c0392b", "#6b7680", "#0f8a8a", "#b08a1a")
PANELS = (
    ("success", "success, 95 % interval"),
    ("first_cost", "cost of the first plan"),
    ("evaluations", "futures until success or the end"),
)
"""Column and title of each panel."""


def draw_planners(summaries: Sequence[dict[str, Any]], title: str, stem: Path) -> list[Path]:
    """Write ``stem.svg`` and ``stem.png``.

    Args:
        summaries: ``Row.summary()`` of one environment.
        title: above the panels.
        stem: path without its suffix.

    Returns:
        The files.
    """
    figure = Figure(figsize=(11, 4), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PANELS))
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.05, ha="left")
    searches = list(dict.fromkeys(row["search"] for row in summaries))
    for axes, (column, name) in zip(panels, PANELS, strict=True):
        _panel(axes, summaries, searches, column, name)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(6, len(labels)), frameon=False, fontsize=9)
    figure.subplots_adjust(left=0.05, right=0.985, top=0.82, bottom=0.24, wspace=0.2)
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
    for file in files:
        write_atomically(file, lambda aside: figure.savefig(aside, format=aside.suffix[1:]))
    return files


def _panel(axes: Axes, summaries: Sequence[dict[str, Any]], searches: Sequence[str], column: str, name: str) -> None:
    for place, search in enumerate(searches):
        own = sorted((row for row in summaries if row["search"] == search), key=lambda row: row["candidates"])
        colour, nudge = COLOURS[place % len(COLOURS)], 1.0 + 0.03 * (place - len(searches) / 2)
        budgets = [row["candidates"] * nudge for row in own]
        values = [row[column] for row in own]
        style = "--" if search.startswith("shooting") else "-"
        axes.plot(budgets, values, style, color=colour, marker="o", markersize=4, linewidth=1.6, label=search)
        if column == "success":
            for budget, row in zip(budgets, own, strict=True):
                axes.plot([budget] * 2, [row["success_low"], row["success_high"]], color=colour, linewidth=0.8)
    axes.set_title(name, fontsize=10, loc="left")
    axes.set_xlabel("candidates of a decision", fontsize=9)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["candidates"] for row in summaries})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if column == "success":
        axes.set_ylim(-0.02, 1.02)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
