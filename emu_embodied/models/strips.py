"""Large images a strip of rows at a time, through the network that whole images go through.

A convolution needs a few rows around its own, a group norm the statistics of the whole image. ``Strips`` stands in for
an activation: torch's functions, called on it by unchanged layers, return another ``Strips`` that computes its rows
when they are asked for. Statistics are gathered over all strips first, so that the result is that of the whole image
within float error. Between two places where the network ``hold``s an activation nothing is held, and what a norm reads
is computed twice, for its statistics too: memory is one activation of the widest level and a few strips.

Shape letters: B batch, C channels, H/W rows and columns, G groups of a norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Rows = Callable[[int, int], torch.Tensor]
"""(start, stop) -> rows start .. stop - 1 of an activation, [B, C, stop - start, W]."""

_LEAST_ROWS = 8
"""Rows of a strip at least: fewer would mostly be the neighbours that convolutions need (two on either side)."""


class Strips:
    """An activation [B, C, H, W] that is computed strip by strip; inference only.

    Args:
        shape: B, C, H, W.
        rows: computes some of its rows.
        budget: elements that a strip, or anything it is computed from, may have; roughly.
        source: what it is computed from, if it is not in memory.
        held: the activation itself, if it is in memory.
    """

    def __init__(
        self,
        shape: Sequence[int],
        rows: Rows,
        budget: int,
        source: Strips | None = None,
        held: torch.Tensor | None = None,
    ) -> None:
        self.shape = torch.Size(shape)
        self.rows = rows
        self.budget = budget
        self.held = held
        batch, channels, height, width = self.shape
        self._row: float = batch * channels * width  # elements for a row of this, here or where it comes from
        if source is not None:
            self._row = max(self._row, source._row * source.shape[2] / height)

    @classmethod
    def of(cls, x: torch.Tensor, budget: int) -> Strips:
        """An activation in memory, read strip by strip."""
        return cls(x.shape, lambda start, stop: x[:, :, start:stop], budget, held=x)

    def spans(self) -> Iterator[tuple[int, int]]:
        """First row and end of each strip."""
        height = self.shape[2]
        step = max(_LEAST_ROWS, int(self.budget // self._row))
        return ((start, min(start + step, height)) for start in range(0, height, step))

    def whole(self, over: torch.Tensor | None = None) -> torch.Tensor:
        """The activation in memory.

        Args:
            over: what may be overwritten by it, of its shape, although its rows are computed from it: a strip is
                written once the next one, which needs its last rows as they were, has been computed.
        """
        if self.held is not None:
            return self.held
        out: torch.Tensor | None = over
        late: tuple[int, int, torch.Tensor] | None = None
        for start, stop in self.spans():
            strip = self.rows(start, stop)
            if out is None:
                out = strip.new_empty(self.shape).to(memory_format=torch.channels_last)
            if late is not None:
                out[:, :, late[0] : late[1]] = late[2]
            late = (start, stop, strip)
        assert out is not None and late is not None
        out[:, :, late[0] : late[1]] = late[2]
        return out

    def __add__(self, other: Strips | torch.Tensor) -> Strips:
        """Sum with an activation of the same shape."""
        others = other.rows if isinstance(other, Strips) else lambda start, stop: other[:, :, start:stop]
        return self._then(lambda start, stop: self.rows(start, stop) + others(start, stop))

    def _then(self, rows: Rows, shape: Sequence[int] | None = None) -> Strips:
        return Strips(self.shape if shape is None else shape, rows, self.budget, self)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What torch calls instead of ``func`` when an argument is a ``Strips``."""
        return _FUNCTIONS[func](*args, **(kwargs or {}))


def whole(x: torch.Tensor | Strips) -> torch.Tensor:
    """An activation in memory."""
    return x.whole() if isinstance(x, Strips) else x


def hold(x: Any, over: Any = None) -> Any:
    """Compute an activation that others will read more than once; a tensor is so already.

    Args:
        x: tensor or ``Strips``.
        over: an activation that nobody reads after this; its memory is used again where it fits.
    """
    if not isinstance(x, Strips):
        return x
    reused = over.held if isinstance(over, Strips) and over.shape == x.shape else None
    return Strips.of(x.whole(reused), x.budget)


def _conv2d(
    x: Strips,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    *_dilation_and_groups: Any,
) -> Strips:
    batch, height, width = x.shape[0], *x.shape[2:]
    size, step, pad = weight.shape[2], stride[0], padding[0]
    out_height, out_width = ((side + 2 * pad - size) // step + 1 for side in (height, width))

    def rows(start: int, stop: int) -> torch.Tensor:
        first, end = start * step - pad, (stop - 1) * step - pad + size
        seen = x.rows(max(first, 0), min(end, height))
        if first < 0 or end > height:
            seen = F.pad(seen, (0, 0, max(-first, 0), max(end - height, 0)))
        return F.conv2d(seen, weight, bias, step, (0, pad))

    return x._then(rows, (batch, len(weight), out_height, out_width))


def _group_norm(x: Strips, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Strips:
    """Statistics over all strips (Chan et al. 1979, in float64), then one scale and shift for each channel."""
    batch, channels = x.shape[:2]
    count, mean_BG, squares_BG = 0, torch.zeros(()), torch.zeros(())
    for start, stop in x.spans():
        strip = x.rows(start, stop).unflatten(1, (groups, -1))
        var_BG, here_BG = (part.double() for part in torch.var_mean(strip, (2, 3, 4), correction=0))
        more = strip[0, 0].numel()
        if not count:
            count, mean_BG, squares_BG = more, here_BG, var_BG * more
            continue
        apart_BG, total = here_BG - mean_BG, count + more
        mean_BG = mean_BG + apart_BG * (more / total)
        squares_BG = squares_BG + var_BG * more + apart_BG.square() * (count * more / total)
        count = total
    scale_BG = (squares_BG / count + eps).rsqrt()
    each = channels // groups
    scale = weight * scale_BG.repeat_interleave(each, 1)
    shift = (bias - mean_BG.repeat_interleave(each, 1) * scale).to(weight.dtype).view(batch, channels, 1, 1)
    scale = scale.to(weight.dtype).view(batch, channels, 1, 1)
    return x._then(lambda start, stop: torch.addcmul(shift, x.rows(start, stop), scale))


def _silu(x: Strips, inplace: bool = False) -> Strips:
    return x._then(lambda start, stop: F.silu(x.rows(start, stop)))


def _pad(x: Strips, pad: tuple[int, int, int, int], *_: Any, **__: Any) -> Strips:
    left, right, top, bottom = pad
    batch, channels, height, width = x.shape

    def rows(start: int, stop: int) -> torch.Tensor:
        first, end = start - top, stop - top
        seen = x.rows(max(first, 0), min(end, height))
        return F.pad(seen, (left, right, max(-first, 0), max(end - height, 0)))

    return x._then(rows, (batch, channels, height + top + bottom, width + left + right))


def _interpolate(x: Strips, scale_factor: float, **_: Any) -> Strips:
    batch, channels, height, width = x.shape
    times = int(scale_factor)

    def rows(start: int, stop: int) -> torch.Tensor:
        first = start // times
        larger = F.interpolate(x.rows(first, -(-stop // times)), scale_factor=scale_factor, mode="nearest")
        return larger[:, :, start - first * times : stop - first * times]

    return x._then(rows, (batch, channels, height * times, width * times))


def _pixel_shuffle(x: Strips, patch: int) -> Strips:
    batch, channels, height, width = x.shape

    def rows(start: int, stop: int) -> torch.Tensor:
        first = start // patch
        unfolded = F.pixel_shuffle(x.rows(first, -(-stop // patch)), patch)
        return unfolded[:, :, start - first * patch : stop - first * patch]

    return x._then(rows, (batch, channels // patch**2, height * patch, width * patch))


def _pixel_unshuffle(x: Strips, patch: int) -> Strips:
    batch, channels, height, width = x.shape
    return x._then(
        lambda start, stop: F.pixel_unshuffle(x.rows(start * patch, stop * patch), patch),
        (batch, channels * patch**2, height // patch, width // patch),
    )


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Strips]] = {
    F.conv2d: _conv2d,
    F.group_norm: _group_norm,
    F.silu: _silu,
    F.pad: _pad,
    F.interpolate: _interpolate,
    F.pixel_shuffle: _pixel_shuffle,
    F.pixel_unshuffle: _pixel_unshuffle,
}
"""All that a vision tokenizer's layers call on an activation."""
