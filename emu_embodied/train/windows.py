"""From a window of states to what the transformer reads and should predict: shared by both training stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from emu_embodied.data.batches import WindowBatch
from emu_embodied.decode.grammar import StateLogits, state_logits
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.tokens.sequence import SequenceLayout, StateTokens
from emu_embodied.train.losses import StateTargets
from emu_embodied.world_model import WorldModel


@dataclass(frozen=True, slots=True)
class WindowTokens:
    """A batch of windows as tokens.

    Attributes:
        embeds_BLD: the embedded clean stream, its frame codes partly replaced by random ones (context noise), the
            action conditions added.
        starts: where in it the states 1 .. T - 1 begin.
        condition_BTD: continuous embedding of the T - 1 action blocks.
        action_bins_BTA: int64 [B, T - 1, A].
        before: tokens of the states 0 .. T - 2 as the clean stream shows them, [B, T - 1, ...].
        targets: of the states 1 .. T - 1, B * (T - 1) of them, window-major.
    """

    embeds_BLD: torch.Tensor
    starts: tuple[int, ...]
    condition_BTD: torch.Tensor
    action_bins_BTA: torch.Tensor
    before: StateTokens
    targets: StateTargets


def window_tokens(
    world: WorldModel,
    batch: WindowBatch,
    context_noise: float,
    generator: torch.Generator,
    shown: StateTokens | None = None,
    *,
    object_noise: float = 0.0,
) -> WindowTokens:
    """Tokenise and embed a batch.

    Args:
        world: whose layout, tokenizers and backbone are used.
        batch: on the backbone's device.
        context_noise: see ``disturbed``.
        generator: CPU generator.
        shown: what the clean stream shows of the states [B, T, ...], if not the data with context noise; the targets
            are those of the data.
        object_noise: see ``misjudged``.
    """
    layout, backbone = world.layout, world.backbone
    proprio_BTP = world.proprio.encode(batch.proprio_BTP)
    action_bins = world.actions.encode(batch.actions_BTKA)
    if shown is None:
        codes_BTN = disturbed(batch.codes_BTN, layout.vocabulary.vision.size, context_noise, generator)
        shown = StateTokens(codes_BTN, misjudged(proprio_BTP, world, object_noise, generator))
    condition_BTD = backbone.action_embedding(batch.actions_BTKA)
    led_to_BTD = F.pad(condition_BTD, (0, 0, 1, 0))  # no action led to the first state
    embeds = layout.interleave(
        backbone.embed(batch.text_BL),
        backbone.embed(layout.state_ids(shown.codes, shown.proprio)) + led_to_BTD[:, :, None],
        backbone.embed(layout.action_ids(action_bins)),
    )
    states = slice(1, None)
    targets = StateTargets(
        batch.codes_BTN[:, states].flatten(0, 1),
        proprio_BTP[:, states].flatten(0, 1),
        world.reward.encode(batch.reward_BT[:, states]).flatten(),
        batch.success_BT[:, states].long().flatten(),
        (batch.codes_BTN[:, 1:] != batch.codes_BTN[:, :-1]).flatten(0, 1),
    )
    before = StateTokens(shown.codes[:, :-1], shown.proprio[:, :-1])
    starts = tuple(layout.state_offset(t) for t in range(1, batch.codes_BTN.shape[1]))
    return WindowTokens(embeds, starts, condition_BTD, action_bins, before, targets)


def disturbed(codes_BTN: torch.Tensor, codebook: int, context_noise: float, generator: torch.Generator) -> torch.Tensor:
    """Frame codes as a model reads them in training: each window replaces a share of them by random ones.

    The share is drawn from U(0, context_noise); so the model learns to live with its mistakes (GENIE / 1X practice).
    """
    share = torch.rand(len(codes_BTN), 1, 1, generator=generator) * context_noise
    replaced = torch.rand(codes_BTN.shape, generator=generator) < share
    random = torch.randint(codebook, codes_BTN.shape, generator=generator)
    return torch.where(replaced.to(codes_BTN.device), random.to(codes_BTN.device), codes_BTN)


def misjudged(
    proprio_BTP: torch.Tensor, world: WorldModel, object_noise: float, generator: torch.Generator
) -> torch.Tensor:
    """Bins as a model reads them in training: those of objects are off, as its own reading of a frame would be.

    A window's error has a standard deviation drawn from U(0, object_noise) [bins]; half of its variance is the same in
    all states, as one who misjudges a place misjudges it again.
    """
    rows, states = proprio_BTP.shape[:2]
    objects = len(world.config.objects)
    if not objects or object_noise == 0:
        return proprio_BTP
    spread = torch.rand(rows, 1, 1, generator=generator) * object_noise * 0.5**0.5
    lasting = torch.randn(rows, 1, objects, generator=generator)
    passing = torch.randn(rows, states, objects, generator=generator)
    error_BTO = (spread * (lasting + passing)).round().long().to(proprio_BTP.device)
    known_BTP, told_BTO = proprio_BTP.split([len(world.config.proprio), objects], -1)
    return torch.cat([known_BTP, (told_BTO + error_BTO).clamp(0, world.config.state_bins - 1)], -1)


def clean_logits(
    backbone: EmuForCausalLM, layout: SequenceLayout, hidden_BLD: torch.Tensor, window: WindowTokens
) -> StateLogits:
    """Logits of the states 1 .. T - 1 of a window's clean stream, window-major."""
    states_BTLD = torch.stack([hidden_BLD[:, start : start + layout.state_tokens] for start in window.starts], 1)
    return state_logits(backbone, layout, states_BTLD.flatten(0, 1), window.before.proprio.flatten(0, 1))


def action_loss(
    backbone: EmuForCausalLM,
    layout: SequenceLayout,
    hidden_BLD: torch.Tensor,
    window: WindowTokens,
    imitate_B: torch.Tensor,
) -> torch.Tensor:
    """Mean cross-entropy of the action bins in windows worth imitating (0 where a batch has none)."""
    _, _, actions_BTLD = layout.parse(hidden_BLD)
    ids = layout.vocabulary.action
    logits = backbone.head(actions_BTLD[:, :, :-1], slice(ids.start, ids.stop))
    nll_BTA = F.cross_entropy(logits.movedim(-1, 1), window.action_bins_BTA, reduction="none")
    weight = imitate_B.float()
    return (nll_BTA.mean((1, 2)) * weight).sum() / weight.sum().clamp(min=1)
