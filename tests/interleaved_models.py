"""Interleaved models at toy size: random weights whose head is biased to open images, thoughts and to end."""

from __future__ import annotations

import torch

from emu_embodied.interleaved import InterleavedModel
from emu_embodied.models.config import EmuConfig
from emu_embodied.models.ibq import IBQ, IBQConfig
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.tokens.text import TextTokenizer

CODES = 12
IBQ_CONFIG = IBQConfig(
    ch=4, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resolution=8, z_channels=4, embed_dim=4,
    n_embed=CODES, norm_groups=2,
)  # fmt: skip
"""One code stands for 2 x 2 pixels."""


def make_tokenizer() -> TextTokenizer:
    """Single bytes, then Emu3.5's special, image and visual tokens."""
    return TextTokenizer({bytes([byte]): byte for byte in range(256)})


def make_vision(seed: int = 0) -> IBQ:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vision = IBQ(IBQ_CONFIG)
        for parameter in vision.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return vision.eval()


def make_backbone(vocabulary: int, seed: int = 0, **changes: int) -> EmuForCausalLM:
    """Two layers of 32; every part of the input moves the output."""
    shape = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = EmuForCausalLM(EmuConfig(**(shape | changes)))
        for parameter in backbone.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return backbone.eval()


def make_model(seed: int = 0, bias: dict[str, float] | None = None, **changes: int) -> InterleavedModel:
    """A model that writes bytes and images; ``bias`` multiplies the head's rows of tokens by their names."""
    text = make_tokenizer()
    backbone = make_backbone(text.first_visual + CODES, seed, **changes)
    favour(backbone, text, {"image start": 5.0} if bias is None else bias)
    return InterleavedModel(backbone, text, make_vision(seed))


def favour(backbone: EmuForCausalLM, text: TextTokenizer, bias: dict[str, float]) -> None:
    """Longer rows of the head win more often."""
    with torch.no_grad():
        for name, factor in bias.items():
            backbone.lm_head.weight[text.special_id(f"<|{name}|>")] *= factor
