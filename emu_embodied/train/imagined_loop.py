"""Loop (c): the policy inside imagination.

What keeps a policy from learning to exploit the model (WMPO, Zhu et al. 2025; peers of it say the same): imagined
rollouts are short and begin in real states; nothing counts after a predicted success; the model, its success head
included, goes on learning from what the present policy really does, failures like successes; and every success that is
logged is the real simulator's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from emu_embodied.acting import ActionSample, Actor, Situations
from emu_embodied.tokens.sequence import StateTokens
from emu_embodied.train.grpo import group_advantages, has_signal
from emu_embodied.train.loop import TrainingFailed, step_generator
from emu_embodied.train.parallel import dida_loss
from emu_embodied.train.policy_loop import figures_of, score_of
from emu_embodied.train.pretrain import WorldTraining, next_token_loss
from emu_embodied.train.reinforce import Experience, RLConfig
from emu_embodied.train.rewards import Outcome, no_signal
from emu_embodied.train.rollouts import Rollout, Spent, draw_starts, roll_out
from emu_embodied.train.simulators import Crew
from emu_embodied.train.transitions import next_states, picked, transitions
from emu_embodied.world_model import WorldModel


@dataclass(frozen=True, kw_only=True, slots=True)
class ImaginedConfig:
    """How a policy is trained inside imagination."""

    horizon: int = 4
    """Blocks of an imagined rollout [blocks]."""
    success_at: float = 0.5
    """Predicted probability from which a state counts as solved; nothing after it counts."""
    refresh_every: int = 2
    """Rounds between refreshes of the model on what the policy really did [rounds]; 0 never refreshes it."""
    refresh_steps: int = 10
    """Optimizer steps of a refresh."""
    refresh_batch: int = 32
    """Windows of two states in such a step [windows]."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: naming the field and its range.
        """
        for name in ("horizon", "refresh_steps", "refresh_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it has to be at least 1")
        if not 0 < self.success_at < 1:
            raise ValueError(f"success_at is {self.success_at}, it has to lie in (0, 1)")


@dataclass(frozen=True, slots=True)
class Dream:
    """R imagined rollouts of H blocks.

    Attributes:
        situations: R H rows, rollout by rollout.
        bins_RHA: int64.
        log_probs_RHA: float32.
        actions_RHKA: float32.
        reward_RH: float32 [R, H + 1], expected, of the first state and of every state reached.
        success_RH: float32 [R, H], predicted probability in the state reached.
        counts_RH: bool, decisions made before the first predicted success.
    """

    situations: Situations
    bins_RHA: torch.Tensor
    log_probs_RHA: torch.Tensor
    actions_RHKA: torch.Tensor
    reward_RH: torch.Tensor
    success_RH: torch.Tensor
    counts_RH: torch.Tensor


def dream(
    actor: Actor,
    imaginer: WorldModel,
    first: Situations,
    reward_R: torch.Tensor,
    config: ImaginedConfig,
    temperature: float,
    generator: torch.Generator,
) -> Dream:
    """Let the policy act in imagination.

    Args:
        actor: what acts.
        imaginer: what answers.
        first: R situations to begin in.
        reward_R: their true rewards.
        config: how long, and what counts as solved.
        temperature: of the draw of action tokens.
        generator: for all draws.
    """
    now = first
    seen: list[Situations] = []
    drawn_H: list[ActionSample] = []
    rewards, successes = [reward_R.to(imaginer.device)], []
    for _ in range(config.horizon):
        drawn = actor.act(now, generator, temperature)
        before = StateTokens(now.codes_BTN[:, -1].long(), now.proprio_BTP[:, -1].long())
        after = next_states(imaginer, imaginer.decoder, now.text_BL.long(), before, drawn.actions_BKA, generator)
        seen.append(now)
        drawn_H.append(drawn)
        rewards.append(after.reward_M)
        successes.append(after.success_M)
        now = actor.follow_tokens(now, drawn.actions_BKA, after.tokens.codes, after.tokens.proprio)
    success_RH = torch.stack(successes, 1)
    solved_RH = (success_RH >= config.success_at).long().cumsum(1)
    counts_RH = torch.nn.functional.pad(solved_RH[:, :-1], (1, 0)) == 0
    num, horizon = success_RH.shape
    order = torch.arange(num * horizon).view(horizon, num).T.flatten()  # from block by block to rollout by rollout
    return Dream(
        Situations.cat(seen).rows(order),
        torch.stack([drawn.bins_BA for drawn in drawn_H], 1),
        torch.stack([drawn.log_probs_BA for drawn in drawn_H], 1),
        torch.stack([drawn.actions_BKA for drawn in drawn_H], 1),
        torch.stack(rewards, 1),
        success_RH,
        counts_RH,
    )


class ImaginedLoop:
    """Groups of imagined rollouts from real states.

    Args:
        crew: the real simulator; it draws last frames, too.
        actor: the policy, which is trained.
        imaginer: the model; refreshed where its weights have ``requires_grad``.
        env_ids: environments, which take turns.
        config: how; ``groups`` are imagined ones. A round plays as many real rollouts as a group has members.
        imagined: what is special to this loop.

    Raises:
        ValueError: if policy and model do not share their tokens.
    """

    def __init__(
        self,
        crew: Crew,
        actor: Actor,
        imaginer: WorldModel,
        env_ids: Sequence[str],
        config: RLConfig,
        imagined: ImaginedConfig,
    ) -> None:
        same = ("cameras", "codebook", "camera_tokens", "proprio", "objects", "state_bins", "block", "action_dim")
        for name in same:
            ours, theirs = getattr(actor.world.config, name), getattr(imaginer.config, name)
            if ours != theirs:
                raise ValueError(f"policy and world model do not share their tokens, {name}: {ours} against {theirs}")
        self._crew = crew
        self._actor = actor
        self._imaginer = imaginer
        self._env_ids = tuple(env_ids)
        self._config = config
        self._imagined = imagined
        self._training = WorldTraining(subgoal_share=0.0)
        self._paths = [imaginer.path(name) for name in imaginer.config.paths]

    def experience(self, number: int, left: int) -> Experience:
        """Round ``number``, with at most ``left`` real rollouts.

        Raises:
            TrainingFailed: if no group has any signal and the model is not refreshed, naming terms and groups.
        """
        config, size = self._config, self._config.objective.group
        spent, generator = Spent(), step_generator(config.seed, number)
        starts = draw_starts(self._env_ids, min(size, left), config.seed, number)
        real = roll_out(
            self._crew, self._actor, starts, group=1, temperature=config.temperature, seed=config.seed,
            number=number, lanes=config.lanes, spent=spent,
        )  # fmt: skip
        truly = config.reward.score([rollout.outcome() for rollout in real])
        first, reward_Q = self._states(real, generator)
        began = time.perf_counter()
        dreamt = dream(
            self._actor,
            self._imaginer,
            first.rows(torch.arange(len(first)).repeat_interleave(size)),
            reward_Q.repeat_interleave(size),
            self._imagined,
            config.temperature,
            generator,
        )
        spent.inference += time.perf_counter() - began
        outcomes = self._outcomes(dreamt, size)
        scores = config.reward.score(outcomes)
        rewards_QG = scores.total_R.view(-1, size)
        learnable_Q = has_signal(rewards_QG, config.least_spread)
        idle = not bool(learnable_Q.any())
        if idle and not self._imagined.refresh_every:  # a model that goes on learning may tell them apart later
            raise TrainingFailed(f"{no_signal(scores, outcomes)}; the last good checkpoint is kept")
        learnable_Q = learnable_Q | idle
        kept_R = learnable_Q.repeat_interleave(size)
        horizon = self._imagined.horizon
        rows = (kept_R[:, None].cpu() & dreamt.counts_RH.cpu()).flatten().nonzero()[:, 0]
        rollout_R = (torch.cumsum(kept_R.long(), 0) - 1)[rows // horizon]
        bins = dreamt.bins_RHA.flatten(0, 1)[rows]
        advantages = group_advantages(rewards_QG, config.objective.variant)[learnable_Q].flatten()
        refresh = bool(self._imagined.refresh_every) and number % self._imagined.refresh_every == 0
        return Experience(
            score=score_of(self._actor, dreamt.situations.rows(rows), bins, config.temperature),
            old_RT=dreamt.log_probs_RHA.flatten(0, 1)[rows],
            mask_RT=torch.full_like(bins, not idle, dtype=torch.bool),
            rollout_R=rollout_R,
            advantage_R=advantages[rollout_R],
            longest=horizon * bins.shape[1],
            real=len(real),
            figures={
                **figures_of(real, truly),
                "imagined/success": float((dreamt.success_RH >= self._imagined.success_at).any(1).float().mean()),
                "imagined/reward": float(scores.total_R.mean()),
                "imagined/counted": float(dreamt.counts_RH.float().mean()),
            },
            spent=spent,
            refresh=self._refresh(real) if refresh else None,
            refresh_steps=self._imagined.refresh_steps if refresh else 0,
        )

    def _states(self, real: Sequence[Rollout], generator: torch.Generator) -> tuple[Situations, torch.Tensor]:
        """Real states to begin in, unsolved ones, and their rewards; none more than once while there are others."""
        situations = Situations.cat([rollout.situations for rollout in real])
        rewards = torch.cat([torch.from_numpy(rollout.reward_T[:-1]) for rollout in real])
        groups = self._config.groups
        drawn = [torch.randperm(len(rewards), generator=generator) for _ in range(-(-groups // len(rewards)))]
        rows = torch.cat(drawn)[:groups]
        return situations.rows(rows), rewards[rows]

    def _outcomes(self, dreamt: Dream, size: int) -> list[Outcome]:
        outcomes = []
        counts, solved = dreamt.counts_RH.sum(1).tolist(), dreamt.success_RH >= self._imagined.success_at
        rewards = dreamt.reward_RH.cpu().numpy()
        for i, blocks in enumerate(counts):
            outcomes.append(
                Outcome(
                    label=f"imagined from real state {i // size}, rollout {i % size}",
                    group=i // size,
                    success=bool(solved[i].any()),
                    reward_T=rewards[i, : blocks + 1],
                    actions_TKA=dreamt.actions_RHKA[i, :blocks].cpu().numpy(),
                    budget=self._imagined.horizon,
                    valid=1.0,
                )
            )
        return outcomes

    def _refresh(self, real: Sequence[Rollout]) -> Callable[[torch.Generator], torch.Tensor]:
        """The loss of the model on what the policy really did."""
        pool, world = transitions(self._actor, real), self._imaginer
        count = len(pool.codes_BTN)

        def loss(generator: torch.Generator) -> torch.Tensor:
            rows = torch.randint(count, (self._imagined.refresh_batch,), generator=generator)
            batch = picked(pool, rows).to(world.device)
            if self._paths:
                return dida_loss(world, batch, self._training, self._paths, generator).loss
            return next_token_loss(world, batch, self._training, generator).loss

        return loss
