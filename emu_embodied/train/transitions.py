"""What the real simulator did in rollouts, as windows of two states: to learn from, and to begin imagining in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from emu_embodied.acting import Actor, Situations
from emu_embodied.data.batches import WindowBatch
from emu_embodied.decode.dida import StateDecoder
from emu_embodied.decode.grammar import StateLogits, expected_bin
from emu_embodied.models.cache import KVCache
from emu_embodied.tokens.sequence import StateTokens
from emu_embodied.train.rollouts import Rollout
from emu_embodied.world_model import WorldModel


def transitions(actor: Actor, rollouts: Sequence[Rollout]) -> WindowBatch:
    """Every block of some rollouts: the state before, the action, the state after; failures like successes.

    The rollouts need pictures of their last states (``open_crew(..., last_frames=True)``).
    """
    world = actor.world
    last = actor.see([rollout.last for rollout in rollouts]).to("cpu")
    parts: list[WindowBatch] = []
    for i, rollout in enumerate(rollouts):
        states = Situations.cat([rollout.situations, last.rows([i])])
        numbers = world.proprio.decode(states.proprio_BTP[:, -1].long())
        if world.config.objects:
            known = len(world.config.proprio)
            numbers = torch.cat([numbers[:, :known], torch.from_numpy(rollout.objects_TO)], 1)
        blocks = len(rollout)
        success = torch.zeros(blocks + 1, dtype=torch.bool)
        success[-1] = rollout.success
        pairs = torch.stack([torch.arange(blocks), torch.arange(1, blocks + 1)], 1)
        parts.append(
            WindowBatch(
                states.text_BL[:blocks].long(),
                states.codes_BTN[:, -1].long()[pairs],
                numbers[pairs],
                rollout.actions_TKA[:, None],
                torch.from_numpy(rollout.reward_T)[pairs],
                success[pairs],
                torch.zeros(blocks, dtype=torch.bool),
            )
        )
    return joined(parts)


def joined(parts: Sequence[WindowBatch]) -> WindowBatch:
    """All windows of some batches."""
    return WindowBatch(*(torch.cat([getattr(part, name) for part in parts]) for name in WindowBatch.__slots__))


def picked(batch: WindowBatch, rows: torch.Tensor) -> WindowBatch:
    """Some windows of a batch."""
    return WindowBatch(*(getattr(batch, name)[rows] for name in WindowBatch.__slots__))


@dataclass(frozen=True, slots=True)
class NextStates:
    """M imagined states.

    Attributes:
        tokens: codes [M, N] and bins [M, P].
        logits: what they were read from.
        reward_M: float32, expected, in [0, 1].
        success_M: float32, probability.
    """

    tokens: StateTokens
    logits: StateLogits
    reward_M: torch.Tensor
    success_M: torch.Tensor


@torch.no_grad()
def next_states(
    world: WorldModel,
    decoder: StateDecoder,
    text_ML: torch.Tensor,
    before: StateTokens,
    actions_MKA: torch.Tensor,
    generator: torch.Generator | None,
) -> NextStates:
    """Imagine one block from M different states, each the first of its stream."""
    layout, backbone = world.layout, world.backbone
    action_ids = layout.action_ids(world.actions.encode(actions_MKA))
    pieces = (text_ML, layout.state_ids(before.codes, before.proprio), action_ids)
    pending = backbone.embed(torch.cat([piece.to(world.device).long() for piece in pieces], 1))
    cache = KVCache(backbone.config, len(text_ML), layout.length(2), device=backbone.devices, dtype=pending.dtype)
    condition = backbone.action_embedding(actions_MKA.to(world.device))
    state = decoder.decode(cache, pending, condition, before, generator)
    return NextStates(
        StateTokens(state.codes_SN, state.proprio_SP),
        state.logits,
        world.reward.decode(expected_bin(state.logits.reward)),
        torch.softmax(state.logits.success, -1)[:, 1],
    )


def repeated(batch: WindowBatch, count: int) -> WindowBatch:
    """Every window ``count`` times in a row."""
    return replace(batch, **{name: getattr(batch, name).repeat_interleave(count, 0) for name in WindowBatch.__slots__})
