"""Video files."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import numpy as np

from emu_embodied.files import write_atomically


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write an H.264 video (yuv420p, so that browsers play it); it is either whole or absent.

    Args:
        path: ``.mp4`` file, replaced if it exists.
        frames: uint8 [T, height, width, 3]; an odd side gets one more row or column, the format needs even ones.
        fps: frames per second.

    Raises:
        ValueError: for anything that is no film of at least one frame.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"a video needs frames uint8 [T, height, width, 3], got {frames.dtype} {list(frames.shape)}")
    odd_height, odd_width = frames.shape[1] % 2, frames.shape[2] % 2
    even = np.pad(frames, ((0, 0), (0, odd_height), (0, odd_width), (0, 0)), mode="edge")

    def write(aside: Path) -> None:
        iio.imwrite(aside, even, plugin="pyav", codec="libx264", fps=fps, out_pixel_format="yuv420p")

    write_atomically(Path(path), write)
