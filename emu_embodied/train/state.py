"""Training state on disk: what a run needs to go on as if it had never stopped.

``state.json`` names the safetensors file that belongs to it and is renamed into place last, so a kill at any moment
leaves either the previous state or the new one, whole.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from emu_embodied.files import write_atomically, write_json

_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        seconds: training time so far, over all calls [s].
        smoothed: exponentially smoothed loss that the divergence guard watches, or None before its first step.
        best: lowest smoothed loss so far.
        bad_steps: steps in a row above the guard's threshold.
        describe: what has to be the same when the run is resumed (model, data, batch size, seed).
    """

    step: int = 0
    seconds: float = 0.0
    smoothed: float | None = None
    best: float | None = None
    bad_steps: int = 0
    describe: dict[str, Any] = field(default_factory=dict)


def save_state(
    folder: Path,
    progress: Progress,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor],
) -> None:
    """Write weights, optimizer moments and averaged weights, then the JSON that makes them the current state.

    Args:
        folder: e.g. ``out/training/world``.
        progress: step, time and the divergence guard's memory.
        module: the trained module; its parameters and persistent buffers are stored.
        optimizer: its per-parameter moments are stored under the parameters' names.
        average: parameter name -> averaged weights; empty without averaging.
    """
    tensors = {f"module.{name}": tensor for name, tensor in _own_tensors(module).items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.items()}
    for name, parameter in module.named_parameters():
        moments = optimizer.state.get(parameter, {})
        tensors |= {f"{moment}.{name}": moments[moment] for moment in (*_MOMENTS, "step") if moment in moments}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    file = f"state-{progress.step:08d}.safetensors"
    write_atomically(folder / file, lambda aside: save_file(tensors, aside))
    write_json(folder / "state.json", {"file": file, **asdict(progress)})
    for old in folder.glob("state-*.safetensors"):
        if old.name != file:
            old.unlink()


def has_state(folder: Path) -> bool:
    """Whether ``folder`` holds a training state that can be resumed."""
    return (folder / "state.json").exists()


def load_state(
    folder: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor],
    describe: dict[str, Any],
) -> Progress:
    """Fill module, optimizer and averages in place from a stored state.

    Raises:
        ValueError: if the files are damaged or incomplete, or the state was trained with another ``describe``.
    """
    progress, tensors = _read(folder)
    expected = json.loads(json.dumps(describe))
    for key in sorted(expected.keys() | progress.describe.keys()):
        if expected.get(key) != progress.describe.get(key):
            raise ValueError(
                f"{folder} was trained with {key} = {progress.describe.get(key)!r}, now it is {expected.get(key)!r}: "
                "resume with the same value or train into another --out"
            )
    own = _own_tensors(module)
    wanted = {f"module.{name}" for name in own} | {f"average.{name}" for name in average}
    if missing := sorted(wanted - tensors.keys()):
        raise ValueError(f"{folder}: the training state lacks {missing[0]} ({len(missing)} tensors); train afresh")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(_shaped(folder, tensors, f"module.{name}", tensor))
        for name, tensor in average.items():
            tensor.copy_(_shaped(folder, tensors, f"average.{name}", tensor))
    for name, parameter in module.named_parameters():
        stored = [moment for moment in _MOMENTS if f"{moment}.{name}" in tensors]
        if not stored:
            continue
        # The fused optimizer walks through memory: its moments need the parameter's own layout (channels last or not).
        optimizer.state[parameter] = {
            moment: torch.empty_like(parameter, requires_grad=False).copy_(tensors[f"{moment}.{name}"])
            for moment in stored
        }
        if f"step.{name}" in tensors:
            optimizer.state[parameter]["step"] = tensors[f"step.{name}"].to(parameter.device)
    return progress


def _read(folder: Path) -> tuple[Progress, dict[str, torch.Tensor]]:
    path = folder / "state.json"
    try:
        content = json.loads(path.read_text())
        file = folder / Path(content.pop("file")).name
        progress = Progress(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a training state ({error}): delete {folder} and train afresh") from error
    try:
        return progress, load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is missing or damaged ({error}): delete {folder} and train afresh") from error


def _own_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters (tied ones once) and persistent buffers."""
    parameters: dict[str, torch.Tensor] = dict(module.named_parameters())
    every_name = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    state = module.state_dict(keep_vars=True)
    return parameters | {name: tensor for name, tensor in state.items() if name not in every_name}


def _shaped(folder: Path, tensors: dict[str, torch.Tensor], name: str, like: torch.Tensor) -> torch.Tensor:
    if tensors[name].shape != like.shape:
        raise ValueError(
            f"{folder}: {name} has shape {tuple(tensors[name].shape)}, the model needs {tuple(like.shape)}; "
            "train into another --out"
        )
    return tensors[name]
