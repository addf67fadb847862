"""Real and imagined next to each other: the film of a planned episode."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emu_embodied.records import Frames
from emu_embodied.viz.trace import Decision, EpisodeTrace

WIDTH = 540
"""Width to fill with the cameras of one side [pixels]; pictures are enlarged by whole numbers, so it may be less."""
MARGIN, GAP, SPLIT = 20, 8, 32
"""Around everything, between cameras, between real and imagined [pixels]."""
HEAD, FOOT = 64, 60
"""Height of the captions above and below the pictures [pixels]."""

BACKGROUND = (17, 20, 24)
TEXT, FAINT = (238, 240, 242), (148, 156, 166)
REAL, IMAGINED = (96, 190, 255), (255, 170, 64)
SOLVED, EMPTY = (110, 220, 130), (44, 50, 58)

_Label = tuple[str, tuple[int, int, int]]
"""A text and its colour."""

FPS = 6
"""Frames per second that ``plan_video`` is made for."""


def plan_video(trace: EpisodeTrace, *, act_frames: int = 3, end_frames: int = 12) -> np.ndarray:
    """The film of an episode, uint8 [frames, height, width, 3], for ``FPS`` frames per second.

    At every decision the real picture stands still while the imagined one plays the chosen plan to its end; then the
    block is executed, and both show the state reached: on the left as it is, on the right as it was expected. Without
    recorded futures only the real side is shown.

    Args:
        trace: an episode with frames.
        act_frames: how long each state reached is shown [frames].
        end_frames: how long the last one is [frames].

    Raises:
        ValueError: if the episode ran without rendering.
    """
    if not trace.frames:
        raise ValueError("the episode has no frames: run it with render=True")
    searches = {decision.block: decision for decision in trace.decisions}
    canvas = _Canvas(trace, imagined=any(decision.future is not None for decision in trace.decisions))
    film: list[np.ndarray] = []
    search: Decision | None = None
    for block in range(len(trace)):
        if block in searches:
            search = searches[block]
            if search.future is not None:
                for ahead in range(len(search.future)):
                    film.append(canvas.draw(block, search, ahead, thinking=True))
        elif block >= trace.planned_blocks:
            search = None  # nothing is expected any more
        expected = block - search.block if search is not None else 0
        film += [canvas.draw(block + 1, search, expected, thinking=False)] * act_frames
    return np.stack(film + film[-1:] * (end_frames - act_frames))


class _Canvas:
    """Lays out one frame: captions, the real cameras, the imagined ones."""

    def __init__(self, trace: EpisodeTrace, *, imagined: bool):
        self.trace = trace
        self.imagined = imagined
        height, width = next(iter(trace.frames.values())).shape[1:3]
        self.cameras = trace.compared_cameras
        cameras = len(self.cameras)
        scale = max(1, (WIDTH - (cameras - 1) * GAP) // (cameras * width))
        self.panel_width, self.panel_height = width * scale, height * scale
        self.side_width = cameras * self.panel_width + (cameras - 1) * GAP
        self.right = MARGIN + self.side_width + SPLIT
        self.inner = 2 * self.side_width + SPLIT if imagined else self.side_width
        self.size = (self.inner + 2 * MARGIN, self.panel_height + HEAD + FOOT)

    def draw(self, state: int, search: Decision | None, ahead: int, *, thinking: bool) -> np.ndarray:
        """State number ``state`` on the left, step ``ahead`` of the search's future on the right."""
        trace = self.trace
        image = Image.new("RGB", self.size, BACKGROUND)
        pen = ImageDraw.Draw(image)
        instruction = f"\u201c{trace.instruction}\u201d"
        size = next((size for size in (20, 17, 14) if font(size, bold=True).getlength(instruction) <= self.inner), 11)
        pen.text((MARGIN, 12), instruction, font=font(size, bold=True), fill=TEXT)
        origin = f"{trace.env_id}, seed {trace.seed}"
        pen.text((self.size[0] - MARGIN, HEAD - 20), origin, font=font(14), fill=FAINT, anchor="ra")
        self._side(image, MARGIN, {camera: trace.frames[camera][state] for camera in self.cameras})
        caption, colour = f"block {state}", TEXT
        if state == len(trace):
            caption, colour = (f"{caption}: solved", SOLVED) if trace.success else (f"{caption}: not solved", FAINT)
        self._caption(pen, MARGIN, ("real", REAL), (caption, colour), float(trace.reward_T[state]))
        if self.imagined and search is not None and search.future is not None:
            future = search.future
            self._side(image, self.right, {camera: future.frames[camera][ahead] for camera in self.cameras})
            blocks = f"{ahead + 1} block{'s' if ahead else ''} ahead"
            caption = f"plans {blocks}" if thinking else f"expected, {blocks}"
            # A planner that tries its candidates in the simulator has no hindsight: it imagines nothing.
            title = "imagined" if self.trace.hindsight else "tried in the simulator"
            self._caption(pen, self.right, (title, IMAGINED), (caption, TEXT), float(future.reward_H[ahead]))
        return np.asarray(image)

    def _side(self, image: Image.Image, left: int, frames: Frames) -> None:
        for column, picture in enumerate(frames.values()):
            panel = Image.fromarray(picture).resize((self.panel_width, self.panel_height), Image.Resampling.NEAREST)
            image.paste(panel, (left + column * (self.panel_width + GAP), HEAD))

    def _caption(self, pen: ImageDraw.ImageDraw, left: int, title: _Label, caption: _Label, reward: float) -> None:
        """Title above the pictures; below them what is seen, and the reward as a number and a bar."""
        pen.text((left, HEAD - 20), title[0], font=font(14, bold=True), fill=title[1])
        below = HEAD + self.panel_height + 10
        right = left + self.side_width
        pen.text((left, below), caption[0], font=font(15), fill=caption[1])
        pen.text((right, below), f"reward {reward:.2f}", font=font(15), fill=TEXT, anchor="ra")
        bar = below + 26
        filled = left + round(self.side_width * min(max(reward, 0.0), 1.0))
        pen.rectangle((left, bar, right, bar + 6), fill=EMPTY)
        pen.rectangle((left, bar, filled, bar + 6), fill=title[1])


@lru_cache(maxsize=16)
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
