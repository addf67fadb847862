"""Files that are either whole or absent: written beside their place and renamed into it.

Their modes follow the umask, whoever wrote them: safetensors' writer makes files that only their owner can read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file in the same folder (same suffix), then rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(aside)
        publish(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def publish(aside: Path, path: Path) -> None:
    """Rename a finished file to its place on the same disk, readable for whom the umask says."""
    fresh = path.with_name(f".{path.stem}.{os.getpid()}.mode.tmp")
    try:
        fresh.touch()
        os.chmod(aside, fresh.stat().st_mode)
    finally:
        fresh.unlink(missing_ok=True)
    os.replace(aside, path)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON; NaN is refused, because other readers refuse it too."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(Path(path), lambda aside: aside.write_text(text))
