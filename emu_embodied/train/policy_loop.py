"""Loop (a): the policy in the real simulator, judged by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emu_embodied.acting import Actor, Situations
from emu_embodied.train.grpo import block_advantages, group_advantages, has_signal
from emu_embodied.train.loop import TrainingFailed
from emu_embodied.train.reinforce import Experience, RLConfig, Score
from emu_embodied.train.rewards import Scores, no_signal
from emu_embodied.train.rollouts import Rollout, Spent, branch_out, draw_starts, roll_out
from emu_embodied.train.simulators import Crew


class PolicyLoop:
    """Groups of rollouts from one restored state each; groups whose rewards do not differ are drawn anew.

    Args:
        crew: where rollouts are played.
        actor: what acts, and is trained.
        env_ids: environments, which take turns in a round.
        config: how.
    """

    def __init__(self, crew: Crew, actor: Actor, env_ids: Sequence[str], config: RLConfig) -> None:
        self._crew = crew
        self._actor = actor
        self._env_ids = tuple(env_ids)
        self._config = config

    def experience(self, number: int, left: int) -> Experience:
        """Round ``number``, with at most ``left`` rollouts.

        Raises:
            TrainingFailed: if no group has any signal, naming terms and groups.
        """
        config, size = self._config, self._config.objective.group
        if config.branch == "block":
            return self._by_block(number, left)
        spent = Spent()
        played: list[Rollout] = []
        kept: list[Rollout] = []
        advantages: list[torch.Tensor] = []
        for _ in range(1 + config.resamples):
            groups = min(config.groups - len(kept) // size, (left - len(played)) // size)
            if groups == 0:
                break
            starts = draw_starts(self._env_ids, groups, config.seed, number, len(played) // size)
            new = roll_out(
                self._crew,
                self._actor,
                starts,
                group=size,
                temperature=config.temperature,
                seed=config.seed,
                number=number,
                lanes=config.lanes,
                spent=spent,
            )
            rewards_QG = config.reward.score([rollout.outcome() for rollout in new]).total_R.view(-1, size)
            learnable_Q = has_signal(rewards_QG, config.least_spread)
            learned = [rollout for i, rollout in enumerate(new) if learnable_Q[i // size]]
            if learned:
                advantages.append(self._credit(learned, rewards_QG[learnable_Q]))
            kept += learned
            played += new
        outcomes = [rollout.outcome() for rollout in played]
        scores = config.reward.score(outcomes)
        done = ""
        if not kept:
            if not all(rollout.success for rollout in played):
                raise TrainingFailed(f"{no_signal(scores, outcomes)}; the last good checkpoint is kept")
            done = f"every one of {len(played)} rollouts succeeded: nothing is left to learn"
        return policy_experience(
            self._actor,
            config.temperature,
            kept or played,
            torch.cat(advantages) if kept else torch.zeros(sum(len(rollout) for rollout in played)),
            figures={**figures_of(played, scores), "groups_without_signal": float((len(played) - len(kept)) // size)},
            real=len(played),
            spent=spent,
            done=done,
        )

    def _by_block(self, number: int, left: int) -> Experience:
        """A round in which every state of every episode is a group of its own."""
        config, size, spent = self._config, self._config.objective.group, Spent()
        episodes = min(config.groups, left // size)
        starts = draw_starts(self._env_ids, episodes, config.seed, number)
        blocks, played = branch_out(
            self._crew, self._actor, starts, group=size, temperature=config.temperature, seed=config.seed,
            number=number, spent=spent,
        )  # fmt: skip
        outcomes = [block.outcome() for block in blocks]
        scores = config.reward.score(outcomes)
        rewards_QG = scores.total_R.view(-1, size)
        learnable_Q = has_signal(rewards_QG, config.least_spread)
        if not bool(learnable_Q.any()):
            raise TrainingFailed(f"{no_signal(scores, outcomes)}; the last good checkpoint is kept")
        kept = [block for i, block in enumerate(blocks) if learnable_Q[i // size]]
        advantage_R = group_advantages(rewards_QG[learnable_Q], config.objective.variant).flatten()
        told = figures_of(played, config.reward.score([episode.outcome() for episode in played]))
        told["groups_without_signal"] = float((len(blocks) - len(kept)) // size)
        return policy_experience(
            self._actor, config.temperature, kept, advantage_R, figures=told, real=episodes * size, spent=spent
        )

    def _credit(self, rollouts: Sequence[Rollout], rewards_QG: torch.Tensor) -> torch.Tensor:
        """Advantage of every decision of some groups, rollout by rollout."""
        objective = self._config.objective
        if objective.discount is not None:
            gains = [self._config.reward.gains(rollout.outcome()) for rollout in rollouts]
            return block_advantages(gains, objective.group, objective.variant, objective.discount)
        lengths = torch.tensor([len(rollout) for rollout in rollouts])
        return group_advantages(rewards_QG, objective.variant).flatten().repeat_interleave(lengths)


def policy_experience(
    actor: Actor,
    temperature: float,
    rollouts: Sequence[Rollout],
    advantage_R: torch.Tensor | None,
    *,
    figures: dict[str, float],
    real: int,
    spent: Spent,
    done: str = "",
    idle: bool = False,
) -> Experience:
    """Experience of rollouts with R decisions.

    With ``advantage_R`` None they are to be imitated, unless the round stays ``idle``.
    """
    bins_RA = torch.cat([rollout.bins_TA for rollout in rollouts])
    rollout_R = torch.arange(len(rollouts)).repeat_interleave(torch.tensor([len(r) for r in rollouts]))
    return Experience(
        score=score_of(actor, Situations.cat([rollout.situations for rollout in rollouts]), bins_RA, temperature),
        old_RT=None if advantage_R is None else torch.cat([rollout.log_probs_TA for rollout in rollouts]),
        mask_RT=torch.full_like(bins_RA, not idle, dtype=torch.bool),
        rollout_R=rollout_R,
        advantage_R=torch.zeros(len(rollout_R)) if advantage_R is None else advantage_R,
        longest=max(rollout.budget for rollout in rollouts) * bins_RA.shape[1],
        real=real,
        figures=figures,
        spent=spent,
        done=done,
    )


def score_of(actor: Actor, situations: Situations, bins_RA: torch.Tensor, temperature: float) -> Score:
    """Scores drawn actions anew."""

    def score(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = actor.log_probs(situations.rows(rows), bins_RA[rows], temperature)
        return found.log_probs_BA, found.entropy_BA

    return score


def figures_of(rollouts: Sequence[Rollout], scores: Scores) -> dict[str, float]:
    """What rollouts in the simulator came to, for the log: of all of them, kept or not."""
    by_env: dict[str, list[bool]] = {}
    for rollout in rollouts:
        by_env.setdefault(rollout.start.env_id, []).append(rollout.success)
    rates = {f"success/{env_id}": sum(won) / len(won) for env_id, won in by_env.items() if len(by_env) > 1}
    return {
        "success": sum(rollout.success for rollout in rollouts) / len(rollouts),
        **rates,
        **scores.means(),
        "blocks": sum(len(rollout) for rollout in rollouts) / len(rollouts),
    }
