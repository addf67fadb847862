"""LoRA for backbones too large to train whole: low-rank maps beside frozen linear ones (Hu et al. 2021), by peft.

A checkpoint holds no adapters: they are added to the weights when it is written, so that whatever reads checkpoints
reads these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.require import require

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def attach(backbone: EmuForCausalLM, rank: int, seed: int) -> None:
    """Put adapters of ``rank`` beside every linear map of the layers, and freeze all else.

    Raises:
        ImportError: without peft, with the pip line.
        ValueError: if there are adapters already.
    """
    peft = require("peft", extra="lora")
    if adapted(backbone):
        raise ValueError("this backbone has adapters already: load the checkpoint afresh")
    backbone.requires_grad_(False)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(_TARGETS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # peft draws from the global generator
        peft.inject_adapter_in_model(config, backbone)


def adapted(backbone: nn.Module) -> bool:
    """Whether it has adapters."""
    return bool(_layers(backbone))


@contextmanager
def disabled(backbone: nn.Module) -> Iterator[None]:
    """Inside, the adapters do nothing: these are the weights that training began with."""
    layers = _layers(backbone)
    for _, _, layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for _, _, layer in layers:
            layer.enable_adapters(True)


@contextmanager
def merged(backbone: nn.Module) -> Iterator[None]:
    """Inside, every adapted map is a plain one with what was learned added to its weight; adapters come back after."""
    layers = _layers(backbone)
    try:
        for parent, name, layer in layers:
            base = layer.get_base_layer()
            with torch.no_grad():
                weight = base.weight + layer.get_delta_weight("default").to(base.weight)
            plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(weight, requires_grad=False)
            setattr(parent, name, plain)
        yield
    finally:
        for parent, name, layer in layers:
            setattr(parent, name, layer)


def _layers(backbone: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Every adapted map, with where it hangs."""
    return [
        (parent, name, child)
        for parent in backbone.modules()
        for name, child in parent.named_children()
        if hasattr(child, "enable_adapters") and hasattr(child, "get_delta_weight")
    ]
