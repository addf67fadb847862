"""Noise processes of discrete flow matching: how clean tokens (t = 1) become noise (t = 0) and back.

A process of one kind of token works on local ids 0 .. K - 1 (frame codes, proprio bins) and knows the state before.
Random numbers are drawn where the generator lives and results come back on the tokens' device, so that one CPU
generator gives the same draws on every device.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from emu_embodied.decode.metric import BetaSchedule, pick, squared_distances, tune_schedule
from emu_embodied.decode.sampling import uniform
from emu_embodied.tokens.sequence import MASKED, StateTokens


class Path(Protocol):
    """A probability path p_t(x | x_0, x_1) over the ids 0 .. ``size`` - 1 of one kind of token."""

    size: int

    def source(self, current_SN: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """x_0: int64 [S, ...] to start decoding from, given the tokens of the state before.

        Random numbers are common to all S, as candidate futures are compared with each other.
        """
        ...

    def noise(
        self, x1: torch.Tensor, t: torch.Tensor, current: torch.Tensor, generator: torch.Generator | None
    ) -> torch.Tensor:
        """x_t ~ p_t(. | x_1) for training, drawn apart for every token.

        Args:
            x1: int64 [..., N] clean tokens.
            t: times in [0, 1] that broadcast against ``x1``.
            current: int64 [..., N], the state before.
            generator: for all draws.
        """
        ...

    def step(
        self, x_t: torch.Tensor, x1: torch.Tensor, t: float, t_next: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        """x_{t_next} given x_t [S, ...] and a predicted x_1; at ``t_next`` = 1 every open token is the prediction.

        Random numbers are common to all S.
        """
        ...


class MixturePath(ABC):
    """A token is its target with probability t, else its source (Discrete Flow Matching, Gat et al. 2024, eq. 8).

    Args:
        vectors_KD: one row for each id; only their number counts.
    """

    def __init__(self, vectors_KD: torch.Tensor) -> None:
        self.size = len(vectors_KD)

    @abstractmethod
    def source(self, current_SN: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """See ``Path.source``."""

    @abstractmethod
    def _origin(self, current: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """x_0 of every token of ``current``, drawn apart."""

    def noise(
        self, x1: torch.Tensor, t: torch.Tensor, current: torch.Tensor, generator: torch.Generator | None
    ) -> torch.Tensor:
        """See ``Path.noise``."""
        keep = uniform(x1, generator) < t.to(x1.device)
        return torch.where(keep, x1, self._origin(current, generator))

    def step(
        self, x_t: torch.Tensor, x1: torch.Tensor, t: float, t_next: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Euler step of the mixture's velocity: jump to x_1 with probability (t_next - t) / (1 - t)."""
        if t_next >= 1:
            return x1
        jump = uniform(x_t[:1], generator) < (t_next - t) / (1 - t)
        return torch.where(jump, x1, x_t)

    def _random(self, like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        device = like.device if generator is None else generator.device
        return torch.randint(self.size, like.shape, generator=generator, device=device).to(like.device)


class UniformPath(MixturePath):
    """Uniform source; Emu3.5 names its family as what DiDA extends and gives no details."""

    def source(self, current_SN: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Uniform ids, the same for all S."""
        return self._random(current_SN[:1], generator).expand_as(current_SN)

    def _origin(self, current: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        return self._random(current, generator)


class StateCoupledPath(MixturePath):
    """The source is the state before: discrete flow matching allows any coupling, and most tokens of a scene stay.

    Starting from the state before alone keeps still tokens and learns change slowly, because the input mostly *is* the
    answer. So training mixes sources: in half of the states a share of the tokens, drawn from U(0, 1), starts from
    uniform noise; the other half starts from the state before alone.

    Args:
        vectors_KD: one row for each id; only their number counts.
        noise_share: share of tokens that start from uniform noise in decoding, in [0, 1].
    """

    def __init__(self, vectors_KD: torch.Tensor, noise_share: float = 0.0) -> None:
        super().__init__(vectors_KD)
        if not 0 <= noise_share <= 1:
            raise ValueError(f"noise_share is {noise_share}, it has to lie in [0, 1]")
        self.noise_share = noise_share

    def source(self, current_SN: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """The state before, a share of its tokens replaced."""
        if self.noise_share == 0:
            return current_SN
        one = current_SN[:1]
        return torch.where(uniform(one, generator) < self.noise_share, self._random(one, generator), current_SN)

    def _origin(self, current: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        share, pure = uniform(current[..., :1], generator), uniform(current[..., :1], generator) < 0.5
        replaced = uniform(current, generator) < share.masked_fill(pure, 0.0)
        return torch.where(replaced, self._random(current, generator), current)


class MaskPath(MixturePath):
    """The source is a slot without content (absorbing diffusion, MaskGIT): the baseline that everybody knows.

    Empty slots are ``MASKED``, which is embedded as the vocabulary's ``pad``, so no id is added. A slot that was filled
    keeps its token.
    """

    def source(self, current_SN: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Nothing but empty slots."""
        return torch.full_like(current_SN, MASKED)

    def _origin(self, current: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        return torch.full_like(current, MASKED)

    def step(
        self, x_t: torch.Tensor, x1: torch.Tensor, t: float, t_next: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Fill empty slots with probability (t_next - t) / (1 - t)."""
        return torch.where(x_t == MASKED, super().step(x_t, x1, t, t_next, generator), x_t)


class MetricPath:
    """Tokens approach their target through similar ones: p_t(x | x_1) = softmax_x(-beta_t d(x, x_1)).

    URSA's path (arXiv 2510.24717; kinetic-optimal discrete flows, Shaul et al. 2024), beta_t = c (t / (1 - t))^alpha,
    with d the squared distance of the ids' vectors. URSA's code has c = 3 and alpha = 0.9; here both follow from the
    vectors, see ``tune_schedule``.

    Args:
        vectors_KD: float [K, D], where each id lies.
        schedule: c and alpha; tuned to the vectors if left out.
    """

    def __init__(self, vectors_KD: torch.Tensor, schedule: BetaSchedule | None = None) -> None:
        self.vectors_KD = vectors_KD.detach().float().cpu()
        self.size = len(vectors_KD)
        self.schedule = tune_schedule(self.vectors_KD) if schedule is None else schedule

    def source(self, current_SN: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Uniform ids (beta_0 = 0), the same for all S."""
        device = current_SN.device if generator is None else generator.device
        drawn = torch.randint(self.size, current_SN[:1].shape, generator=generator, device=device)
        return drawn.to(current_SN.device).expand_as(current_SN)

    def noise(
        self, x1: torch.Tensor, t: torch.Tensor, current: torch.Tensor, generator: torch.Generator | None
    ) -> torch.Tensor:
        """See ``Path.noise``."""
        where, t = uniform(x1, generator), t.to(x1.device).expand_as(x1)
        beta = self.schedule.beta(t)

        def draw(x1_M: torch.Tensor, beta_M: torch.Tensor, where_M: torch.Tensor) -> torch.Tensor:
            return pick(torch.softmax(-beta_M[:, None] * self._distances(x1_M), -1), where_M)

        return torch.where(t >= 1, x1, self._in_parts(draw, x1, beta, where))

    def step(
        self, x_t: torch.Tensor, x1: torch.Tensor, t: float, t_next: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Jump with the rate of the kinetic-optimal velocity p_t(x | x_1) beta'_t max(0, d(x_t, x_1) - d(x, x_1)).

        A token only ever comes closer to its target. beta' is integrated over the step (URSA's Euler step takes it at
        t, where it is infinite at t = 0 for alpha < 1, and skips that step), p is taken at the middle beta.
        """
        if t_next >= 1:
            return x1
        low, high = (float(self.schedule.beta(torch.tensor(at))) for at in (t, t_next))
        chance, where = (uniform(x_t[:1], generator).expand_as(x_t) for _ in range(2))

        def jump(x_M: torch.Tensor, x1_M: torch.Tensor, chance_M: torch.Tensor, where_M: torch.Tensor) -> torch.Tensor:
            distance_MK = self._distances(x1_M)
            gain_MK = (distance_MK.gather(1, x_M[:, None]) - distance_MK).clamp(min=0)
            flow_MK = torch.softmax(-(low + high) / 2 * distance_MK, -1) * gain_MK
            jumps = chance_M < 1 - torch.exp(-(high - low) * flow_MK.sum(-1))
            return torch.where(jumps, pick(flow_MK, where_M), x_M)

        return self._in_parts(jump, x_t, x1, chance, where)

    def _distances(self, ids_M: torch.Tensor) -> torch.Tensor:
        if self.vectors_KD.device != ids_M.device:
            self.vectors_KD = self.vectors_KD.to(ids_M.device)
        return squared_distances(self.vectors_KD[ids_M], self.vectors_KD)

    def _in_parts(self, function: Callable[..., torch.Tensor], *tokens: torch.Tensor) -> torch.Tensor:
        """Apply to flattened tokens, a part at a time: [tokens, K] for K = 131,072 would not fit into memory."""
        parts = zip(*(part.flatten().split(max(1, 2**24 // self.size)) for part in tokens), strict=True)
        return torch.cat([function(*part) for part in parts]).view_as(tokens[0])


PATHS: dict[str, Callable[[torch.Tensor], Path]] = {
    "uniform": UniformPath,
    "metric": MetricPath,
    "state_coupled": StateCoupledPath,
    "mask": MaskPath,
}
"""Name -> path of one kind of token, made from the vectors of its ids."""


@dataclass(frozen=True, slots=True)
class StatePath:
    """One process for all tokens of a state; the methods are those of ``Path``.

    Attributes:
        name: in ``PATHS``.
        frame: of the frame codes.
        proprio: of the proprio bins.
    """

    name: str
    frame: Path
    proprio: Path

    def source(self, current: StateTokens, generator: torch.Generator | None) -> StateTokens:
        """Tokens to start decoding from."""
        codes = self.frame.source(current.codes, generator)
        return StateTokens(codes, self.proprio.source(current.proprio, generator))

    def noise(
        self, target: StateTokens, t: torch.Tensor, current: StateTokens, generator: torch.Generator | None
    ) -> StateTokens:
        """Noisy copies of states at the times ``t``, one for each state."""
        codes = self.frame.noise(target.codes, t[..., None], current.codes, generator)
        return StateTokens(codes, self.proprio.noise(target.proprio, t[..., None], current.proprio, generator))

    def step(
        self, tokens: StateTokens, predicted: StateTokens, t: float, t_next: float, generator: torch.Generator | None
    ) -> StateTokens:
        """One step of decoding."""
        codes = self.frame.step(tokens.codes, predicted.codes, t, t_next, generator)
        return StateTokens(codes, self.proprio.step(tokens.proprio, predicted.proprio, t, t_next, generator))


def known_path(name: str) -> str:
    """The name itself.

    Raises:
        ValueError: if there is no path of that name (with the nearest).
    """
    if name in PATHS:
        return name
    near = difflib.get_close_matches(name, PATHS, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown noise process {name!r}; known: {', '.join(PATHS)}{hint}")


def make_path(name: str, codebook_KD: torch.Tensor, state_bins: int, source_noise: float = 0.0) -> StatePath:
    """The process of a name.

    Args:
        name: one of ``PATHS``.
        codebook_KD: the vision tokenizer's code vectors; their directions count (Emu3.5's tokenizer compares products).
        state_bins: bins of a proprio field, equally spaced.
        source_noise: of ``state_coupled``, see ``StateCoupledPath.noise_share``.
    """
    codes = torch.nn.functional.normalize(codebook_KD.detach().float(), dim=-1)
    bins = torch.linspace(0, 1, state_bins)[:, None]
    make = PATHS[name]
    if name == "state_coupled":
        make = partial(StateCoupledPath, noise_share=source_noise)
    return StatePath(name, make(codes), make(bins))
