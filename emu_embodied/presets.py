"""Sizes as table rows: the same classes at every size, never another code path."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Literal

from emu_embodied.models.ibq import IBQConfig
from emu_embodied.models.transformer import EmuConfig
from emu_embodied.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One row: the shape of the backbone, of the vision tokenizer and of the token stream."""

    layers: int
    """Transformer layers."""
    width: int
    """Model width D."""
    mlp: int
    """Width of the SwiGLU."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads."""
    head_dim: int
    """Width of a head."""
    ibq: IBQConfig
    """The vision tokenizer."""
    image_size: int = 64
    """Side of a camera frame [pixels]."""
    cameras: tuple[str, ...] = ("front",)
    """Cameras whose frames are tokens."""
    block: int = 5
    """Env steps in an action block [control steps]."""
    text_length: int = 48
    """Longest instruction [bytes; with Emu3.5's ids, tokens]."""
    action_bins: int = 64
    """Bins of an action dimension."""
    state_bins: int = 256
    """Bins of a proprio field."""
    reward_bins: int = 64
    """Bins of the reward."""
    context_states: int = 2
    """Observed states a belief keeps when its window is full [states]."""
    max_states: int = 5
    """States in a training window, and so in one stretch of imagination [states]."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies; ours read about a thousand tokens, Emu3.5 reads 32,768."""
    context: int = 4096
    """Longest sequence meant to be read [tokens]."""
    tokens: Literal["compact", "emu3.5"] = "compact"
    """Ids and image blocks: ours, or those of BAAI's released model."""

    def vocabulary(self) -> Vocabulary:
        """The id ranges of this preset."""
        bins = {"action": self.action_bins, "state": self.state_bins, "reward": self.reward_bins}
        if self.tokens == "emu3.5":
            return Vocabulary.emu35(vision=self.ibq.n_embed, **bins)
        return Vocabulary.compact(text=256, vision=self.ibq.n_embed, **bins)

    def backbone(self, action_dim: int) -> EmuConfig:
        """The transformer's configuration for actions of ``action_dim`` dimensions; 0 for none."""
        vocabulary = self.vocabulary()
        return EmuConfig(
            vocab_size=vocabulary.size,
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            rms_norm_eps=1e-6,
            rope_theta=self.rope_theta,
            max_position_embeddings=self.context,
            bos_token_id=vocabulary.special["bos"],
            eos_token_id=vocabulary.special["eos"],
            pad_token_id=vocabulary.special["pad"],
            action_dim=action_dim,
            action_block=self.block if action_dim else 0,
        )


_NANO = Preset(
    layers=4,
    width=128,
    mlp=384,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ibq=IBQConfig(
        patch=4,
        ch=64,
        ch_mult=(1, 1),
        num_res_blocks=1,
        attn_resolutions=(),
        z_channels=32,
        embed_dim=16,
        n_embed=512,
        norm_groups=8,
        resolution=64,
    ),
)

PRESETS: dict[str, Preset] = {
    "nano": _NANO,
    # Five blocks ahead in one stretch: the goals of Push-T's protocol lie 25 env steps away.
    "pusht": replace(_NANO, cameras=("top",), text_length=28, context_states=1, max_states=6),
    "metaworld": replace(_NANO, cameras=("close",)),
    "small": Preset(
        layers=8,
        width=384,
        mlp=1024,
        heads=6,
        kv_heads=2,
        head_dim=64,
        ibq=IBQConfig(
            ch=64,
            ch_mult=(1, 2, 2, 4),
            num_res_blocks=2,
            attn_resolutions=(8,),
            z_channels=128,
            embed_dim=32,
            n_embed=2048,
            norm_groups=32,
            resolution=64,
        ),
        cameras=("front", "wrist"),
        max_states=6,
    ),
    "base": Preset(
        layers=16,
        width=1024,
        mlp=2816,
        heads=16,
        kv_heads=4,
        head_dim=64,
        ibq=IBQConfig(
            ch=128,
            ch_mult=(1, 1, 2, 4),
            num_res_blocks=2,
            attn_resolutions=(16,),
            z_channels=256,
            embed_dim=64,
            n_embed=8192,
            norm_groups=32,
            resolution=128,
        ),
        image_size=128,
        cameras=("front", "wrist"),
        max_states=8,
        context_states=3,
    ),
    "emu3.5": Preset(
        layers=64,
        width=5120,
        mlp=25_600,
        heads=64,
        kv_heads=8,
        head_dim=128,
        ibq=IBQConfig(),
        image_size=256,
        action_bins=256,
        max_states=8,
        context_states=3,
        rope_theta=1_000_000.0,
        context=32_768,
        tokens="emu3.5",
    ),
}


def preset(name: str) -> Preset:
    """A row by name.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0)
        raise ValueError(f"unknown preset {name!r}; did you mean {near[0]!r}? known: {', '.join(PRESETS)}")
    return PRESETS[name]
