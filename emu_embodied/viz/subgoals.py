"""Subtasks side by side: what was seen, what the model pictured as its completion, and what was achieved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from emu_embodied.files import write_atomically
from emu_embodied.records import Frames
from emu_embodied.viz.compare import BACKGROUND, FAINT, GAP, IMAGINED, MARGIN, REAL, SOLVED, TEXT, font
from emu_embodied.viz.trace import EpisodeTrace, SubgoalTrace

PANEL = 192
"""Height that pictures are enlarged to, by whole numbers [pixels]."""
HEAD, CAPTION = 64, 30
"""Height of the title, and of the line above each row [pixels]."""
TITLES = (("before", REAL), ("imagined completion", IMAGINED), ("achieved", REAL))


def subgoals_picture(trace: EpisodeTrace) -> np.ndarray:
    """One row for each subgoal: before, imagined, achieved. uint8 [height, width, 3].

    Args:
        trace: an episode with frames, of a policy that recorded its subgoals.

    Raises:
        ValueError: if nothing was recorded.
    """
    if not trace.subgoals or not trace.frames or not all(subgoal.keyframe for subgoal in trace.subgoals):
        raise ValueError("no pictures of subgoals: run a policy that pursues some, with record=True and frames")
    cameras = [camera for camera in trace.frames if camera in trace.subgoals[0].keyframe]
    height, width = trace.frames[cameras[0]].shape[1:3]
    scale = max(1, PANEL // height)
    tall, wide = height * scale, len(cameras) * width * scale + (len(cameras) - 1) * GAP
    row = CAPTION + tall + GAP
    size = (2 * MARGIN + 3 * wide + 2 * MARGIN, HEAD + len(trace.subgoals) * row + MARGIN)
    image = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, 10), f"\u201c{trace.instruction}\u201d", font=_fitting(trace.instruction, size[0]), fill=TEXT)
    for column, (title, colour) in enumerate(TITLES):
        pen.text((MARGIN + column * (wide + MARGIN), HEAD - 22), title, font=font(13, bold=True), fill=colour)
    for index, subgoal in enumerate(trace.subgoals):
        top = HEAD + index * row
        good = subgoal.outcome == "reached"
        pen.text((MARGIN, top + 8), f"{index + 1}  {subgoal.text}", font=font(14, bold=True), fill=TEXT)
        pen.text(
            (size[0] - MARGIN, top + 8), _outcome(subgoal), font=font(13), fill=SOLVED if good else FAINT, anchor="ra"
        )
        before = {camera: trace.frames[camera][subgoal.start] for camera in cameras}
        for column, frames in enumerate((before, subgoal.keyframe, subgoal.achieved)):
            _paste(image, frames, cameras, (MARGIN + column * (wide + MARGIN), top + CAPTION), scale)
    return np.asarray(image)


def subgoals_markdown(trace: EpisodeTrace, picture: str | None = None) -> str:
    """The subgoals as a Markdown page.

    Args:
        trace: an episode of a policy that pursues subgoals.
        picture: file of ``subgoals_picture``, to show in it.
    """
    lines = [f"# {trace.instruction}", "", trace.verdict + (f"; {trace.ended}" if trace.ended else ""), ""]
    if picture:
        lines += [f"![before, imagined, achieved]({picture})", ""]
    lines += [
        "| # | subtask | from block | blocks | outcome | place [cm] | picture |",
        "| ---: | --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for index, subgoal in enumerate(trace.subgoals):
        place = "" if subgoal.place is None else f"{100 * (subgoal.first_place or 0):.1f} to {100 * subgoal.place:.1f}"
        pictures = f"{subgoal.first_picture:.2f} to {subgoal.picture:.2f}"
        cells = (index + 1, subgoal.text, subgoal.start, subgoal.blocks, subgoal.outcome, place, pictures)
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    explained = "Place and picture are distances from the imagined completion, when a subtask was taken up and left."
    return "\n".join([*lines, "", explained, ""])


def subgoals_summary(trace: EpisodeTrace) -> list[dict[str, Any]]:
    """The subgoals without their pictures, JSON-ready."""
    names = ("text", "start", "blocks", "outcome", "first_place", "place", "first_picture", "picture")
    return [{name: getattr(subgoal, name) for name in names} for subgoal in trace.subgoals]


def write_subgoals(trace: EpisodeTrace, folder: Path) -> list[Path]:
    """Write ``subgoals.png`` (where pictures were recorded) and ``subgoals.md``; the files written."""
    page, picture = folder / "subgoals.md", folder / "subgoals.png"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = bool(trace.subgoals and trace.frames and trace.subgoals[0].keyframe)
    if drawn:
        image = Image.fromarray(subgoals_picture(trace))
        write_atomically(picture, lambda aside: image.save(aside, format="png"))
    text = subgoals_markdown(trace, picture.name if drawn else None)
    write_atomically(page, lambda aside: aside.write_text(text))
    return [picture, page] if drawn else [page]


def _outcome(subgoal: SubgoalTrace) -> str:
    blocks = "1 block" if subgoal.blocks == 1 else f"{subgoal.blocks} blocks"
    return f"{subgoal.outcome}, {blocks}" + ("" if subgoal.place is None else f", {100 * subgoal.place:.1f} cm off")


def _paste(image: Image.Image, frames: Frames, cameras: list[str], corner: tuple[int, int], scale: int) -> None:
    left, top = corner
    for camera in cameras:
        height, width = frames[camera].shape[:2]
        panel = Image.fromarray(frames[camera]).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        image.paste(panel, (left, top))
        left += panel.width + GAP


def _fitting(text: str, width: int) -> Any:
    fonts = [font(size, bold=True) for size in (18, 15, 12)]
    return next((f for f in fonts if f.getlength(text) <= width - 2 * MARGIN - 20), fonts[-1])
