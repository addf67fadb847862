"""The token policy beside a planner: it proposes candidates, and says what it would never have done.

Shape letters: S candidates, H horizon in blocks, h blocks decided so far, K env steps in a block, A action dims.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from emu_embodied.acting import Actor, Situations, past_embeds
from emu_embodied.models.cache import KVCache
from emu_embodied.planners.proposals import Proposals
from emu_embodied.protocols import Dynamics
from emu_embodied.records import Observation


class TokenGuide:
    """``Guide`` of a token policy.

    Args:
        actor: emits action tokens.
        temperature: of what it proposes; at 0 all proposals after one beginning are the same.
    """

    def __init__(self, actor: Actor, *, temperature: float = 1.0) -> None:
        if not temperature >= 0:
            raise ValueError(f"temperature is {temperature}, it has to be at least 0")
        self.actor = actor
        self.temperature = temperature
        self._here: Situations | None = None
        self._read: KVCache | None = None

    def reset(self, observation: Observation) -> None:
        """An episode starts."""
        self._here, self._read = self.actor.see([observation]), None

    def advance(self, action_KA: np.ndarray, observation: Observation) -> None:
        """A block was executed and led to ``observation``."""
        self._here, self._read = self.actor.follow(self._situation, action_KA[None], [observation]), None

    def proposals(self, dynamics: Dynamics, generator: torch.Generator) -> Proposals:
        """Goes on with plans as the policy would: from the real state, then from where ``dynamics`` sees them lead.

        A plan of H blocks takes H - 1 imaginations, each one block longer than the one before.

        Args:
            dynamics: gives frame tokens of the states reached.
            generator: of its noise; the draws of actions come from the planner's.
        """
        here, actor = self._situation, self.actor

        def propose(done_ShKA: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
            situations = here.rows([0] * len(done_ShKA))
            if done_ShKA.shape[1]:
                situations = self._imagined(situations, done_ShKA, dynamics, generator)
            return actor.act(situations, draws, self.temperature).actions_BKA

        return propose

    @torch.no_grad()
    def strangeness(self, actions_SHKA: torch.Tensor) -> torch.Tensor:
        """How unlikely the policy finds the first blocks of plans, where they would be executed: float32 [S].

        Minus the log-probability of a block's tokens, in units of that of tokens drawn evenly: 0 is what it would do
        for sure, 1 is as likely as anything. The state is read once for all plans of a decision.
        """
        world, layout = self.actor.world, self.actor.world.layout
        bins_SA = world.actions.encode(actions_SHKA[:, 0].to(world.device))
        if self._read is None:
            past_1LD = past_embeds(world, self._situation)
            length, places = past_1LD.shape[1], world.backbone.devices
            self._read = KVCache(world.backbone.config, 1, length, device=places, dtype=past_1LD.dtype)
            world.backbone.core(past_1LD, torch.arange(length, device=world.device), cache=self._read)
        embeds_SAD = world.backbone.embed(layout.action_ids(bins_SA)[:, :-1])
        positions = torch.arange(layout.action_dim, device=world.device) + self._read.length
        branches = KVCache(world.backbone.config, len(bins_SA), layout.action_dim, prefix=self._read)
        hidden_SAD = world.backbone.core(embeds_SAD, positions, cache=branches)
        ids = layout.vocabulary.action
        log_p_SAV = torch.log_softmax(world.backbone.head(hidden_SAD, slice(ids.start, ids.stop)).float(), -1)
        return -log_p_SAV.gather(-1, bins_SA[..., None])[..., 0].mean(-1) / math.log(ids.size)

    def _imagined(
        self, situations: Situations, done_ShKA: torch.Tensor, dynamics: Dynamics, generator: torch.Generator
    ) -> Situations:
        """The situations that beginnings of plans lead to."""
        imagination = dynamics.imagine(done_ShKA, generator)
        codes_ShN = imagination.tokens_SHN
        if codes_ShN is None:
            if self.actor.world.config.stream == "pictures":
                raise ValueError(
                    "the token policy looks at frames: imagine them, or give TrueDynamics a tokenize function"
                )
            codes_ShN = torch.zeros(*done_ShKA.shape[:2], 0, dtype=torch.long)
        numbers_ShP = imagination.proprio_SHP
        if self.actor.world.config.objects:
            if imagination.objects_SHO is None:
                raise ValueError("the token policy looks at where things are, which these dynamics do not say")
            numbers_ShP = torch.cat([numbers_ShP, imagination.objects_SHO.to(numbers_ShP)], -1)
        bins_ShP = self.actor.world.proprio.encode(numbers_ShP.to(self.actor.device))
        blocks = done_ShKA.shape[1]
        for h in range(max(0, blocks - self.actor.context_states), blocks):
            situations = self.actor.follow_tokens(situations, done_ShKA[:, h], codes_ShN[:, h], bins_ShP[:, h])
        return situations

    @property
    def _situation(self) -> Situations:
        if self._here is None:
            raise ValueError("reset the policy with the first observation before it acts")
        return self._here
