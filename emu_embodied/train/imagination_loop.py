"""Loop (b): the world role, judged by how near its samples of the next state come to the true one.

G samples of one real transition are a group. A sample is drawn and scored either token by token (RLVR-World, Wu et al.
2025), or as DiDA draws it in one pass: then the log-probability of its final tokens is that of one pass from the noise
it began with (the idea of UDM-GRPO: the clean sample is the action, not the way to it).

Shape letters: M transitions, R = M G samples, N frame codes, P numbers (proprio, and objects where known).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from emu_embodied.acting import Actor
from emu_embodied.data.batches import WindowBatch
from emu_embodied.decode.autoregressive import SequentialDecoder
from emu_embodied.decode.grammar import StateLogits
from emu_embodied.decode.sampling import sample
from emu_embodied.metrics.image import psnr
from emu_embodied.tokens.sequence import StateTokens
from emu_embodied.train.grpo import group_advantages, has_signal
from emu_embodied.train.loop import TrainingFailed, step_generator
from emu_embodied.train.noise import noisy_logits
from emu_embodied.train.reinforce import Experience, RLConfig
from emu_embodied.train.rewards import Outcome, no_signal
from emu_embodied.train.rollouts import Spent, draw_starts, roll_out
from emu_embodied.train.simulators import Crew
from emu_embodied.train.transitions import next_states, picked, repeated, transitions
from emu_embodied.train.windows import clean_logits, window_tokens
from emu_embodied.world_model import WorldModel

Sampling = Literal["autoregressive", "dida"]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How near imagined next states come to the true ones; shares in [0, 1].

    Attributes:
        agreement: frame codes that are right.
        changed_right: of the codes that truly changed, those that are right.
        repeated: of the frames that truly changed, those imagined exactly as the frame before.
        stale: of the codes that truly changed, those imagined as they were before.
        proprio_error: mean distance of proprio, as a share of its range.
    """

    agreement: float
    changed_right: float
    repeated: float
    stale: float
    proprio_error: float


def fidelity(world: WorldModel, truth: WindowBatch, imagined: StateTokens) -> Fidelity:
    """Compare imagined states with the true second states of windows."""
    before, after = truth.codes_BTN[:, 0], truth.codes_BTN[:, 1]
    changed, right = after != before, imagined.codes == after
    moved = changed.any(1)
    same = (imagined.codes == before).all(1)
    count = changed.sum().clamp(min=1)
    return Fidelity(
        float(right.float().mean()),
        float((right & changed).sum() / count),
        float((same & moved).sum() / moved.sum().clamp(min=1)),
        float(((imagined.codes == before) & changed).sum() / count),
        float(_proprio_errors(world, truth, imagined).mean()),
    )


def _proprio_errors(world: WorldModel, truth: WindowBatch, imagined: StateTokens) -> torch.Tensor:
    """Mean distance of every imagined state's bins from the true ones, as a share of all bins, float32 [M]."""
    true = world.proprio.encode(truth.proprio_BTP[:, 1])
    return (imagined.proprio - true).abs().float().mean(1) / world.config.state_bins


class ImaginationLoop:
    """Groups of imagined next states of real transitions.

    Args:
        crew: where transitions come from; it draws last frames, too.
        actor: what acts there: the policy role of the same weights.
        env_ids: environments, which take turns.
        config: how; ``groups`` are transitions. Every round plays as many rollouts as a group has members.
        sampling: how states are drawn, and what is trained.
    """

    def __init__(
        self, crew: Crew, actor: Actor, env_ids: Sequence[str], config: RLConfig, sampling: Sampling = "dida"
    ) -> None:
        if sampling == "dida" and not actor.world.config.paths:
            raise ValueError("these weights know no DiDA: sample token by token, or run `emu-embodied train dida`")
        self._crew = crew
        self._actor = actor
        self._env_ids = tuple(env_ids)
        self._config = config
        self._sampling = sampling

    def experience(self, number: int, left: int) -> Experience:
        """Round ``number``, with at most ``left`` rollouts.

        Raises:
            TrainingFailed: if no group has any signal, naming terms and groups.
        """
        config, size, world = self._config, self._config.objective.group, self._actor.world
        spent, generator = Spent(), step_generator(config.seed, number)
        starts = draw_starts(self._env_ids, min(size, left), config.seed, number)
        real = roll_out(
            self._crew, self._actor, starts, group=1, temperature=config.temperature, seed=config.seed,
            number=number, lanes=config.lanes, spent=spent,
        )  # fmt: skip
        pool = transitions(self._actor, real)
        chosen = torch.randperm(len(pool.codes_BTN), generator=generator)[: config.groups]
        truth = repeated(picked(pool, chosen), size).to(world.device)
        drawn, noise = self._draw(truth, generator)
        near = fidelity(world, truth, drawn)
        outcomes = self._outcomes(truth, drawn, size)
        scores = config.reward.score(outcomes)
        rewards_QG = scores.total_R.view(-1, size)
        learnable_Q = has_signal(rewards_QG, config.least_spread)
        if not bool(learnable_Q.any()):
            raise TrainingFailed(f"{no_signal(scores, outcomes)}; the last good checkpoint is kept")
        rows = learnable_Q.repeat_interleave(size).nonzero()[:, 0]
        kept, tokens = picked(truth, rows), StateTokens(drawn.codes[rows], drawn.proprio[rows])
        start = None if noise is None else StateTokens(noise.codes[rows], noise.proprio[rows])

        def score(some: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            own = StateTokens(tokens.codes[some], tokens.proprio[some])
            begun = None if start is None else StateTokens(start.codes[some], start.proprio[some])
            return token_scores(state_logits_of(world, picked(kept, some), own, begun), own, config.temperature)

        with torch.no_grad():
            old = torch.cat([score(some)[0] for some in torch.arange(len(rows)).split(config.batch)])
        advantages = group_advantages(rewards_QG, config.objective.variant)[learnable_Q].flatten()
        return Experience(
            score=score,
            old_RT=old,
            mask_RT=torch.ones_like(old, dtype=torch.bool),
            rollout_R=torch.arange(len(rows), device=old.device),
            advantage_R=advantages,
            longest=old.shape[1],
            real=len(real),
            figures={
                "success": sum(rollout.success for rollout in real) / len(real),
                **scores.means(),
                **{f"imagined/{name}": getattr(near, name) for name in Fidelity.__slots__},
            },
            spent=spent,
        )

    def _draw(self, truth: WindowBatch, generator: torch.Generator) -> tuple[StateTokens, StateTokens | None]:
        """Samples of the second states, and the noise they began with."""
        world, temperature = self._actor.world, self._config.temperature
        before = StateTokens(truth.codes_BTN[:, 0], world.proprio.encode(truth.proprio_BTP[:, 0]))
        if self._sampling == "autoregressive":
            decoder = SequentialDecoder(world.backbone, world.layout, temperature)
            drawn = next_states(world, decoder, truth.text_BL, before, truth.actions_BTKA[:, 0], generator)
            return drawn.tokens, None
        noise = world.path(world.config.paths[0]).source(before, generator)
        with torch.no_grad():
            logits = state_logits_of(world, truth, before, noise)
        codes, proprio = (sample(part, temperature, generator) for part in (logits.frame, logits.proprio))
        return StateTokens(codes, proprio), noise

    def _outcomes(self, truth: WindowBatch, drawn: StateTokens, size: int) -> list[Outcome]:
        world, weights = self._actor.world, self._config.reward.weights
        agreement = (drawn.codes == truth.codes_BTN[:, 1]).float().mean(1).tolist()
        errors = _proprio_errors(world, truth, drawn).tolist()
        decibels = _psnr(world, truth.codes_BTN[:, 1], drawn.codes) if weights.get("fidelity") else None
        return [
            Outcome(
                label=f"transition {i // size}, sample {i % size}",
                group=i // size,
                code_agreement=agreement[i],
                proprio_error=errors[i],
                psnr=None if decibels is None else float(decibels[i]),
            )
            for i in range(len(agreement))
        ]


def state_logits_of(
    world: WorldModel, truth: WindowBatch, drawn: StateTokens, noise: StateTokens | None
) -> StateLogits:
    """Logits of the second state of windows [M, 2], with gradient.

    Args:
        world: whose.
        truth: the windows; only their first states and actions are shown.
        drawn: what stands in the second state, which token-by-token prediction reads.
        noise: what DiDA begins with, one pass; None predicts token by token.
    """
    first = StateTokens(truth.codes_BTN[:, :1], world.proprio.encode(truth.proprio_BTP[:, :1]))
    shown = StateTokens(
        torch.cat([first.codes, drawn.codes[:, None]], 1), torch.cat([first.proprio, drawn.proprio[:, None]], 1)
    )
    window = window_tokens(world, truth, 0.0, torch.Generator(), shown)
    if noise is not None:
        return noisy_logits(world, window, StateTokens(noise.codes[:, None], noise.proprio[:, None])).noisy
    positions = torch.arange(window.embeds_BLD.shape[1], device=world.device)
    hidden = world.backbone.core(window.embeds_BLD, positions, mask=None)
    return clean_logits(world.backbone, world.layout, hidden, window)


def token_scores(logits: StateLogits, tokens: StateTokens, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies [M, N + P] of the tokens of states."""
    found, entropy = [], []
    for part, ids in ((logits.frame, tokens.codes), (logits.proprio, tokens.proprio)):
        log_probs = torch.log_softmax(part / temperature, -1)
        found.append(log_probs.gather(-1, ids[..., None])[..., 0])
        entropy.append(-(log_probs.exp() * log_probs).sum(-1))
    return torch.cat(found, 1), torch.cat(entropy, 1)


def _psnr(world: WorldModel, true_MN: torch.Tensor, drawn_MN: torch.Tensor) -> np.ndarray:
    """Of the decoded pictures, over all cameras [dB]; what is equal counts as 99."""
    cameras = len(world.config.cameras)
    pair = [world.frames.decode(codes.unflatten(1, (cameras, -1)).flatten(0, 1)) for codes in (drawn_MN, true_MN)]
    return np.minimum(psnr(*pair), 99.0).reshape(-1, cameras).mean(1)
