"""Noisy copies of states beside the clean sequence: DiDA's training view (Emu3.5, figure 9)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from emu_embodied.decode.grammar import StateLogits, state_logits
from emu_embodied.decode.paths import PATHS
from emu_embodied.models.masks import NoisyCopies
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


def sample_times(shape: tuple[int, ...], shift: float, source_share: float, generator: torch.Generator) -> torch.Tensor:
    """Times in [0, 1], one for each noisy copy; 0 is pure noise.

    URSA's law t = 1 - shift s / (1 + (shift - 1) s), s ~ U(0, 1), except for a share that starts at the source itself.
    """
    s = torch.rand(shape, generator=generator)
    times = 1 - shift * s / (1 + (shift - 1) * s)
    return torch.where(torch.rand(shape, generator=generator) < source_share, 0.0, times)


def noisy_logits(
    world: WorldModel, window: WindowTokens, times_BT: torch.Tensor, generator: torch.Generator, path: str = "uniform"
) -> TwoViews:
    """Predict the states 1 .. T - 1 from noisy copies at the given times [B, T - 1], and from the clean stream.

    A copy sees the clean tokens before its state and the whole of itself; it carries the positions of the clean state.
    """
    layout, backbone, device = world.layout, world.backbone, world.device
    batch, copies = times_BT.shape
    v, noise = layout.vocabulary, PATHS[path]
    codes = window.targets.codes_MN.unflatten(0, (batch, copies)).cpu()
    proprio = window.targets.proprio_MP.unflatten(0, (batch, copies)).cpu()
    codes = noise.noise(codes, v.vision.size, times_BT[..., None], generator)
    proprio = noise.noise(proprio, v.state.size, times_BT[..., None], generator)
    ids = layout.state_ids(codes.to(device), proprio.to(device))
    copies_BLD = (backbone.embed(ids) + window.condition_BTD[:, :, None]).flatten(1, 2)
    clean_length = window.embeds_BLD.shape[1]
    starts = [layout.state_offset(t) for t in range(1, copies + 1)]
    mask = NoisyCopies(clean_length, tuple(starts), layout.state_tokens)
    spans = [torch.arange(start, start + layout.state_tokens) for start in starts]
    positions = torch.cat([torch.arange(clean_length), *spans]).to(device)
    hidden = backbone.core(torch.cat([window.embeds_BLD, copies_BLD], 1), positions, mask=mask)
    noisy = hidden[:, clean_length:].unflatten(1, (copies, layout.state_tokens)).flatten(0, 1)
    clean = hidden[:, :clean_length]
    return TwoViews(clean_logits(backbone, layout, clean), state_logits(backbone, layout, noisy), clean)
