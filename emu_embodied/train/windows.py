"""From a window of states to what the transformer reads and should predict: shared by both training stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from emu_embodied.data.batches import WindowBatch
from emu_embodied.decode.grammar import StateLogits, state_logits
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.tokens.sequence import SequenceLayout
from emu_embodied.train.losses import StateTargets
from emu_embodied.world_model import WorldModel


@dataclass(frozen=True, slots=True)
class WindowTokens:
    """A batch of windows as tokens.

    Attributes:
        ids_BL: int64 clean stream, its frame codes partly replaced by noise (context noise).
        embeds_BLD: the embedded stream with the action conditions added.
        condition_BTD: continuous embedding of the T - 1 action blocks.
        action_bins_BTA: int64 [B, T - 1, A].
        targets: of the states 1 .. T - 1, B * (T - 1) of them, window-major.
    """

    ids_BL: torch.Tensor
    embeds_BLD: torch.Tensor
    condition_BTD: torch.Tensor
    action_bins_BTA: torch.Tensor
    targets: StateTargets


def window_tokens(
    world: WorldModel, batch: WindowBatch, context_noise: float, generator: torch.Generator
) -> WindowTokens:
    """Tokenise and embed a batch.

    Args:
        world: whose layout, tokenizers and backbone are used.
        batch: on the backbone's device.
        context_noise: each window replaces a share of its frame codes drawn from U(0, context_noise) by random ones, so
            that the model learns to live with its own mistakes (GENIE / 1X practice).
        generator: CPU generator.
    """
    layout, backbone, device = world.layout, world.backbone, batch.codes_BTN.device
    proprio_BTP = world.proprio.encode(batch.proprio_BTP)
    action_bins = world.actions.encode(batch.actions_BTKA)
    share = torch.rand(len(batch.codes_BTN), 1, 1, generator=generator) * context_noise
    replaced = torch.rand(batch.codes_BTN.shape, generator=generator) < share
    random = torch.randint(layout.vocabulary.vision.size, batch.codes_BTN.shape, generator=generator)
    context_BTN = torch.where(replaced.to(device), random.to(device), batch.codes_BTN)
    ids_BL = layout.interleave(
        batch.text_BL, layout.state_ids(context_BTN, proprio_BTP), layout.action_ids(action_bins)
    )
    condition_BTD = backbone.action_embedding(batch.actions_BTKA)
    embeds = backbone.embed(ids_BL)
    per_state = torch.repeat_interleave(condition_BTD, layout.state_tokens, 1).unflatten(1, (-1, layout.state_tokens))
    per_step = F.pad(per_state, (0, 0, layout.action_tokens, 0)).flatten(1, 2)
    embeds = embeds + F.pad(per_step, (0, 0, layout.state_offset(0) + layout.state_tokens, 0))
    states = slice(1, None)
    targets = StateTargets(
        batch.codes_BTN[:, states].flatten(0, 1),
        proprio_BTP[:, states].flatten(0, 1),
        world.reward.encode(batch.reward_BT[:, states]).flatten(),
        batch.success_BT[:, states].long().flatten(),
        (batch.codes_BTN[:, 1:] != batch.codes_BTN[:, :-1]).flatten(0, 1),
    )
    return WindowTokens(ids_BL, embeds, condition_BTD, action_bins, targets)


def clean_logits(backbone: EmuForCausalLM, layout: SequenceLayout, hidden_BLD: torch.Tensor) -> StateLogits:
    """Logits of the states 1 .. T - 1 of a clean stream, window-major."""
    steps = hidden_BLD[:, layout.action_offset(0) :].unflatten(1, (-1, layout.step_tokens))
    return state_logits(backbone, layout, steps[:, :, layout.action_tokens :].flatten(0, 1))


def action_loss(
    backbone: EmuForCausalLM,
    layout: SequenceLayout,
    hidden_BLD: torch.Tensor,
    window: WindowTokens,
    imitate_B: torch.Tensor,
) -> torch.Tensor:
    """Mean cross-entropy of the action bins in windows worth imitating (0 where a batch has none)."""
    steps = hidden_BLD[:, layout.action_offset(0) :].unflatten(1, (-1, layout.step_tokens))
    ids = layout.vocabulary.action
    logits = backbone.head(steps[:, :, : layout.action_dim], slice(ids.start, ids.stop))
    nll_BTA = F.cross_entropy(logits.movedim(-1, 1), window.action_bins_BTA, reduction="none")
    weight = imitate_B.float()
    return (nll_BTA.mean((1, 2)) * weight).sum() / weight.sum().clamp(min=1)
