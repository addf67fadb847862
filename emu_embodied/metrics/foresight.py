"""How far what was foretold of an episode was from what happened in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emu_embodied.metrics.image import psnr
from emu_embodied.records import Field
from emu_embodied.viz.trace import EpisodeTrace, Future

TOOL = ("ee_x", "ee_y", "ee_z")
"""Proprio fields that are the tool's position [m]."""


@dataclass(frozen=True, slots=True)
class Foresight:
    """Errors of the M states that were foretold, in the order of the episode.

    Attributes:
        block_M: int [M], number of the state (blocks executed before it).
        ahead_M: int [M], blocks between the last state the model saw and this one.
        psnr_M: float [M], mean over cameras of imagined against real frames [dB]; infinite where they are equal.
        copy_psnr_M: float [M], the same for a model that repeats the last frame it saw.
        reward_error_M: float [M], absolute error of the reward.
        tool_error_M: float [M], distance between imagined and real tool position [cm]; NaN without such proprio fields.
    """

    block_M: np.ndarray
    ahead_M: np.ndarray
    psnr_M: np.ndarray
    copy_psnr_M: np.ndarray
    reward_error_M: np.ndarray
    tool_error_M: np.ndarray


def foretold(trace: EpisodeTrace) -> tuple[Future, ...]:
    """The futures to judge: the hindsight or, without one, the part of every plan that was executed."""
    if trace.hindsight:
        return trace.hindsight
    starts = [decision.block for decision in trace.decisions]
    return tuple(
        _head(decision.future, end - decision.block)
        for decision, end in zip(trace.decisions, [*starts[1:], trace.planned_blocks], strict=False)
        if decision.future is not None
    )


def foresight(trace: EpisodeTrace) -> Foresight:
    """Compare every foretold state with the real one.

    Raises:
        ValueError: if nothing was foretold, or the episode has no frames.
    """
    futures = foretold(trace)
    if not futures or not trace.frames:
        raise ValueError("nothing to compare: run a planning policy with record=True, and the episode with render=True")
    tool = tool_index(trace.proprio_fields)
    rows = []
    for future in futures:
        for h in range(len(future)):
            state = future.start + 1 + h
            real = {camera: frames[state] for camera, frames in trace.frames.items() if camera in future.frames}
            offset = (future.proprio_HP[h] - trace.proprio_TP[state])[tool]
            rows.append((
                state,
                h + 1,
                np.mean([psnr(future.frames[camera][h], frame) for camera, frame in real.items()]),
                np.mean([psnr(trace.frames[camera][future.start], frame) for camera, frame in real.items()]),
                abs(future.reward_H[h] - trace.reward_T[state]),
                100 * np.linalg.norm(offset) if tool else np.nan,
            ))  # fmt: skip
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    return Foresight(*columns)


def tool_index(fields: Sequence[Field]) -> list[int]:
    """Where the tool's position stands in the proprio vector; empty if it is not there."""
    names = [field.name for field in fields]
    return [names.index(name) for name in TOOL if name in names]


def _head(future: Future, blocks: int) -> Future:
    return Future(
        start=future.start,
        actions_HKA=future.actions_HKA[:blocks],
        frames={camera: frames[:blocks] for camera, frames in future.frames.items()},
        proprio_HP=future.proprio_HP[:blocks],
        reward_H=future.reward_H[:blocks],
        success_H=future.success_H[:blocks],
    )
