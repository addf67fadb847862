"""Noisy copies of states beside the clean sequence: DiDA's training view (Emu3.5, figure 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from emu_embodied.decode.grammar import StateLogits, state_logits
from emu_embodied.decode.paths import StatePath
from emu_embodied.models.masks import NoisyCopies
from emu_embodied.tokens.sequence import StateTokens
from emu_embodied.train.windows import WindowTokens, clean_logits
from emu_embodied.world_model import WorldModel


@dataclass(frozen=True, slots=True)
class TwoViews:
    """What one forward over clean stream and noisy copies predicts.

    Attributes:
        clean: next-token logits of the states 1 .. T - 1, window-major.
        noisy: logits of the same states from their noisy copies.
        hidden_BLD: hidden vectors of the clean stream.
    """

    clean: StateLogits
    noisy: StateLogits
    hidden_BLD: torch.Tensor


def sample_times(
    shape: tuple[int, int], shift: float, source_share: float, generator: torch.Generator, *, asynchronous: bool = True
) -> torch.Tensor:
    """Times [B, T] in [0, 1] of noisy copies; 0 is pure noise.

    URSA's law t = 1 - shift s / (1 + (shift - 1) s), s ~ U(0, 1), except for a share that starts at the source itself.

    Args:
        shape: (B, T).
        shift: larger means noisier.
        source_share: share of times that are 0.
        generator: CPU generator.
        asynchronous: a time for every copy, else one for all T copies of a window.
    """
    drawn = shape if asynchronous else (shape[0], 1)
    s = torch.rand(drawn, generator=generator)
    times = 1 - shift * s / (1 + (shift - 1) * s)
    return torch.where(torch.rand(drawn, generator=generator) < source_share, 0.0, times).expand(shape)


def draw_copies(
    paths: Sequence[StatePath], window: WindowTokens, times_BT: torch.Tensor, generator: torch.Generator
) -> StateTokens:
    """Noisy copies [B, T - 1, ...] of the states 1 .. T - 1 at the given times; each draws its path from ``paths``."""
    shape, device = times_BT.shape, window.before.codes.device
    codes = window.targets.codes_MN.unflatten(0, shape)
    proprio = window.targets.proprio_MP.unflatten(0, shape)
    if len(paths) == 1:
        return paths[0].noise(StateTokens(codes, proprio), times_BT, window.before, generator)
    chosen_BT = torch.randint(len(paths), shape, generator=generator)
    noisy = StateTokens(torch.empty_like(codes), torch.empty_like(proprio))
    for i, path in enumerate(paths):
        times, own = times_BT[chosen_BT == i], (chosen_BT == i).to(device)
        target = StateTokens(codes[own], proprio[own])
        before = StateTokens(window.before.codes[own], window.before.proprio[own])
        drawn = path.noise(target, times, before, generator)
        noisy.codes[own], noisy.proprio[own] = drawn.codes, drawn.proprio
    return noisy


def noisy_logits(world: WorldModel, window: WindowTokens, noisy: StateTokens, *, flex: bool = False) -> TwoViews:
    """Predict the states 1 .. T - 1 from noisy copies of them [B, T - 1, ...], and from the clean stream.

    A copy sees the clean tokens before its state and the whole of itself; it carries the positions of the clean state.
    ``flex`` is that of ``NoisyCopies``.
    """
    layout, backbone, device = world.layout, world.backbone, world.device
    copies = noisy.codes.shape[1]
    ids = layout.state_ids(noisy.codes, noisy.proprio)
    copies_BLD = (backbone.embed(ids) + window.condition_BTD[:, :, None]).flatten(1, 2)
    clean_length = window.embeds_BLD.shape[1]
    mask = NoisyCopies(clean_length, window.starts, layout.state_tokens, flex)
    spans = [torch.arange(start, start + layout.state_tokens) for start in window.starts]
    positions = torch.cat([torch.arange(clean_length), *spans]).to(device)
    hidden = backbone.core(torch.cat([window.embeds_BLD, copies_BLD], 1), positions, mask=mask)
    noisy_BTLD = hidden[:, clean_length:].unflatten(1, (copies, layout.state_tokens))
    clean = hidden[:, :clean_length]
    return TwoViews(
        clean_logits(backbone, layout, clean, window),
        state_logits(backbone, layout, noisy_BTLD.flatten(0, 1), window.before.proprio.flatten(0, 1)),
        clean,
    )
