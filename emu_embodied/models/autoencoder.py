"""The convolutional autoencoder of Emu3.5's vision tokenizer: pixels to a grid of vectors and back.

State-dict keys are the official ones. Activations are tensors, or ``Strips`` of images too large for that: ``hold``
marks what is read more than once. Shape letters: B batch, C channels, H/W pixels, h/w cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from emu_embodied.models.strips import hold, whole

_SCORES = 1 << 26
"""Attention scores computed at once, at most [scores]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IBQConfig:
    """Shape of a vision tokenizer; the defaults are Emu3.5's (455 M parameters, 16 pixels per code)."""

    in_channels: int = 3
    """Channels read [channels]."""
    out_ch: int = 3
    """Channels written [channels]."""
    ch: int = 256
    """Width at full resolution [channels]."""
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Width of each level as a multiple of ``ch``; every level but the last halves the resolution."""
    num_res_blocks: int = 4
    """Residual blocks per encoder level; decoder levels have one more [blocks]."""
    attn_resolutions: tuple[int, ...] = (16,)
    """Levels with attention, named by their side at the nominal resolution [pixels]."""
    resolution: int = 256
    """Nominal side of a frame; only says which level ``attn_resolutions`` mean [pixels]."""
    z_channels: int = 256
    """Channels between the autoencoder and the 1x1 convolutions around the codebook [channels]."""
    embed_dim: int = 256
    """Width D of a code vector [channels]."""
    n_embed: int = 131_072
    """Codebook size K [codes]."""
    norm_groups: int = 32
    """Groups of every group norm; must divide every width [groups]."""
    patch: int = 1
    """Side of the square of pixels folded into channels before the first convolution and unfolded after the last; 2 or
    4 leaves out the full-resolution levels, where a small network spends most of its time [pixels]."""

    def __post_init__(self) -> None:
        widths = {self.ch * multiple for multiple in self.ch_mult}
        odd = sorted(width for width in widths if width % self.norm_groups)
        if odd:
            raise ValueError(f"norm_groups {self.norm_groups} does not divide the widths {odd} (ch x ch_mult)")

    @property
    def cell(self) -> int:
        """Side of the square of pixels that one code stands for [pixels]."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)


def _norm(config: IBQConfig, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, width, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a skip connection."""

    def __init__(self, config: IBQConfig, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(config, width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = _norm(config, width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C', H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return hold(h + (x if self.nin_shortcut is None else self.nin_shortcut(x)), over=x)


class AttnBlock(nn.Module):
    """Single-head attention over all positions."""

    def __init__(self, config: IBQConfig, width: int) -> None:
        super().__init__()
        self.norm = _norm(config, width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        batch, width, height, across = x.shape
        normed = self.norm(x)
        query, key, value = (
            whole(layer(normed)).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v)
        )
        # Some queries at a time: not every kernel for so wide a head is one that never holds all scores.
        rows = max(1, _SCORES // (batch * height * across))
        mixed = torch.cat([F.scaled_dot_product_attention(part, key, value) for part in query.split(rows, 2)], 2)
        mixed = self.proj_out(mixed.squeeze(1).transpose(1, 2).reshape(batch, width, height, across))
        return hold(x + mixed, over=x)


class Downsample(nn.Module):
    """Halve the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H / 2, W / 2]."""
        return hold(self.conv(F.pad(x, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Double the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, 2 H, 2 W]."""
        return hold(self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the level has any; then the way onwards."""

    def __init__(
        self,
        config: IBQConfig,
        width_in: int,
        width_out: int,
        blocks: int,
        attention: bool,
        onwards: Literal["down", "up"] | None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(config, width_in if index == 0 else width_out, width_out) for index in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(config, width_out) for _ in range(blocks if attention else 0))
        self.downsample = Downsample(width_out) if onwards == "down" else None
        self.upsample = Upsample(width_out) if onwards == "up" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C', H, W], or half or double the H and W."""
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x if self.upsample is None else self.upsample(x)


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, config: IBQConfig, width: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(config, width, width)
        self.attn_1 = AttnBlock(config, width)
        self.block_2 = ResnetBlock(config, width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pixels to a grid of z_channels."""

    def __init__(self, config: IBQConfig) -> None:
        super().__init__()
        widths = [config.ch * multiple for multiple in config.ch_mult]
        self.patch = config.patch
        self.conv_in = nn.Conv2d(config.in_channels * config.patch**2, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = config.ch
        for index, level_width in enumerate(widths):
            attention = config.resolution // (config.patch * 2**index) in config.attn_resolutions
            onwards: Literal["down"] | None = "down" if index < len(widths) - 1 else None
            self.down.append(Level(config, width, level_width, config.num_res_blocks, attention, onwards))
            width = level_width
        self.mid = Middle(config, width)
        self.norm_out = _norm(config, width)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, z_channels, h, w]."""
        x = hold(self.conv_in(F.pixel_unshuffle(pixels, self.patch)))
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """A grid of z_channels to pixels."""

    def __init__(self, config: IBQConfig) -> None:
        super().__init__()
        widths = [config.ch * multiple for multiple in config.ch_mult]
        width = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = Middle(config, width)
        levels: list[Level] = []
        for index in reversed(range(len(widths))):
            attention = config.resolution // (config.patch * 2**index) in config.attn_resolutions
            onwards: Literal["up"] | None = "up" if index > 0 else None
            levels.insert(0, Level(config, width, widths[index], config.num_res_blocks + 1, attention, onwards))
            width = widths[index]
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(config, width)
        self.patch = config.patch
        self.conv_out = nn.Conv2d(width, config.out_ch * config.patch**2, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """[B, z_channels, h, w] -> [B, C, H, W]."""
        x = self.mid(hold(self.conv_in(z)))
        for index in reversed(range(len(self.up))):
            x = self.up[index](x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch)
