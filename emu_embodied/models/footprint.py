"""How much memory a checkpoint needs, from configurations and headers alone: no weights are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from emu_embodied.hardware import Accelerator, Hardware
from emu_embodied.models.checkpoints import read_config, read_folder_shapes, read_header
from emu_embodied.models.config import EmuConfig
from emu_embodied.models.folders import find_backbone, find_vision
from emu_embodied.models.ibq import IBQ, read_ibq_config

BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1}
"""Safetensors' names of number formats -> bytes of a number."""
PICTURE_TOKENS = 5120
"""New tokens of one picture of 1024 x 1024 pixels: what a device has to have room for to be of use [tokens]."""
_SEQUENCES = 2  # the prompt, and what guidance compares it with
_BYTES_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)  # NF4 with quantised scales: blocks of 64 weights, groups of 256 scales
_USABLE = 0.94  # of a device's memory: the rest is the driver's, and lost between blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Memory that a checkpoint needs [GB = 1e9 bytes]."""

    name: str
    """Folder or shipped name."""
    parameters: int
    """Weights of the backbone."""
    stored_as: str
    """Number format of most weights, in safetensors' words."""
    weights_gb: dict[str, float]
    """Backbone by number format: ``stored``, ``float32``, ``bfloat16``, ``8bit``, ``4bit``; quantised ones keep
    embedding and head in bfloat16."""
    kv_gb_per_1k: float
    """Keys and values of 1,000 tokens of one sequence, two bytes a number; guidance holds two sequences."""
    vision_gb: float
    """Vision tokenizer (float32); 0 if there is none."""
    working_gb: float
    """Activations of the vision tokenizer while it draws or reads one megapixel."""
    context: int
    """Longest sequence meant to be read [tokens]."""
    problem: str | None = None
    """What is wrong with the weight files; sizes then follow from the configuration."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way of running a checkpoint on this machine."""

    flags: str
    """Of ``emu-embodied generate``."""
    place: str
    """Where the weights would be."""
    weights_gb: float
    """Backbone in this form [GB]."""
    context: int
    """Tokens that fit beside it, guidance's second sequence included; at most the model's context [tokens]."""
    works: bool
    """Whether a picture fits."""


def footprint(folder: Path, name: str | None = None) -> Footprint:
    """Measure a checkpoint.

    Args:
        folder: of the backbone and, in or beside it, of its vision tokenizer; or one that has them as subfolders.
        name: what to call it; the folder by default.

    Raises:
        ValueError: if the folder holds no backbone's configuration.
    """
    folder = find_backbone(folder)
    try:
        vision_gb, working_gb = _vision(find_vision(folder))
    except ValueError:  # none there: the backbone alone is worth a figure
        vision_gb, working_gb = 0.0, 0.0
    content = read_config(folder)
    config = EmuConfig(**content)
    shapes = _expected_shapes(config)
    stored, problem = {_format_of(content): sum(map(prod, shapes.values()))}, None
    try:
        files = {path for path, _ in read_folder_shapes(folder).values()}
        entries = [entry for path in sorted(files) for entry in read_header(path).values()]
        stored = Counter()
        for entry in entries:
            stored[entry["dtype"]] += prod(entry["shape"])
    except ValueError as error:
        problem = str(error)
    numbers = sum(map(prod, shapes.values()))
    # bitsandbytes replaces linear layers except the head.
    linear = sum(prod(shape) for key, shape in shapes.items() if key.endswith("_proj.weight"))
    rest_gb = (numbers - linear) * 2 / 1e9
    head = config.num_key_value_heads * config.head_dim
    return Footprint(
        name=str(folder) if name is None else name,
        parameters=numbers,
        stored_as=max(stored, key=lambda kind: stored[kind]),
        weights_gb={
            "stored": sum(count * BYTES.get(kind, 2) for kind, count in stored.items()) / 1e9,
            "float32": numbers * 4 / 1e9,
            "bfloat16": numbers * 2 / 1e9,
            "8bit": linear / 1e9 + rest_gb,
            "4bit": linear * _BYTES_4BIT / 1e9 + rest_gb,
        },
        kv_gb_per_1k=config.num_hidden_layers * 2 * head * 2 * 1000 / 1e9,
        vision_gb=vision_gb,
        working_gb=working_gb,
        context=config.max_position_embeddings,
        problem=problem,
    )


def ways(need: Footprint, hardware: Hardware) -> list[Way]:
    """How it could run, best first: as stored on one device, spread, quantised, in main memory, from disk."""
    found = []
    for device in hardware.accelerators:
        found.append(_way(need, f"--device {device.device}", _named(device), "stored", device.memory_gb, 1))
    if len(hardware.accelerators) > 1:
        total = sum(device.memory_gb for device in hardware.accelerators)
        count = len(hardware.accelerators)
        found.append(_way(need, "--device spread", f"{count} devices ({total:.0f} GB)", "stored", total, count))
    for bits in ("8bit", "4bit"):
        for device in hardware.accelerators:
            flags = f"--device {device.device} --quantize {bits}"
            found.append(_way(need, flags, _named(device), bits, device.memory_gb, 1))
    memory = f"main memory ({hardware.memory_gb:.0f} GB)"
    if hardware.accelerators:
        everything = sum(device.memory_gb for device in hardware.accelerators) + hardware.memory_gb
        found.append(_way(need, "--device spread", f"devices and {memory}", "stored", everything, 2))
    found.append(_way(need, "--device cpu", memory, "stored", hardware.memory_gb, 1))
    for bits in ("8bit", "4bit"):
        found.append(_way(need, f"--device cpu --quantize {bits}", memory, bits, hardware.memory_gb, 1))
    largest = max([hardware.memory_gb, *(device.memory_gb for device in hardware.accelerators)])
    # Layer by layer from disk: two layers, embedding and head have to fit.
    held = need.weights_gb["stored"] * 0.1
    context = _room(need, held, largest)
    found.append(
        Way(
            flags="--offload FOLDER",
            place="a folder, read again for every token",
            weights_gb=need.weights_gb["stored"],
            context=context,
            works=context >= min(PICTURE_TOKENS, need.context),
        )
    )
    return found


def describe(need: Footprint, found: Sequence[Way]) -> str:
    """For people."""
    sizes = ", ".join(f"{name} {gb:.3g}" for name, gb in need.weights_gb.items())
    lines = [
        f"{'checkpoint':<14} {need.name}: {_count(need.parameters)} parameters, stored as {need.stored_as}",
        f"{'weights [GB]':<14} {sizes}",
        f"{'KV cache':<14} {need.kv_gb_per_1k:.3g} GB per 1,000 tokens of a sequence (16 bit); "
        f"guidance holds {_SEQUENCES}; context {need.context:,} tokens",
        f"{'vision':<14} {need.vision_gb:.3g} GB, and {need.working_gb:.2g} GB while it works on a megapixel",
    ]
    width = max(len(way.flags) for way in found)
    for way in found:
        fits = f"room for {way.context:,} tokens" if way.works else "does not fit"
        lines.append(f"  {way.flags:<{width}}  {way.weights_gb:6.3g} GB in {way.place}: {fits}")
    best = next((way for way in found if way.works), None)
    lines.append("-> nothing fits here" if best is None else f"-> {best.flags}")
    if need.problem:
        lines.append(f"-> {need.problem}")
    return "\n".join(lines)


def _way(need: Footprint, flags: str, place: str, form: str, memory_gb: float, devices: int) -> Way:
    context = _room(need, need.weights_gb[form] * (1 if devices == 1 else 1.03), memory_gb)
    return Way(
        flags=flags,
        place=place,
        weights_gb=need.weights_gb[form],
        context=context,
        works=context >= min(PICTURE_TOKENS, need.context),
    )


def _room(need: Footprint, held_gb: float, memory_gb: float) -> int:
    """Tokens whose keys and values fit beside the weights."""
    free = memory_gb * _USABLE - held_gb - need.vision_gb - need.working_gb
    return max(0, min(need.context, int(free / (_SEQUENCES * need.kv_gb_per_1k) * 1000)))


def _vision(folder: Path) -> tuple[float, float]:
    """Size of a vision tokenizer, and of its widest activations (four are held at once at full resolution) [GB]."""
    import torch

    config = read_ibq_config(folder)
    with torch.device("meta"):
        numbers = sum(weight.numel() for weight in IBQ(config).parameters())
    return numbers * 4 / 1e9, 4 * config.ch * IBQ.chunk_pixels / config.patch**2 * 4 / 1e9


def _expected_shapes(config: EmuConfig) -> dict[str, tuple[int, ...]]:
    import torch

    from emu_embodied.models.transformer import EmuForCausalLM

    with torch.device("meta"):
        model = EmuForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _format_of(content: dict[str, Any]) -> str:
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return names.get(str(content.get("dtype") or content.get("torch_dtype")), "BF16")


def _named(device: Accelerator) -> str:
    return f"{device.device}, {device.name} ({device.memory_gb:.0f} GB)"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
