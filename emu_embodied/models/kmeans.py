"""Where code vectors should stand: k-means over directions, because codes are chosen by dot product.

All vectors here have unit length. N vectors, K codes, D dimensions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def to_directions(vectors: torch.Tensor, generator: torch.Generator, most: int = 1 << 16) -> torch.Tensor:
    """Unit vectors [N, D] of vectors [..., D]; at most ``most`` random ones, which bounds the work that follows."""
    rows = vectors.reshape(-1, vectors.shape[-1])
    if len(rows) > most:
        rows = rows[torch.randperm(len(rows), generator=generator)[:most].to(rows.device)]
    return F.normalize(rows, dim=1)


def far_apart(
    directions: torch.Tensor, count: int, generator: torch.Generator, taken: torch.Tensor | None = None
) -> torch.Tensor:
    """Draw ``count`` of the directions, each by its squared distance to the nearest one drawn or ``taken`` before.

    So k-means++ is seeded (Arthur and Vassilvitskii, 2007): rare sights get codes too, where random ones would nearly
    all show the plain background. Repeated ones are jittered apart.

    Args:
        directions: [N, D].
        count: K; may exceed N.
        generator: draws them; on the CPU.
        taken: codes that exist already, [K', D].

    Returns:
        [K, D], unit length.
    """
    draws = torch.rand(count, generator=generator).to(directions)
    distance = torch.full_like(directions[:, 0], 4.0)
    if taken is not None:
        for part in taken.split(max(1, (1 << 24) // len(directions))):
            distance = torch.minimum(distance, 2 - 2 * (directions @ part.T).amax(1))
    drawn: list[torch.Tensor] = []
    for draw in draws:
        reach = distance.clamp_min(1e-9).cumsum(0)
        row = torch.searchsorted(reach, (draw * reach[-1]).unsqueeze(0)).clamp_max(len(reach) - 1)
        distance = torch.minimum(distance, 2 - 2 * (directions @ directions[row].T).squeeze(1))
        drawn.append(row)
    codes = directions[torch.cat(drawn)]
    noise = torch.randn(codes.shape, generator=generator).to(codes) / math.sqrt(codes.shape[1])
    return F.normalize(codes + 0.02 * noise, dim=1)


def refine(codes: torch.Tensor, directions: torch.Tensor, passes: int = 5) -> torch.Tensor:
    """Spherical k-means: in every pass a code moves to the mean direction of the vectors it is nearest to.

    Args:
        codes: [K, D].
        directions: [N, D].
        passes: 5 are nearly as good as 10.

    Returns:
        [K, D], unit length; a code that is nearest to nothing stays.
    """
    for _ in range(passes):
        nearest = torch.cat([(part @ codes.T).argmax(1) for part in directions.split(1 << 13)])
        sums = torch.zeros_like(codes).index_add_(0, nearest, directions)
        hit = torch.bincount(nearest, minlength=len(codes)) > 0
        codes = torch.where(hit[:, None], F.normalize(sums, dim=1), codes)
    return codes
