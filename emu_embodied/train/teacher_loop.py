"""Loop (d): expert iteration. What a teacher did and the simulator confirmed becomes the policy's target.

The teacher may be a planner in imagination, one in the true simulator, or a scripted expert (which is plain behaviour
cloning on more episodes). Its blocks are rounded to the policy's tokens before they are executed, so what is confirmed
is what the policy can say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from emu_embodied.acting import Actor, Situations
from emu_embodied.data.recording import SimulatorFactory
from emu_embodied.protocols import Policy
from emu_embodied.train.policy_loop import figures_of, policy_experience
from emu_embodied.train.reinforce import Experience, RLConfig
from emu_embodied.train.rollouts import Rollout, Spent, draw_starts
from emu_embodied.train.simulators import Start

MakeTeacher = Callable[[Any, int], Policy]
"""Simulator and seed -> what acts in one episode of it."""


class TeacherLoop:
    """Episodes of a teacher; the successful ones of this round are imitated.

    Args:
        simulators: makes the simulator of an id; the teacher may look into it.
        make_teacher: makes the teacher of an episode.
        actor: what learns.
        env_ids: environments, which take turns.
        config: how; a round plays ``groups`` times the size of a group.
        closing: closes the simulators at the end.
    """

    def __init__(
        self,
        simulators: SimulatorFactory,
        make_teacher: MakeTeacher,
        actor: Actor,
        env_ids: Sequence[str],
        config: RLConfig,
        closing: ExitStack,
    ) -> None:
        self._make_teacher = make_teacher
        self._actor = actor
        self._env_ids = tuple(env_ids)
        self._config = config
        self._simulators: dict[str, Any] = {}
        for env_id in self._env_ids:
            self._simulators[env_id] = simulators(env_id)
            closing.callback(self._simulators[env_id].close)

    def experience(self, number: int, left: int) -> Experience:
        """Round ``number``, with at most ``left`` episodes.

        A round without any success teaches nothing and changes nothing.
        """
        config, spent = self._config, Spent()
        count = min(config.groups * config.objective.group, left)
        played = [self._play(start, spent) for start in draw_starts(self._env_ids, count, config.seed, number)]
        scores = config.reward.score([rollout.outcome() for rollout in played])
        confirmed = [rollout for rollout in played if rollout.success]
        return policy_experience(
            self._actor,
            1.0,
            confirmed or played,
            None,
            figures={**figures_of(played, scores), "confirmed": float(len(confirmed))},
            real=len(played),
            spent=spent,
            idle=not confirmed,
        )

    def _play(self, start: Start, spent: Spent) -> Rollout:
        simulator, actor, began = self._simulators[start.env_id], self._actor, time.perf_counter()
        simulator.reset(seed=start.seed)
        observation = simulator.observe()
        teacher = self._make_teacher(simulator, start.seed)
        teacher.reset(observation)
        now = actor.see([observation])
        seen: list[Situations] = []
        bins: list[torch.Tensor] = []
        rewards, objects, steps = [simulator.reward()], [observation.objects], 0
        over = success = False
        while not over:
            block = torch.from_numpy(np.array(teacher.act(observation), np.float32)).clamp(-1, 1)
            seen.append(now)
            bins.append(actor.world.actions.encode(block)[None])
            executed = actor.world.actions.decode(bins[-1])
            transition = simulator.step_block(executed[0].numpy())
            observation, success = transition.observation, transition.success_any
            over = success or transition.truncated
            rewards.append(float(transition.rewards_K[-1]))
            objects.append(observation.objects)
            steps += len(transition.rewards_K)
            if not over:
                now = actor.follow(now, executed, [observation])
        spent.steps += steps
        spent.waiting += time.perf_counter() - began
        bins_TA = torch.cat(bins)
        return Rollout(
            start,
            0,
            Situations.cat(seen).to("cpu"),
            bins_TA,
            torch.zeros(bins_TA.shape),
            actor.world.actions.decode(bins_TA),
            np.asarray(rewards, np.float32),
            success,
            steps,
            observation,
            -(-simulator.max_episode_steps // simulator.block),
            np.stack(objects).astype(np.float32),
        )
