"""``meta.json`` of a checkpoint: where it comes from, one entry for each stage of its training."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.files import write_json
from emu_embodied.provenance import make_meta
from emu_embodied.train.loop import LoopConfig, LoopResult


def inherit_meta(source: Path, out: Path, stage: str = "dida") -> None:
    """Keep, in a checkpoint folder, where the checkpoint that it starts from came from.

    What the folder has of its own (an eye's stage) stays. If ``stage``, which runs now, ran before, its entry is
    renamed to ``<stage> before`` and so not overwritten. A folder in which it ran already is gone on with, and left
    alone.
    """
    own = json.loads((out / "meta.json").read_text()) if (out / "meta.json").exists() else {}
    if stage in own or not (source / "meta.json").exists() or source.resolve() == out.resolve():
        return
    stages = json.loads((source / "meta.json").read_text())
    if stage in stages:
        stages[f"{stage} before"] = stages.pop(stage)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "meta.json", {**stages, **own})


def inherit_tokenizer(source: Path, out: Path) -> None:
    """Keep, beside a model that is trained on another folder's vision tokenizer, where that came from."""
    own, others = (
        json.loads((folder / "meta.json").read_text()) if (folder / "meta.json").exists() else {}
        for folder in (out, source)
    )
    if "tokenizer" in others and "tokenizer" not in own:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "meta.json", {"tokenizer": others["tokenizer"], **own})


class _Trained(Protocol):
    """A dataclass of how a stage was trained."""

    @property
    def loop(self) -> LoopConfig: ...


def write_training_meta(out: Path, stage: str, config: _Trained, store: EpisodeStore, result: LoopResult) -> None:
    """Record where a checkpoint comes from in ``meta.json``, one entry for each stage.

    Args:
        out: checkpoint folder.
        stage: ``tokenizer``, ``world``, ``dida`` ...
        config: dataclass of how it was trained.
        store: dataset.
        result: how the run ended.
    """
    meta = make_meta(
        seed=config.loop.seed,
        data_hash=store.data_hash,
        config=asdict(cast(Any, config)),
        env_ids=list(store.spec.env_ids),
        episodes=len(store),
        steps=result.step,
        seconds=round(result.seconds),
        stopped=result.stopped,
        figures={name: value if math.isfinite(value) else None for name, value in result.logs.items()},
    )
    path = out / "meta.json"
    stages = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {**stages, stage: asdict(meta)})
