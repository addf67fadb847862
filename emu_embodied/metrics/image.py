"""How near two pictures are. uint8 [..., height, width, 3] in, one number for each picture out."""

from __future__ import annotations

import numpy as np

_RANGE = 255.0


def psnr(images: np.ndarray, references: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Peak signal-to-noise ratio [dB] float64 [...]; ``inf`` where nothing differs.

    Args:
        images: uint8 [..., height, width, 3].
        references: the same shape.
        mask: bool [..., height, width], pixels that count (for instance those that move); all where None. A picture
            without any gives NaN.
    """
    error = _squared_error(images, references).mean(axis=-1)
    if mask is None:
        mean = error.mean(axis=(-2, -1))
    else:
        counted = mask.sum(axis=(-2, -1))
        with np.errstate(invalid="ignore"):
            mean = (error * mask).sum(axis=(-2, -1)) / np.asarray(counted, np.float64)
    with np.errstate(divide="ignore"):
        decibels: np.ndarray = 10.0 * np.log10(_RANGE**2 / mean)
    return decibels


def ssim(images: np.ndarray, references: np.ndarray, *, sigma: float = 1.5, radius: int = 5) -> np.ndarray:
    """Structural similarity in [-1, 1], float64 [...] (Wang et al. 2004: Gaussian window, mean over colours).

    Only windows that lie wholly inside the picture count.

    Args:
        images: uint8 [..., height, width, 3], at least ``2 * radius + 1`` pixels a side.
        references: the same shape.
        sigma: standard deviation of the window [pixels].
        radius: half width of the window [pixels].

    Raises:
        ValueError: if the shapes differ, or the pictures are smaller than the window.
    """
    _check_pair(images, references)
    if min(images.shape[-3:-1]) < 2 * radius + 1:
        raise ValueError(f"SSIM needs pictures of at least {2 * radius + 1} pixels a side, got {images.shape[-3:-1]}")
    offsets = np.arange(-radius, radius + 1)
    window = np.exp(-0.5 * (offsets / sigma) ** 2)
    window /= window.sum()

    def blur(values: np.ndarray) -> np.ndarray:
        for axis in (-3, -2):
            slices = np.lib.stride_tricks.sliding_window_view(values, len(window), axis=axis)
            values = slices @ window
        return values

    x, y = images.astype(np.float64), references.astype(np.float64)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    similarity: np.ndarray = (luminance * structure).mean(axis=(-3, -2, -1))
    return similarity


def _squared_error(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    _check_pair(images, references)
    difference: np.ndarray = images.astype(np.float64) - references.astype(np.float64)
    return difference**2


def _check_pair(images: np.ndarray, references: np.ndarray) -> None:
    if images.shape != references.shape or images.ndim < 3:
        raise ValueError(
            f"compare pictures [..., height, width, 3] of one shape, got {images.shape} and {references.shape}"
        )
    if images.dtype != np.uint8 or references.dtype != np.uint8:
        raise ValueError(f"compare uint8 pictures, got {images.dtype} and {references.dtype}")
