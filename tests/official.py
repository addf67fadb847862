"""A folder in Emu3.5's official format, at toy size: names and special ids as released, a backbone of two layers."""

from __future__ import annotations

import base64
import json
from itertools import count, product
from pathlib import Path

import torch

from emu_embodied.models.config import EmuConfig
from emu_embodied.models.ibq import IBQ, IBQConfig
from emu_embodied.models.transformer import EmuForCausalLM

CODES = 16
RANKS = 151_643
VOCABULARY = 151_854 + CODES
IBQ_CONFIG = IBQConfig(
    ch=4, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resolution=8, z_channels=4, embed_dim=4,
    n_embed=CODES, norm_groups=2, patch=2,
)  # fmt: skip
"""Cells of 4 x 4 pixels."""


def config(**changes: int | float) -> EmuConfig:
    """The backbone's shape; ids as released."""
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 4096,
    }  # fmt: skip
    return EmuConfig(**(shape | changes))  # type: ignore[arg-type]


def write_text(folder: Path) -> None:
    """``emu3.tiktoken``: bytes in Qwen's order (digits are 15 to 24, ``*`` is 9), then words that no text reaches."""
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += sorted(set(range(256)) - set(order))
    tokens = [bytes([byte]) for byte in order]
    rare = (bytes(word) for n in count(4) for word in product(range(1, 9), repeat=n))
    tokens += [next(rare) for _ in range(RANKS - len(tokens))]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "emu3.tiktoken").write_bytes(b"".join(lines))


def write_vision(folder: Path, seed: int = 0) -> None:
    """``config.yaml`` and ``model.ckpt``, whose codes all occur."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ibq = IBQ(IBQ_CONFIG)
        torch.nn.init.normal_(ibq.codebook)
    folder.mkdir(parents=True, exist_ok=True)
    fields = {name: getattr(IBQ_CONFIG, name) for name in ("ch", "num_res_blocks", "resolution", "z_channels")}
    fields |= {"ch_mult": list(IBQ_CONFIG.ch_mult), "attn_resolutions": [], "in_channels": 3, "out_ch": 3}
    content = {"embed_dim": 4, "n_embed": CODES, "norm_groups": 2, "patch": 2, "ddconfig": fields}
    (folder / "config.yaml").write_text(json.dumps(content))  # JSON is YAML
    torch.save(ibq.state_dict(), folder / "model.ckpt")


def write_backbone(folder: Path, seed: int = 0, shard: str = "8MB", **changes: int | float) -> EmuForCausalLM:
    """``config.json`` and sharded safetensors; random weights, but for one inclination: where text may stand it begins
    a picture. Returns the model.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = EmuForCausalLM(config(**changes)).eval()
        for name, weight in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(weight, std=0.3 if "lm_head" in name else 0.7)
        with torch.no_grad():
            # One direction is the same for all tokens, and no layer writes there.
            model.model.embed_tokens.weight[:, 0] = 4.0
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
            model.lm_head.weight[151_852, 0] = 100.0
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def write_checkpoint(folder: Path, seed: int = 0) -> EmuForCausalLM:
    """All of it: the backbone and the text tokenizer in ``folder``, the vision tokenizer in ``folder/vision``."""
    write_text(folder)
    write_vision(folder / "vision", seed)
    return write_backbone(folder, seed)
