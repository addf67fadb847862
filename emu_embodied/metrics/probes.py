"""Where are things? Linear probes: what can be read of positions from a model's vectors, on episodes not fitted on.

A probe is a ridge regression, so that what it finds was there to be read and was not computed by the probe. Its
strength is chosen by cross-validation over episodes (states of one are alike). Which object is meant is said by the
instruction alone, so vectors that know only the picture get a probe that may be another for every word of it: linear in
the outer product of vectors and words.

Shape letters: M states, F features of a state, W words, O numbers that are read, T states of an episode.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from emu_embodied.metrics.intervals import bootstrap_mean
from emu_embodied.records import Field

STRENGTHS = tuple(10.0**power for power in range(-5, 3))
"""Ridge strengths that are tried; features are scaled so that 1 weighs a typical sum of squares as much as a fit."""
FOLDS = 4
"""Parts of the fitted episodes for choosing among them."""

_AXIS = re.compile(r"(.+)_([xyz])")
_ANGLE = re.compile(r"(.+)_(sin|cos)")
_SCALES = {"m": ("cm", 100.0), "px": ("px", 1.0)}


@dataclass(frozen=True, slots=True)
class Place:
    """A position (or direction) among the numbers of a vector."""

    name: str
    """What is there, e.g. ``ee`` or ``block_angle``."""
    axes: tuple[int, ...]
    """Where its numbers stand; of a direction, sine and cosine."""
    unit: str
    """Of its errors: ``cm``, ``px`` or, for a direction, ``deg``."""
    scale: float
    """Such units in the fields' own."""

    def error(self, read_MO: np.ndarray, true_MO: np.ndarray) -> np.ndarray:
        """Distance float64 [M] of two vectors' positions, in ``unit``."""
        read, true = (np.asarray(values, np.float64)[:, self.axes] for values in (read_MO, true_MO))
        if self.unit == "deg":
            turned = np.arctan2(read[:, 0], read[:, 1]) - np.arctan2(true[:, 0], true[:, 1])
            return self.scale * np.abs((turned + np.pi) % (2 * np.pi) - np.pi)
        distance: np.ndarray = self.scale * np.linalg.norm(read - true, axis=1)
        return distance


def places(fields: Sequence[Field]) -> tuple[Place, ...]:
    """The positions that fields spell out: ``name_x``, ``name_y`` (``name_z``) in m or px, ``name_sin`` with ``_cos``.

    Speeds and openings are none.
    """
    found: dict[str, Place] = {}
    for index, field in enumerate(fields):
        if (match := _AXIS.fullmatch(field.name)) and field.unit in _SCALES:
            unit, scale = _SCALES[field.unit]
            before = found.get(match[1])
            found[match[1]] = Place(match[1], (*(before.axes if before else ()), index), unit, scale)
    names = [field.name for field in fields]
    for name in names:
        if (match := _ANGLE.fullmatch(name)) and match[2] == "sin" and f"{match[1]}_cos" in names:
            stem = match[1] if match[1].endswith("angle") else f"{match[1]}_angle"
            axes = (names.index(name), names.index(f"{match[1]}_cos"))
            found[stem] = Place(stem, axes, "deg", 180 / np.pi)
    return tuple(place for place in found.values() if len(place.axes) > 1)


@dataclass(frozen=True, slots=True)
class ProbeScore:
    """How well one position is read."""

    place: str
    """Which."""
    unit: str
    """Of the errors."""
    error: float
    """Mean distance on held-out states, in ``unit``."""
    ci95: tuple[float, float]
    """Bootstrap 95 % interval of it, over episodes."""
    guess: float
    """The same of a constant guess: the mean of the fitted states."""
    error_of_half: float | None
    """``error`` of a probe fitted on half of those episodes: far above it, more episodes would still lower both;
    None for probes that are not fitted twice."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Split:
    """Which states are fitted and which are measured; whole episodes are on one side."""

    episode_M: np.ndarray
    """int [M], the episode of every state."""
    held_M: np.ndarray
    """bool [M], measured."""

    @classmethod
    def of(cls, episode_M: np.ndarray, held_out: float) -> Split:
        """Hold out every so many-th episode.

        Raises:
            ValueError: if there are too few episodes to fit and to measure.
        """
        episodes = np.unique(episode_M)
        every = max(2, round(1 / held_out))
        held = episodes[::every]
        if len(episodes) - len(held) < 2 * FOLDS:  # cross-validated on half of them, too
            raise ValueError(f"{len(episodes)} episodes are too few for a probe: give at least {3 * FOLDS}")
        return cls(np.asarray(episode_M), np.isin(episode_M, held))


def probe(
    kernel_MM: torch.Tensor, targets_MO: np.ndarray, wanted: Sequence[Place], split: Split, *, seed: int = 0
) -> list[ProbeScore]:
    """Fit a ridge regression on the fitted states and measure it on the held-out ones.

    Args:
        kernel_MM: inner products of the states' features (``kernel``).
        targets_MO: the vectors that hold the positions.
        wanted: the positions to read.
        split: who is fitted.
        seed: of the bootstrap.
    """
    fit = np.flatnonzero(~split.held_M)
    held = np.flatnonzero(split.held_M)
    targets = torch.from_numpy(np.asarray(targets_MO, np.float64))
    true = targets[held].numpy()
    mean_O = targets[fit].mean(0)
    guess = mean_O.expand(len(held), -1).numpy()
    half = fit[np.unique(split.episode_M[fit], return_inverse=True)[1] % 2 == 0]
    read, read_by_half = (
        (_ridge(kernel_MM.double(), targets - mean_O, split.episode_M, some, held) + mean_O).numpy()
        for some in (fit, half)
    )
    scores = []
    for place in wanted:
        errors = place.error(read, true)
        per_episode = [errors[split.episode_M[held] == number].mean() for number in np.unique(split.episode_M[held])]
        scores.append(
            ProbeScore(
                place=place.name,
                unit=place.unit,
                error=float(errors.mean()),
                ci95=bootstrap_mean(np.array(per_episode), np.random.default_rng(seed)),
                guess=float(place.error(guess, true).mean()),
                error_of_half=float(place.error(read_by_half, true).mean()),
            )
        )
    return scores


def kernel(features_MF: torch.Tensor, fitted_M: np.ndarray, words_MW: torch.Tensor | None = None) -> torch.Tensor:
    """Inner products [M, M] of features, scaled by the fitted states, with a constant beside them.

    Args:
        features_MF: float [M, F].
        fitted_M: bool [M].
        words_MW: words of each state's instruction (``words``); inner products are then those of the outer products.
    """
    fitted = torch.from_numpy(np.asarray(fitted_M))
    features = features_MF.float()
    features = features - features[fitted].mean(0)
    spread = features[fitted].square().mean(0).sqrt()
    features = features / spread.clamp_min(1e-3 * float(spread.max().clamp_min(1e-6)))
    found = features @ features.T
    found = 1 + found / found.diagonal()[fitted].mean().clamp_min(1e-12)
    return found if words_MW is None else found * (words_MW @ words_MW.T)


def words(instructions: Sequence[str]) -> torch.Tensor:
    """Which words each instruction has, with a constant beside them, float [M, W] of unit length."""
    known = sorted({word for text in instructions for word in text.split()})
    place = {word: 1 + i for i, word in enumerate(known)}
    found = torch.zeros(len(instructions), 1 + len(known))
    found[:, 0] = 1
    for row, text in enumerate(instructions):
        found[row, [place[word] for word in text.split()]] = 1
    return found / found.norm(dim=1, keepdim=True)


def _ridge(
    kernel_MM: torch.Tensor, targets_MO: torch.Tensor, episode_M: np.ndarray, fit: np.ndarray, held: np.ndarray
) -> torch.Tensor:
    """Read the held states [held, O]; each number with the strength that cross-validation likes best for it."""
    folds = np.unique(episode_M[fit], return_inverse=True)[1] % FOLDS
    losses = torch.zeros(len(STRENGTHS), targets_MO.shape[1], dtype=torch.float64)
    for fold in range(FOLDS):
        inside, outside = fit[folds != fold], fit[folds == fold]
        for i, read in enumerate(_solutions(kernel_MM, targets_MO, inside, outside)):
            losses[i] += (read - targets_MO[outside]).square().sum(0)
    best_O = losses.argmin(0)
    every = torch.stack(_solutions(kernel_MM, targets_MO, fit, held))
    return every[best_O, :, torch.arange(targets_MO.shape[1])].T


def _solutions(
    kernel_MM: torch.Tensor, targets_MO: torch.Tensor, fit: np.ndarray, asked: np.ndarray
) -> list[torch.Tensor]:
    """What a ridge regression fitted on some states reads from others, for every strength."""
    values, vectors = torch.linalg.eigh(kernel_MM[fit][:, fit])
    seen = vectors.T @ targets_MO[fit]
    across = kernel_MM[asked][:, fit] @ vectors
    return [across @ (seen / (values.clamp_min(0) + strength)[:, None]) for strength in STRENGTHS]
