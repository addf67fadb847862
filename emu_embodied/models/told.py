"""A small network that is told an instruction, and its files: what the eye and the reward model have in common.

Shape letters: B batch, L bytes, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from emu_embodied.files import write_atomically, write_json
from emu_embodied.models.checkpoints import compare_shapes, read_config, read_folder_shapes
from emu_embodied.tokens.text import ByteTokenizer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class ToldNetwork(nn.Module):
    """Reads instructions as bytes, with two convolutions and a maximum over the places.

    Args:
        config: dataclass that ``config.json`` holds.
        text_length: bytes of an instruction that are read; what is longer is cut off.
        width: channels D.
    """

    kind: ClassVar[str]
    """What it is called: its folder in a checkpoint, and ``emu-embodied train <kind>``."""

    def __init__(self, config: DataclassInstance, text_length: int, width: int) -> None:
        super().__init__()
        self._config = config
        self._text_length = text_length
        self.bytes = nn.Embedding(ByteTokenizer.vocabulary_size, width)
        self.words = nn.ModuleList([nn.Conv1d(width, width, 5, padding=2) for _ in range(2)])

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.bytes.weight.device

    def told(self, text_BL: torch.Tensor) -> torch.Tensor:
        """Bytes int64 [B, L] -> [B, D]."""
        told: torch.Tensor = self.bytes(text_BL).transpose(1, 2)
        for words in self.words:
            told = F.silu(words(told))
        return told.amax(-1)

    def text(self, instructions: Sequence[str]) -> torch.Tensor:
        """Instructions -> int64 [B, text_length], zeros behind the shorter ones."""
        length, tokenizer = self._text_length, ByteTokenizer()
        rows = [tokenizer.encode(instruction)[:length] for instruction in instructions]
        return torch.tensor([row + [0] * (length - len(row)) for row in rows], device=self.device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, each whole or not at all."""
        folder = Path(folder)
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in self.state_dict().items()}
        write_atomically(folder / "model.safetensors", lambda aside: save_file(tensors, aside, {"format": "pt"}))
        write_json(folder / "config.json", {"model_type": f"emu_embodied_{self.kind}", **asdict(self._config)})

    @classmethod
    def _read(cls, folder: str | Path, device: torch.device | str, build: Callable[[dict[str, Any]], Self]) -> Self:
        """Read what ``save_pretrained`` wrote, given how a configuration is made of ``config.json``.

        Raises:
            ValueError: naming the file that is missing, damaged, or of another model.
        """
        folder = Path(folder)
        content = read_config(folder)
        if content.pop("model_type", None) != f"emu_embodied_{cls.kind}":
            raise ValueError(
                f"{folder / 'config.json'} describes no {cls.kind}: train one with `emu-embodied train {cls.kind}`"
            )
        try:
            network = build(content)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{folder / 'config.json'} describes no {cls.kind} that can be built: {error}") from error
        compare_shapes(network, read_folder_shapes(folder), folder)
        network.load_state_dict(load_file(folder / "model.safetensors"))
        return network.to(device).eval().requires_grad_(False)


def range_buffers(fields: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Middle and half of the range of some fields, float32 [len(fields)] each."""
    low, high = (torch.tensor([getattr(field, end) for field in fields]) for end in ("low", "high"))
    return (low + high) / 2, (high - low) / 2
