"""The figure of ``compare_decoding``: every measure over the number of passes, a line for each way of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from emu_embodied.files import write_atomically

COLOURS = {
    "autoregressive": "#333333",
    "uniform": "#1f6fb4",
    "metric": "#2f8f4e",
    "state_coupled": "#e07a10",
    "mask": "#8a4fb0",
}
STYLES = {"random": "-", "confidence": "--", "entropy": ":"}
COPY, CEILING = "#8a929a", "#b9bec4"
PANELS: tuple[tuple[str, str], ...] = (
    ("changed_token_accuracy", "accuracy on changed tokens"),
    ("psnr", "PSNR [dB]"),
    ("reward_corr", "reward correlation over states"),
    ("plan_correlation", "reward correlation between plans of one state"),
    ("plan_correlation_random", "the same, between random plans only"),
    ("plan_tool_error_cm", "tool error at a plan's end [cm]"),
    ("repeated_share", "repeated frames"),
    ("frames_per_s", "frames/s"),
    ("success", "planner's success, 95 % interval"),
)
"""Column and title of each panel."""
REFERENCES = {
    "psnr": (
        ("copy_last_psnr", "last frame repeated", COPY),
        ("tokenizer_psnr", "the tokenizer's own reconstruction", CEILING),
    ),
    "repeated_share": (("real_repeated_share", "real frames", COPY),),
}
"""Lines for comparison that do not depend on decoding: column, label, colour."""


def draw_decoding(summaries: Sequence[dict[str, Any]], title: str, stem: Path) -> list[Path]:
    """Write ``stem.svg`` and ``stem.png``.

    Args:
        summaries: ``Row.summary()`` of one environment.
        title: above the panels.
        stem: path without its suffix.

    Returns:
        The files.
    """
    figure = Figure(figsize=(12, 9.5), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 3)
    figure.suptitle(
        f"{title}: one set of weights, decoded in every way", fontsize=13, fontweight="bold", x=0.05, ha="left"
    )
    for axes, (column, name) in zip(panels.flat, PANELS, strict=True):
        _panel(axes, summaries, column, name)
    handles = {
        label: line for axes in panels.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, frameon=False, fontsize=9.5)
    figure.subplots_adjust(left=0.055, right=0.985, top=0.915, bottom=0.12, hspace=0.36, wspace=0.2)
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
    for file in files:
        write_atomically(file, lambda aside: figure.savefig(aside, format=aside.suffix[1:]))
    return files


def _panel(axes: Axes, summaries: Sequence[dict[str, Any]], column: str, name: str) -> None:
    shown = [row for row in summaries if row[column] is not None]
    for method, order in dict.fromkeys((row["method"], row["order"]) for row in shown):
        own = sorted((r for r in shown if (r["method"], r["order"]) == (method, order)), key=lambda r: r["passes"])
        colour, values = COLOURS.get(method, "#000000"), [row[column] for row in own]
        if method == "autoregressive":
            axes.axhline(values[0], color=colour, linewidth=1.2, label="next token")
            if column == "success":
                axes.axhspan(own[0]["success_low"], own[0]["success_high"], color=colour, alpha=0.08, linewidth=0)
            continue
        label = method if order == "random" else f"{method}, {order}"
        passes = [row["passes"] for row in own]
        axes.plot(passes, values, STYLES[order], color=colour, marker="o", markersize=4, linewidth=1.6, label=label)
        if column == "success":
            for place, row in zip(passes, own, strict=True):
                axes.plot([place] * 2, [row["success_low"], row["success_high"]], color=colour, linewidth=0.8)
    for reference, label, colour in REFERENCES.get(column, ()):
        if shown:
            axes.axhline(shown[0][reference], color=colour, linestyle=(0, (4, 3)), linewidth=1, label=label)
    axes.set_title(name, fontsize=10, loc="left")
    axes.set_xlabel("passes", fontsize=9)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["passes"] for row in summaries if row["passes"]})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
    if column == "frames_per_s":
        axes.set_yscale("log")
        for axis_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_ticks(StrMethodFormatter("{x:g}"))
        axes.tick_params(which="minor", labelsize=7)
    axes.xaxis.set_minor_locator(NullLocator())
    if column == "repeated_share":
        axes.set_ylim(bottom=-0.01)
    if column == "success":
        axes.set_ylim(-0.02, 1.02)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
