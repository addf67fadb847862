"""The files a planned episode leaves: a film, a figure, and the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from emu_embodied.files import write_json
from emu_embodied.metrics.foresight import foresight, foretold
from emu_embodied.provenance import meta_dict
from emu_embodied.records import Meta
from emu_embodied.viz.compare import FPS, plan_video
from emu_embodied.viz.figures import imagined_vs_real_figure, save_figure
from emu_embodied.viz.subgoals import subgoals_summary, write_subgoals
from emu_embodied.viz.trace import EpisodeTrace
from emu_embodied.viz.video import write_video


def write_plan_report(trace: EpisodeTrace, folder: Path, meta: Meta) -> list[Path]:
    """Write ``plan.mp4``, ``imagined_vs_real.png``, what ``write_subgoals`` writes and, last, ``result.json``.

    Args:
        trace: an episode with frames; the figure needs recorded futures and is left out without them.
        folder: made if it does not exist.
        meta: where the result comes from.

    Returns:
        The files written.
    """
    video, figure, result = folder / "plan.mp4", folder / "imagined_vs_real.png", folder / "result.json"
    written = [video]
    write_video(video, plan_video(trace), FPS)
    if foretold(trace):
        save_figure(figure, imagined_vs_real_figure(trace))
        written.append(figure)
    if trace.subgoals or trace.ended:
        written += write_subgoals(trace, folder)
    write_json(result, {**summary(trace), "meta": meta_dict(meta)})
    return [*written, result]


def summary(trace: EpisodeTrace) -> dict[str, Any]:
    """The numbers of an episode, JSON-ready."""
    return {
        "verdict": trace.verdict,
        "env": trace.env_id,
        "policy": trace.policy,
        "seed": trace.seed,
        "instruction": trace.instruction,
        "success": trace.success,
        "blocks": len(trace),
        "return": trace.episode_return,
        "seconds_per_decision": float(trace.act_seconds_T.mean()),
        "reward": _numbers(trace.reward_T),
        "decisions": [
            {
                "block": decision.block,
                "cost": decision.plan.cost,
                "best_costs": list(decision.plan.best_costs),
                "evaluations": decision.plan.evaluations,
                "search_seconds": decision.seconds,
            }
            for decision in trace.decisions
        ],
        "imagined_vs_real": _errors(trace),
        "subgoals": subgoals_summary(trace),
        "ended": trace.ended,
    }


def _errors(trace: EpisodeTrace) -> dict[str, Any] | None:
    if not foretold(trace) or not trace.frames:
        return None
    errors = foresight(trace)
    return {
        "block": errors.block_M.tolist(),
        "blocks_ahead": errors.ahead_M.tolist(),
        "psnr_db": _numbers(errors.psnr_M),
        "copy_last_psnr_db": _numbers(errors.copy_psnr_M),
        "reward_error": _numbers(errors.reward_error_M),
        "tool_error_cm": _numbers(errors.tool_error_M),
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    """Floats, with None for what JSON has no number for (the infinite PSNR of equal pictures)."""
    return [round(float(value), 4) if np.isfinite(value) else None for value in values]
