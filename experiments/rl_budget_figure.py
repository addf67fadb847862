"""Table and figure of ``rl_budget``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from emu_embodied.files import write_atomically
from emu_embodied.metrics.intervals import wilson

COLOURS = {"policy": "#1f6fb4", "imagined": "#e07a10", "planner": "#2f8f4e", "cloning": "#8a4fb0"}
_NOT_RUN = "not run"


def pooled(cells: Sequence[dict[str, Any]], method: str, rollouts: int, solved: str = "solved") -> str:
    """Success of all seeds of a cell with its interval, in words."""
    own = [cell for cell in cells if cell["method"] == method and cell["rollouts"] == rollouts]
    if not own:
        return _NOT_RUN
    won, total = sum(cell[solved] for cell in own), sum(cell["episodes"] for cell in own)
    low, high = wilson(won, total)
    seeds = ", ".join(f"{100 * cell[solved] / cell['episodes']:.0f}" for cell in own)
    each = f"; seeds {seeds}" if len(own) > 1 else ""
    return f"{100 * won / total:.0f} % ({100 * low:.0f} to {100 * high:.0f}{each})"


def table(cells: Sequence[dict[str, Any]], methods: Sequence[str], budgets: Sequence[int], verify: str) -> str:
    """Markdown: a row for each method, a column for each budget."""
    header = ["method", "before", *(f"after {budget:,} real rollouts" for budget in budgets)]
    lines = [header, ["---"] * len(header)]
    for method in methods:
        lines.append([method, pooled(cells, "base", 0), *(pooled(cells, method, budget) for budget in budgets)])
    if verify:
        for method in methods:
            own = [pooled(cells, method, budget, "verified") for budget in budgets]
            lines.append([f"{method}, in {verify}", pooled(cells, "base", 0, "verified"), *own])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def draw_budget(cells: Sequence[dict[str, Any]], curves: Sequence[dict[str, Any]], env: str, path: Path) -> None:
    """Success while training (thin lines) and on held-out episodes (points with intervals) over real rollouts."""
    figure = Figure(figsize=(8, 4.5), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    own = [point for point in curves if point["method"] in ("policy", "imagined")]  # others log their teacher's success
    for (method, _), points in _by_run(own).items():
        rollouts = np.array([point["rollouts"] for point in points])
        success = np.array([point["success"] for point in points])
        width = max(1, min(4, len(success)))
        smooth = np.convolve(success, np.ones(width) / width, "valid")
        axes.plot(rollouts[width - 1 :], 100 * smooth, color=COLOURS[method], alpha=0.35, linewidth=1)
    base = [cell for cell in cells if cell["method"] == "base"]
    for method, colour in COLOURS.items():
        budgets = sorted({cell["rollouts"] for cell in cells if cell["method"] == method})
        if not budgets:
            continue
        places, rates, spread = [], [], []
        for budget in [0, *budgets] if base else budgets:
            chosen = base if budget == 0 else [c for c in cells if (c["method"], c["rollouts"]) == (method, budget)]
            won, total = sum(c["solved"] for c in chosen), sum(c["episodes"] for c in chosen)
            low, high = wilson(won, total)
            places.append(budget)
            rates.append(100 * won / total)
            spread.append((rates[-1] - 100 * low, 100 * high - rates[-1]))
        axes.errorbar(places, rates, np.array(spread).T, color=colour, marker="o", capsize=3, label=method)
    axes.set_xscale("symlog", linthresh=100)
    axes.set_ylim(-2, 102)
    axes.set_xlabel("real rollouts")
    axes.set_ylabel("success [%]")
    axes.set_title(f"{env}: points held out, at temperature 0; thin lines while training, at temperature 1", fontsize=9)
    axes.grid(alpha=0.3)
    if axes.containers:
        axes.legend()
    write_atomically(path, lambda aside: figure.savefig(aside, format="png"))


def _by_run(curves: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for point in curves:
        runs.setdefault((point["method"], point["seed"]), []).append(point)
    return runs
