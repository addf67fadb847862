"""Imagination against what really happened, horizon by horizon."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from emu_embodied.metrics.image import psnr
from emu_embodied.records import Episode, Observation
from emu_embodied.world_model import WorldModel


@dataclass(frozen=True, slots=True)
class HorizonRow:
    """Figures of all episodes, h blocks after the last observed state."""

    h: int
    """Blocks ahead, from 1."""
    token_accuracy: float
    """Share of frame codes that equal those of the real frame."""
    changed_token_accuracy: float | None
    """The same among codes that differ from the last observed frame's; None where nothing changed."""
    copy_last_token_accuracy: float
    """Share that is right when the last observed frame is repeated."""
    psnr: float
    """Decoded imagined frame against the real one [dB]."""
    copy_last_psnr: float
    """The last observed frame against the real one [dB]."""
    tokenizer_psnr: float
    """The real frame's own codes decoded: no imagination can be expected to be better [dB]."""
    reward_corr: float | None
    """Pearson correlation of imagined and real reward; None where either is constant."""
    proprio_mae: float
    """Mean absolute error of the proprio fields, each in its own unit."""
    repeated_share: float
    """Share of imagined frames that equal the frame before them in every code."""
    real_repeated_share: float
    """The same of the real frames."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class HorizonScores:
    """What an evaluation found.

    Attributes:
        rows: one for each horizon.
        real: uint8 [E, H + 1, height, width, 3], frames of the model's first camera.
        imagined: the same, H imagined frames after the first real one.
        instructions: one for each episode.
    """

    rows: tuple[HorizonRow, ...]
    real: np.ndarray
    imagined: np.ndarray
    instructions: tuple[str, ...]

    def table(self) -> str:
        """The rows as text."""
        titles = ("h", "tokens", "changed", "copy", "PSNR", "copy", "ceiling", "reward r", "proprio")
        lines = [
            (
                str(row.h),
                f"{row.token_accuracy:.3f}",
                "-" if row.changed_token_accuracy is None else f"{row.changed_token_accuracy:.3f}",
                f"{row.copy_last_token_accuracy:.3f}",
                f"{row.psnr:.2f}",
                f"{row.copy_last_psnr:.2f}",
                f"{row.tokenizer_psnr:.2f}",
                "-" if row.reward_corr is None else f"{row.reward_corr:.3f}",
                f"{row.proprio_mae:.4f}",
            )
            for row in self.rows
        ]
        return "\n".join("  ".join(f"{cell:>8}" for cell in line) for line in (titles, *lines))


def record_fresh(
    simulator: Any,
    behaviours: Mapping[str, Callable[..., Any]],
    record: Callable[..., Episode],
    env_id: str,
    episodes: int,
    seed: int,
) -> list[Episode]:
    """Record episodes that no model has seen, the behaviours in turn.

    Args:
        simulator: where; its episodes have to be as long as the horizon that will be judged.
        behaviours: name -> factory.
        record: ``record_episode``.
        env_id: id of the simulator.
        episodes: how many.
        seed: first reset seed, the others follow; ``collect`` draws its own from 32 bits.
    """
    recorded = []
    for i in tqdm(range(episodes), desc="real episodes", unit="episode"):
        source = tuple(behaviours)[i % len(behaviours)]
        behaviour = behaviours[source](simulator, np.random.default_rng([seed + i, 1]))
        recorded.append(record(simulator, behaviour, env_id=env_id, seed=seed + i, source=source))
    return recorded


def score_horizons(world: WorldModel, episodes: Sequence[Episode], horizon: int, *, seed: int) -> HorizonScores:
    """Imagine each episode's own actions from its first state and compare.

    Args:
        world: the model.
        episodes: each of at least ``horizon`` blocks.
        horizon: blocks imagined.
        seed: of the imagination's noise.

    Raises:
        ValueError: if an episode is too short.
    """
    short = min(len(episode) for episode in episodes)
    if short < horizon:
        raise ValueError(f"an episode has {short} blocks, fewer than the horizon of {horizon}")
    camera = world.config.cameras[0]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for episode in tqdm(episodes, desc="imagine", unit="episode"):
        observed = Observation(
            {name: frames[0] for name, frames in episode.frames.items()}, episode.proprio_TP[0], episode.instruction
        )
        actions_SHKA = torch.from_numpy(episode.actions_TKA[:horizon])[None]
        imagination = world.imagine(world.observe([observed]), actions_SHKA, generator)
        assert imagination.tokens_SHN is not None
        codes_TN = torch.stack(
            [world.encode_frames({n: f[t] for n, f in episode.frames.items()}) for t in range(horizon + 1)]
        )
        real = episode.frames[camera][: horizon + 1]
        imagined = world.render(imagination, [0], list(range(horizon)))[camera][0]
        felt_HP = imagination.proprio_SHP[0].cpu().numpy()
        before_HN = torch.cat([codes_TN[:1], imagination.tokens_SHN[0, :-1]])
        found.append(
            _Compared(
                repeated_H2=torch.stack(
                    [(imagination.tokens_SHN[0] == before_HN).all(1), (codes_TN[1:] == codes_TN[:-1]).all(1)], 1
                )
                .cpu()
                .numpy(),
                right_HN=(imagination.tokens_SHN[0] == codes_TN[1:]).cpu().numpy(),
                still_HN=(codes_TN[1:] == codes_TN[:1]).cpu().numpy(),
                real=real,
                imagined=np.concatenate([real[:1], imagined]),
                rebuilt=world.frames.decode(codes_TN[1:, : world.config.camera_tokens]),
                reward_H2=np.stack([imagination.reward_SH[0].cpu().numpy(), episode.reward_T[1 : horizon + 1]], 1),
                proprio_H=np.abs(felt_HP - episode.proprio_TP[1 : horizon + 1]).mean(1),
            )
        )
    return HorizonScores(
        tuple(_row(found, h) for h in range(horizon)),
        np.stack([one.real for one in found]),
        np.stack([one.imagined for one in found]),
        tuple(episode.instruction for episode in episodes),
    )


@dataclass(frozen=True, slots=True)
class _Compared:
    """One episode: what was imagined beside what is true."""

    repeated_H2: np.ndarray
    right_HN: np.ndarray
    still_HN: np.ndarray
    real: np.ndarray
    imagined: np.ndarray
    rebuilt: np.ndarray
    reward_H2: np.ndarray
    proprio_H: np.ndarray


def _row(found: Sequence[_Compared], h: int) -> HorizonRow:
    right = np.stack([one.right_HN[h] for one in found])
    still = np.stack([one.still_HN[h] for one in found])
    rewards = np.stack([one.reward_H2[h] for one in found], 1)
    varied = len(found) > 1 and bool((rewards.std(1) > 1e-6).all())
    return HorizonRow(
        h=h + 1,
        token_accuracy=float(right.mean()),
        changed_token_accuracy=float(right[~still].mean()) if (~still).any() else None,
        copy_last_token_accuracy=float(still.mean()),
        psnr=_mean_psnr([(one.imagined[h + 1], one.real[h + 1]) for one in found]),
        copy_last_psnr=_mean_psnr([(one.real[0], one.real[h + 1]) for one in found]),
        tokenizer_psnr=_mean_psnr([(one.rebuilt[h], one.real[h + 1]) for one in found]),
        reward_corr=float(np.corrcoef(rewards)[0, 1]) if varied else None,
        proprio_mae=float(np.mean([one.proprio_H[h] for one in found])),
        repeated_share=float(np.mean([one.repeated_H2[h, 0] for one in found])),
        real_repeated_share=float(np.mean([one.repeated_H2[h, 1] for one in found])),
    )


def _mean_psnr(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean over frames; equal frames count as 60 dB, since infinity has no mean."""
    return float(np.mean([min(float(psnr(image, reference)), 60.0) for image, reference in pairs]))
