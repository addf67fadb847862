"""Checks of a checkpoint folder before memory is spent: only headers are read, and an error names the file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

Shapes = dict[str, tuple[int, ...]]
"""Tensor name -> shape."""
Header = dict[str, dict[str, Any]]
"""Tensor name -> its ``dtype``, ``shape`` and ``data_offsets``, as safetensors writes them."""


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Parse a folder's JSON configuration.

    Raises:
        ValueError: naming the folder or file, if it is absent or not a JSON object.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that holds {name} and the weights")
    path = folder / name
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{path} is missing, so {folder} is not a checkpoint folder (it holds: {found})")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); it is damaged or was only partly copied") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object of settings")
    return content


def read_header(path: Path) -> Header:
    """What a safetensors file holds, from its header alone; the file's size is checked against it.

    Raises:
        ValueError: naming the file, if it is absent, cut off or no safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    size = os.path.getsize(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise ValueError(f"{path} is not a safetensors file, or was cut off in its header ({size} bytes)")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for entry in header.values():
                tuple(entry["shape"])
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a safetensors file: its header cannot be read ({error})") from error
    if size != 8 + length + end:
        raise ValueError(
            f"{path} is cut off or damaged: {size} bytes, its header promises {8 + length + end}; copy it again"
        )
    return header


def read_shapes(path: Path) -> Shapes:
    """Names and shapes of a safetensors file; see ``read_header``.

    Raises:
        ValueError: naming the file, if it is absent, cut off or no safetensors file.
    """
    return {name: tuple(entry["shape"]) for name, entry in read_header(path).items()}


def read_folder_shapes(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Tensor name -> (file, shape) of a folder with ``model.safetensors`` or an index of shards.

    Raises:
        ValueError: naming the file, if one is absent, cut off, or does not hold what the index says.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise ValueError(f"{folder} holds no weights: neither model.safetensors nor {index.name}")
        return {name: (single, shape) for name, shape in read_shapes(single).items()}
    weight_map = read_config(folder, index.name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    tensors: dict[str, tuple[Path, tuple[int, ...]]] = {}
    missing = sorted({shard for shard in weight_map.values() if not (folder / shard).is_file()})
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of its shards, first {missing[0]}; finish the download")
    for shard in sorted(set(weight_map.values())):
        shapes = read_shapes(folder / shard)
        for name, owner in weight_map.items():
            if owner == shard and name not in shapes:
                raise ValueError(f"{folder / shard} does not hold {name}, which {index.name} says it does")
        tensors |= {name: (folder / shard, shape) for name, shape in shapes.items() if weight_map.get(name) == shard}
    return tensors


def compare_shapes(model: nn.Module, found: Mapping[str, tuple[Path, tuple[int, ...]]], where: Path) -> None:
    """Check that a folder's tensors are exactly those of a model (which may live on the meta device).

    Raises:
        ValueError: naming the first tensor that is missing, unknown or of another shape, and its file.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{where} lacks the tensor {name} {list(shape)}: weights of another model, or incomplete")
        path, stored = found[name]
        if stored != shape:
            raise ValueError(f"{path}: {name} has shape {list(stored)}, the configuration says {list(shape)}")
    foreign = sorted(found.keys() - expected.keys())
    if foreign:
        path = found[foreign[0]][0]
        raise ValueError(f"{path} holds {len(foreign)} tensors this model does not have, first {foreign[0]}")
