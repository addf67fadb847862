"""Imagined against real: the picture of one planned episode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from emu_embodied.files import write_atomically
from emu_embodied.metrics.foresight import Foresight, foresight, foretold, tool_index
from emu_embodied.viz.trace import EpisodeTrace, Future

REAL, IMAGINED, PLAN, COPY = "#1f6fb4", "#e07a10", "#f2c08a", "#8a929a"
AXES = ("#1f6fb4", "#2f8f4e", "#8a4fb0")
"""Colours of x, y and z."""

MAX_COLUMNS = 13
"""States shown as pictures; of a longer episode every n-th and the last."""

MIN_WIDTH, MIN_CELL, MAX_CELL = 9.5, 0.95, 1.25
"""Of the figure, and of one picture [inches]."""

LABELS, MARGIN, HEADINGS, HEAD, PLOTS = 1.0, 0.12, 0.3, 0.8, 3.0
"""Left and right of the pictures, above them, title, and plots [inches]."""

MAX_PSNR = 50.0
"""[dB] equal pictures have an infinite ratio; this is what the plot shows for it."""


def imagined_vs_real_figure(trace: EpisodeTrace) -> Figure:
    """Frames, rewards, tool path and errors of an episode, real and imagined.

    The imagined rows show what the model makes of the actions that were *executed*: it sees a state (marked), then
    imagines block after block on its own until it is shown the next one.

    Args:
        trace: an episode with frames and recorded futures.

    Raises:
        ValueError: if there is nothing to compare.
    """
    errors = foresight(trace)
    states = _columns(len(trace))
    cell = min(MAX_CELL, max(MIN_CELL, (MIN_WIDTH - LABELS - MARGIN) / len(states)))
    width = max(MIN_WIDTH, LABELS + cell * len(states) + MARGIN)
    pictures = HEADINGS + cell * 3 * len(trace.compared_cameras)
    figure = Figure(figsize=(width, HEAD + pictures + PLOTS), dpi=140, facecolor="white")
    FigureCanvasAgg(figure)
    subfigures = figure.subfigures(3, 1, height_ratios=[HEAD, pictures, PLOTS], squeeze=False)
    head, strip, plots = subfigures[:, 0]
    strip.subplots_adjust(
        left=LABELS / width, right=(LABELS + cell * len(states)) / width, top=1 - HEADINGS / pictures, bottom=0.0,
        wspace=0.05, hspace=0.05,
    )  # fmt: skip
    _title(head, trace)
    _film_strip(strip, trace, states)
    reward, tool, tool_error, image_error = plots.subplots(1, 4)
    plots.subplots_adjust(left=0.055, right=0.985, top=0.84, bottom=0.18, wspace=0.34)
    _reward(reward, trace)
    _tool(tool, trace)
    _tool_error(tool_error, errors)
    _image_error(image_error, errors)
    for axes in (reward, tool, tool_error, image_error):
        axes.set_xlim(-0.2, len(trace) + 0.45)
        axes.set_xlabel("block", fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    return figure


def save_figure(path: Path, figure: Figure) -> None:
    """Write a PNG; it is either whole or absent."""
    write_atomically(Path(path), lambda aside: figure.savefig(aside, format="png"))


def _title(figure: SubFigure, trace: EpisodeTrace) -> None:
    figure.text(0.02, 0.7, f"\u201c{trace.instruction}\u201d", fontsize=14, fontweight="bold", va="center")
    outcome = "solved" if trace.success else "not solved"
    figure.text(
        0.02, 0.27, f"{trace.env_id}, seed {trace.seed}: {outcome} after {len(trace)} blocks", fontsize=10, va="center"
    )
    lines = [
        Line2D([], [], color=REAL, linewidth=2, label="real"),
        Line2D(
            [],
            [],
            color=IMAGINED,
            linewidth=2,
            marker="o",
            markersize=4,
            label=f"{_kind(trace)} from the executed actions",
        ),
        Line2D([], [], color=PLAN, linewidth=1.2, label="expected of each plan"),
    ]
    figure.legend(handles=lines, loc="center right", ncols=3, frameon=False, fontsize=9.5, bbox_to_anchor=(0.99, 0.27))


def _kind(trace: EpisodeTrace) -> str:
    return "imagined" if trace.hindsight else "simulated"


def _columns(blocks: int) -> list[int]:
    """Numbers of the states to show."""
    every = -(-blocks // (MAX_COLUMNS - 1))
    return [*range(0, blocks, every), blocks]


def _film_strip(figure: SubFigure, trace: EpisodeTrace, states: list[int]) -> None:
    futures = {future.start + 1 + h: (future, h) for future in foretold(trace) for h in range(len(future))}
    seen = {future.start for future in foretold(trace)}
    cameras = trace.compared_cameras
    grid = figure.subplots(3 * len(cameras), len(states), squeeze=False)
    for index, camera in enumerate(cameras):
        for row, label in enumerate((f"{camera}\nreal", f"{camera}\n{_kind(trace)}", "difference")):
            grid[3 * index + row][0].set_ylabel(label, fontsize=9.5, rotation=0, ha="right", va="center", labelpad=6)
        for column, state in enumerate(states):
            real = trace.frames[camera][state]
            imagined = _imagined_frame(futures.get(state), camera)
            difference = None
            if imagined is not None:
                difference = np.abs(imagined.astype(np.int16) - real).mean(axis=-1)
            for row, picture in enumerate((real, imagined, difference)):
                axes = grid[3 * index + row][column]
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
                if picture is not None:
                    axes.imshow(picture, interpolation="nearest", cmap="inferno", vmin=0, vmax=128)
            if imagined is None:
                grid[3 * index + 1][column].text(
                    0.5, 0.5, "starts\nhere", transform=grid[3 * index + 1][column].transAxes,
                    ha="center", va="center", fontsize=8.5, color=COPY,
                )  # fmt: skip
            elif index == 0:
                ahead = futures[state][1] + 1
                _badge(grid[1][column], f"+{ahead}")
            if index == 0 and state in seen:
                grid[0][column].spines[:].set_visible(True)
                grid[0][column].spines[:].set(color=IMAGINED, linewidth=2)
        if index == 0:
            for column, state in enumerate(states):
                grid[0][column].set_title("start" if state == 0 else f"block {state}", fontsize=9, pad=4)


def _badge(axes: Axes, text: str) -> None:
    box = {"boxstyle": "round,pad=0.15", "facecolor": IMAGINED, "edgecolor": "none", "alpha": 0.9}
    axes.text(0.05, 0.94, text, transform=axes.transAxes, ha="left", va="top", fontsize=7.5, color="white", bbox=box)


def _imagined_frame(entry: tuple[Future, int] | None, camera: str) -> np.ndarray | None:
    if entry is None or camera not in entry[0].frames:
        return None
    frame: np.ndarray = entry[0].frames[camera][entry[1]]
    return frame


def _reward(axes: Axes, trace: EpisodeTrace) -> None:
    axes.set_title("reward", fontsize=10, loc="left")
    for decision in trace.decisions:
        if decision.future is not None:
            _branch(axes, decision.future, trace.reward_T, decision.future.reward_H, color=PLAN, linewidth=1)
    axes.plot(np.arange(len(trace) + 1), trace.reward_T, color=REAL, linewidth=2)
    for future in foretold(trace):
        _branch(
            axes, future, trace.reward_T, future.reward_H, color=IMAGINED, linewidth=1.6, marker="o", markersize=3.5
        )
    axes.set_ylim(-0.03, 1.03)


def _tool(axes: Axes, trace: EpisodeTrace) -> None:
    axes.set_title(f"tool [cm], dotted: {_kind(trace)}", fontsize=10, loc="left")
    for index, colour in zip(tool_index(trace.proprio_fields), AXES, strict=False):
        real_T = 100 * trace.proprio_TP[:, index]
        axes.plot(np.arange(len(trace) + 1), real_T, color=colour, linewidth=2)
        for future in foretold(trace):
            imagined_H = 100 * future.proprio_HP[:, index]
            _branch(
                axes, future, real_T, imagined_H, color=colour, linewidth=1.4, linestyle=":", marker="o", markersize=3.5
            )
        name = trace.proprio_fields[index].name.removeprefix("ee_")
        axes.annotate(
            name, (len(trace), real_T[-1]), xytext=(5, 0), textcoords="offset points", color=colour, va="center"
        )


def _branch(axes: Axes, future: Future, real_T: np.ndarray, imagined_H: np.ndarray, **style: Any) -> None:
    """A line that leaves the real one where the model saw it last."""
    blocks = np.arange(future.start, future.start + len(future) + 1)
    axes.plot(
        blocks, np.concatenate([real_T[future.start : future.start + 1], imagined_H]), markevery=slice(1, None), **style
    )


def _tool_error(axes: Axes, errors: Foresight) -> None:
    axes.set_title("tool error [cm]", fontsize=10, loc="left")
    axes.bar(errors.block_M, errors.tool_error_M, width=0.65, color=IMAGINED)
    axes.set_ylim(0, max(1.0, 1.1 * float(np.nan_to_num(errors.tool_error_M).max())))


def _image_error(axes: Axes, errors: Foresight) -> None:
    axes.set_title("frames, PSNR [dB]", fontsize=10, loc="left")
    imagined, copied = (np.minimum(values, MAX_PSNR) for values in (errors.psnr_M, errors.copy_psnr_M))
    axes.plot(errors.block_M, imagined, color=IMAGINED, marker="o", markersize=3.5, linewidth=1.6, label="imagined")
    axes.plot(errors.block_M, copied, color=COPY, marker="s", markersize=3, linewidth=1.2, label="last seen frame")
    axes.legend(fontsize=8, frameon=False, loc="best")
