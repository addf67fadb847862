"""Where the pieces of an Emu3.5 checkpoint lie: the backbone, its text tokenizer and its vision tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from emu_embodied.models.checkpoints import read_config
from emu_embodied.models.config import EmuConfig
from emu_embodied.models.ibq import is_ibq_folder
from emu_embodied.tokens.text import TextTokenizer

_VISION = "the vision tokenizer (config.yaml + model.ckpt, or config.json + safetensors)"


@dataclass(frozen=True, slots=True)
class Folders:
    """The folders of one checkpoint.

    Attributes:
        backbone: ``config.json`` and weights.
        text: ``emu3.tiktoken``.
        vision: the vision tokenizer's configuration and weights.
    """

    backbone: Path
    text: Path
    vision: Path


def find_folders(folder: str | Path, *, vision: str | Path | None = None, text: str | Path | None = None) -> Folders:
    """Find the pieces by what they hold; their names do not matter.

    Args:
        folder: of the backbone; or one whose subfolders hold the backbone and the tokenizers.
        vision: folder of the vision tokenizer; None searches the backbone's folder, its subfolders and those beside it.
        text: folder of ``emu3.tiktoken``; None searches likewise.

    Raises:
        ValueError: if a piece is not there, or there are several, saying where was looked.
    """
    model = find_backbone(folder)
    return Folders(
        backbone=model,
        text=Path(text) if text else _find(f"the text tokenizer ({TextTokenizer.FILE})", model, _is_text),
        vision=Path(vision) if vision else find_vision(model),
    )


def find_backbone(folder: str | Path) -> Path:
    """The folder that holds a backbone: this one or one of its subfolders."""
    return _find("the backbone (a config.json of model_type 'Emu3')", Path(folder), _is_backbone, beside=False)


def find_vision(backbone: Path) -> Path:
    """The folder that holds a vision tokenizer: the backbone's, one of its subfolders, or one beside it."""
    return _find(_VISION, backbone, is_ibq_folder)


def _model_type(folder: Path) -> str | None:
    try:
        return read_config(folder).get("model_type")
    except ValueError:
        return None


def _is_backbone(folder: Path) -> bool:
    return _model_type(folder) == EmuConfig.model_type


def _is_text(folder: Path) -> bool:
    return (folder / TextTokenizer.FILE).is_file()


def _find(what: str, folder: Path, accept: Callable[[Path], bool], beside: bool = True) -> Path:
    """The one folder that ``accept`` accepts: ``folder``, else one of its subfolders, else one of those beside it."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder of an Emu3.5 checkpoint")
    places = {"in": [folder], "in the subfolders of": _subfolders(folder)}
    if beside:
        places["beside"] = _subfolders(folder.resolve().parent)
    for where, candidates in places.items():
        found = [candidate for candidate in candidates if accept(candidate)]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"{what} is not clear: {where} {folder} there are {names}; name the one to use")
        if found:
            return found[0]
    looked = ", ".join(f"{where} {folder}" for where in places)
    kind = _model_type(folder)
    other = f" {folder / 'config.json'} describes a {kind!r} model." if kind and kind != EmuConfig.model_type else ""
    raise ValueError(f"{what} was not found; looked {looked}.{other} Put it there or name its folder")


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []
