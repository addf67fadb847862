"""The rows of ``compare_decoding``: ways of decoding, what was found of each, and the table of it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emu_embodied.decode.order import Order
from emu_embodied.files import write_atomically
from emu_embodied.world_model import WorldModel

COMPARED = ("random", "noisy")
"""Behaviours whose plans are compared."""

MEANS = (
    "token_accuracy", "changed_token_accuracy", "copy_last_token_accuracy", "psnr", "copy_last_psnr", "tokenizer_psnr",
    "reward_corr", "repeated_share", "real_repeated_share",
)  # fmt: skip
"""Figures of ``HorizonRow`` whose means over horizons are columns of the table."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of decoding."""

    method: str
    """``autoregressive``, or the noise process of parallel decoding."""
    passes: int = 0
    """Parallel passes; 0 for next token."""
    order: Order = "random"
    """What settles first."""
    temperature: float = 0.0
    """Of sampling."""
    source_noise: float = 0.0
    """Of ``state_coupled``."""

    def decoded(self, world: WorldModel) -> WorldModel:
        """The same weights, decoded so."""
        if self.method == "autoregressive":
            return world.with_decoding("autoregressive", temperature=self.temperature)
        return world.with_decoding(
            "dida",
            path=self.method,
            passes=self.passes,
            order=self.order,
            temperature=self.temperature,
            source_noise=self.source_noise,
        )

    @property
    def label(self) -> str:
        """For people."""
        if self.method == "autoregressive":
            return self.method
        order = "" if self.order == "random" else f" {self.order}"
        return f"{self.method}{order} x{self.passes}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way of decoding in one environment."""

    env: str
    """Environment id."""
    method: str
    """See ``Variant``."""
    passes: int
    """See ``Variant``."""
    order: Order
    """See ``Variant``."""
    per_horizon: list[dict[str, Any]]
    """``HorizonRow`` of each horizon."""
    plans: dict[str, Any]
    """``PlanScores``."""
    planning: dict[str, Any] | None = None
    """``BenchRow`` of the planner that uses it; None where no episodes were planned."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else determines the figures of imagination: they are reused only where all of it agrees."""

    def summary(self) -> dict[str, Any]:
        """One line of the table: means over horizons, proprio error for each horizon, and what planning found."""
        means = {name: self.mean(name) for name in MEANS}
        errors = {f"proprio_mae_{one['h']}": one["proprio_mae"] for one in self.per_horizon}
        planning = self.planning or {}
        low, high = planning.get("ci95", (None, None))
        return {
            "env": self.env,
            "method": self.method,
            "passes": self.passes,
            "order": self.order,
            **means,
            **errors,
            **{f"plan_{name}": v for name, v in self.plans.items() if name not in ("within", "frames_per_s")},
            **{f"plan_correlation_{kind}": self.plans["within"].get(kind) for kind in COMPARED},
            "frames_per_s": self.plans["frames_per_s"],
            "success": planning.get("success"),
            "success_low": low,
            "success_high": high,
            "episodes": planning.get("episodes", 0),
            "seconds_per_decision": planning.get("seconds_per_action"),
        }

    def mean(self, name: str) -> float | None:
        """Mean of a figure over the horizons that define it."""
        values = [one[name] for one in self.per_horizon if one[name] is not None]
        return sum(values) / len(values) if values else None


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """The summaries as CSV."""
    summaries = [row.summary() for row in rows]

    def write(aside: Path) -> None:
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(summaries[0]))
            writer.writeheader()
            writer.writerows(summaries)

    write_atomically(path, write)


COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("token_accuracy", "tokens", ".3f"),
    ("changed_token_accuracy", "changed", ".3f"),
    ("psnr", "PSNR", ".2f"),
    ("reward_corr", "r states", ".2f"),
    ("plan_correlation", "r plans", ".2f"),
    ("plan_correlation_random", "r random", ".2f"),
    ("plan_tool_error_cm", "tool cm", ".2f"),
    ("repeated_share", "repeat", ".2f"),
    ("frames_per_s", "frames/s", ".1f"),
    ("success", "success", ".2f"),
)
"""Column, title and format of the table that is printed."""


def format_rows(rows: Sequence[Row]) -> str:
    """The summaries for a terminal."""
    lines = [f"{'environment':16s} {'decoding':26s}" + "".join(f"{title:>9s}" for _, title, _ in COLUMNS)]
    for row in rows:
        summary = row.summary()
        variant = Variant(row.method, row.passes, row.order)
        cells = ["-" if summary[name] is None else format(summary[name], how) for name, _, how in COLUMNS]
        lines.append(f"{row.env:16s} {variant.label:26s}" + "".join(f"{cell:>9s}" for cell in cells))
    return "\n".join(lines)
