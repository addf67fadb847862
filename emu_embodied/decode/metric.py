"""Geometry of the metric path: distances of ids, and a schedule that fits them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_ALPHAS = np.linspace(0.1, 2.0, 39)
_SCALES = np.logspace(-1.5, 2.5, 81)
_BETAS = np.logspace(-5, 6, 133)
_TIMES = np.linspace(0.05, 0.95, 19)


@dataclass(frozen=True, slots=True)
class BetaSchedule:
    """beta_t = c (t / (1 - t))^alpha.

    Attributes:
        c: scale, in the inverse unit of the distance.
        alpha: exponent.
        deviation: root mean square over t of E[d](t) / E[d](0) - (1 - t) for the vectors it was tuned to.
    """

    c: float
    alpha: float
    deviation: float

    def beta(self, t: torch.Tensor) -> torch.Tensor:
        """Inverse temperature at times in [0, 1]; finite everywhere."""
        t = t.double().clamp(max=1 - 1e-9)
        return (self.c * (t / (1 - t)) ** self.alpha).float()


def squared_distances(vectors_MD: torch.Tensor, others_KD: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances, [M, K]."""
    norms = vectors_MD.square().sum(-1, keepdim=True) + others_KD.square().sum(-1)
    return torch.addmm(norms, vectors_MD, others_KD.T, alpha=-2).clamp_(min=0)


def pick(weights_MK: torch.Tensor, where_M: torch.Tensor) -> torch.Tensor:
    """The id at the place ``where`` in [0, 1) of each row's cumulated weights: int64 [M], a draw if it is uniform."""
    cumulated_MK = weights_MK.cumsum(-1)
    place_M1 = where_M[:, None] * cumulated_MK[:, -1:]
    found = torch.searchsorted(cumulated_MK, place_M1, right=True)[:, 0]
    return found.clamp(max=weights_MK.shape[-1] - 1)


def expected_distance(vectors_KD: torch.Tensor, betas: np.ndarray) -> np.ndarray:
    """Mean over targets x_1 of E[d(x, x_1)] under softmax(-beta d), for each beta (float64).

    Of large codebooks only some targets are looked at, evenly spaced.
    """
    size = len(vectors_KD)
    rows = torch.linspace(0, size - 1, min(size, max(16, 2**17 // size))).long()
    distance_MK = squared_distances(vectors_KD[rows], vectors_KD)
    means = []
    for beta in betas.tolist():
        weights_MK = torch.softmax(-beta * distance_MK, -1)
        means.append(float((weights_MK * distance_MK).sum(-1).mean()))
    return np.array(means)


def tune_schedule(vectors_KD: torch.Tensor) -> BetaSchedule:
    """The schedule under which E[d(x_t, x_1)] falls most linearly from t = 0 to t = 1.

    That is the criterion by which URSA chose c and alpha for its codebook: noise then lessens evenly over time, as a
    mixture path's does by construction, and every step of decoding has the same share of the work. Searched over a grid
    of both, least squares against the straight line.

    Args:
        vectors_KD: float [K, D], K >= 2 with at least two different rows.

    Raises:
        ValueError: if all vectors are equal.
    """
    start = float(expected_distance(vectors_KD, np.zeros(1))[0])
    if start <= 1e-12:
        raise ValueError("all code vectors are equal: there is no distance for the metric path to follow")
    betas = _BETAS / start
    share = expected_distance(vectors_KD, betas) / start
    odds = _TIMES / (1 - _TIMES)
    beta_AST = _SCALES[:, None] / start * odds ** _ALPHAS[:, None, None]
    falls_AST = np.interp(np.log(beta_AST), np.log(betas), share)
    deviation_AS = np.sqrt(((falls_AST - (1 - _TIMES)) ** 2).mean(-1))
    a, s = np.unravel_index(deviation_AS.argmin(), deviation_AS.shape)
    return BetaSchedule(float(_SCALES[s] / start), float(_ALPHAS[a]), float(deviation_AS[a, s]))
