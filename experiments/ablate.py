"""What is each part of training worth? One switch at a time, equal minutes from the same data, tokenizer and seed.

Every variant is trained by next token and then adapted (DiDA) into a folder of its own, and scored on fresh episodes:
by ``inspect``'s figures, by whether its predicted reward tells the better of two plans of one state, and by how often a
planner succeeds with it. Rows are kept in ``ablate.json`` as they come; the same command goes on where it was stopped,
within a variant too.

python -m emu_embodied.experiments.ablate --data runs/panda --tokenizer runs/nano/tokenizer --env PandaReach-v0 \
    --eye runs/eyes/eye --minutes 10 --out results/ablate
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from emu_embodied.data.batches import encode_dataset
from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.data.recording import record_episode
from emu_embodied.envs.registry import check_env_id, make
from emu_embodied.experiments.cells import Cells, between, percent, write_markdown
from emu_embodied.files import write_atomically
from emu_embodied.hardware import pick_device
from emu_embodied.metrics.horizons import record_fresh
from emu_embodied.metrics.inspection import inspect_world
from emu_embodied.metrics.plans import record_scenes, score_plans
from emu_embodied.models.checkpoints import read_config
from emu_embodied.models.eye import Eye
from emu_embodied.policies.behaviours import BEHAVIOURS
from emu_embodied.policies.evaluate import run_episodes, summarise, weights_hash
from emu_embodied.policies.registry import PlanningBudget, PolicySpec
from emu_embodied.presets import preset
from emu_embodied.tokens.frames import IBQFrameTokenizer
from emu_embodied.train.adapt import train_dida
from emu_embodied.train.loop import LoopConfig
from emu_embodied.train.pretrain import WorldTraining, train_world
from emu_embodied.world_model import WorldModel

Switch = Callable[[WorldTraining], WorldTraining]


def _weights(**changes: float) -> Switch:
    return lambda training: replace(training, weights=replace(training.weights, **changes))


def _training(**changes: Any) -> Switch:
    return lambda training: replace(training, **changes)


VARIANTS: dict[str, Switch] = {
    "as it is": lambda training: training,
    "another seed": lambda training: replace(training, loop=replace(training.loop, seed=training.loop.seed + 1)),
    "changed tokens weigh 1": _weights(changed=1.0),
    "no context noise": _training(context_noise=0.0),
    "own steps": _training(own_steps=2),
    "no objects": lambda training: training,  # it gets no eye
    "numbers as places": _training(changes=False),
    "AdamW": lambda training: replace(training, loop=replace(training.loop, optimizer="adamw", learning_rate=1.5e-3)),
    "one noise level a window": _training(async_times=False),
    "no pure noise": _training(source_share=0.0),
    "pure noise only": _training(source_share=1.0),
    "reward weighs 0.5": _weights(reward=0.5),
    "reward weighs 4": _weights(reward=4.0),
}
"""Name -> what is changed of the training. Another seed changes nothing: what it moves is chance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablate:
    """What to train and to score."""

    data: Path
    """Dataset folder."""
    tokenizer: Path
    """Folder of the vision tokenizer, the same for all."""
    eye: Path | None = None
    """Folder of an eye, the same for all; without it no variant knows of objects."""
    env: str
    """Environment id that is scored in, or several with commas between."""
    out: Path
    """Folder for ``ablate.json``, ``.csv``, ``.md`` and a checkpoint for each variant."""
    preset: str = "nano"
    """Size."""
    variants: str = ""
    """Names of ``VARIANTS``, with commas between; all if left out."""
    minutes: float = 10.0
    """Training time of a variant, both stages [min]."""
    next_token: float = 0.3
    """Share of it for the next-token stage."""
    training: WorldTraining = field(
        default_factory=lambda: WorldTraining(
            loop=LoopConfig(
                steps=100_000, learning_rate=1.5e-3, warmup_steps=100, ema_decay=0.995, eval_every=1000, threads=1
            ),
            subgoal_share=0.0,
        )
    )
    """What the switches are switches of."""
    path: str = "uniform"
    """Noise process of the adaptation."""
    episodes: int = 120
    """Episodes that are inspected; 0 leaves that out."""
    blocks: int = 6
    """Longest of them [blocks]."""
    horizon: int = 4
    """Blocks imagined."""
    scenes: int = 12
    """States whose plans are compared."""
    plans: int = 24
    """Plans of a state."""
    planned: int = 20
    """Planned episodes; 0 leaves planning out."""
    objective: str = "reward"
    """What is planned for."""
    budget: PlanningBudget = field(default_factory=PlanningBudget)
    """What a search may cost."""
    seed: int = 0
    """Seed of training."""
    eval_seed: int = 1000
    """First reset seed of what is scored."""
    device: str = "auto"
    """Where."""


def ablate(config: Ablate) -> list[dict[str, Any]]:
    """Train and score what is not there yet: one row for each variant and environment.

    Raises:
        ValueError: for an unknown variant or environment, or data that do not fit the preset.
    """
    names = [name.strip() for name in config.variants.split(",")] if config.variants else list(VARIANTS)
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"unknown variant {name!r}: choose of {', '.join(VARIANTS)}")
    env_ids = [name.strip() for name in config.env.split(",")]
    for env_id in env_ids:
        check_env_id(env_id)
    store = EpisodeStore.open(config.data)
    cells = Cells(config.out / "ablate.json", seed=config.seed, data_hash=store.data_hash)
    rows = []
    for name in tqdm(names, desc="variants", unit="variant"):
        folder = config.out / name.replace(" ", "_")
        training = VARIANTS[name](replace(config.training, loop=replace(config.training.loop, seed=config.seed)))
        key = {"variant": name, "data": store.data_hash, "preset": config.preset, "minutes": config.minutes}
        key |= {"next_token": config.next_token, "path": config.path, "training": asdict(training)}
        eye = None if name == "no objects" else config.eye
        key |= {
            "tokenizer": weights_hash(str(config.tokenizer)),
            "eye": None if eye is None else weights_hash(str(eye)),
        }
        trained = cells.get(key, partial(train_variant, config, training, eye, store, folder, key))
        for env_id in env_ids:
            scored = score(config, cells, {"variant": name, "env": env_id, "weights": trained["weights"]}, folder)
            rows.append({**trained, **scored, "variant": name, "env": env_id})
    return rows


def train_variant(
    config: Ablate, training: WorldTraining, eye: Path | None, store: EpisodeStore, folder: Path, key: dict[str, Any]
) -> dict[str, Any]:
    """Both stages; each goes on where it was stopped. Returns the weights' hash and how far training came.

    Raises:
        ValueError: if the folder holds what was trained in another way.
    """
    asked = json.dumps(key, indent=2)
    if (folder / "asked.json").exists() and (folder / "asked.json").read_text() != asked:
        raise ValueError(f"{folder} holds a variant that was trained in another way: give another --out")
    sees = None if eye is None else Eye.from_pretrained(eye)
    row = preset(config.preset)
    frames = IBQFrameTokenizer.from_pretrained(config.tokenizer)
    shares = {"world": config.next_token, "dida": 1 - config.next_token}
    codes = config.out / "tokens.safetensors"
    frames.ibq.to(pick_device(config.device))
    encode_dataset(store, frames, row.cameras, codes)  # once for all variants; each stage reads a copy
    for stage in shares:
        (folder / stage).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(codes, folder / stage / codes.name)
    write_atomically(folder / "asked.json", lambda aside: aside.write_text(asked))
    loops = {
        stage: replace(training.loop, max_minutes=config.minutes * share, device=config.device)
        for stage, share in shares.items()
    }
    first, second = (folder / stage for stage in shares)
    if not (first / "done").exists():
        one = replace(training, loop=loops["world"])
        result = train_world(store, row, frames, one, first, resume=(first / "training").exists(), eye=sees)
        _finished(first, result.stopped)
    if not (second / "done").exists():
        two = replace(training, loop=loops["dida"])
        world = WorldModel.from_pretrained(first)
        resume = (second / "training").exists()
        result = train_dida(store, world, two, second, resume=resume, paths=(config.path,))
        _finished(second, result.stopped)
    steps = {f"{stage}_steps": _steps(folder / stage, stage) for stage in shares}
    return {"weights": weights_hash(str(second)), **steps}


def _finished(folder: Path, stopped: str) -> None:
    if stopped == "signal":
        raise KeyboardInterrupt
    (folder / "done").touch()


def _steps(folder: Path, stage: str) -> int:
    return int(read_config(folder, "meta.json")[stage]["extra"]["steps"])


def score(config: Ablate, cells: Cells, variant: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a variant knows, how it tells plans apart, and what a planner makes of it: a cell each."""
    key = variant | {"eval_seed": config.eval_seed}
    checkpoint, env_id = folder / "dida", variant["env"]
    figures: dict[str, Any] = {}
    if config.episodes:
        asked = key | {name: getattr(config, name) for name in ("episodes", "blocks", "horizon")}
        figures |= cells.get(asked, partial(inspected, config, env_id, checkpoint))
    if config.scenes:
        asked = key | {"scenes": config.scenes, "plans": config.plans, "of_blocks": config.budget.horizon}
        figures |= cells.get(asked, partial(told_apart, config, env_id, checkpoint))
    if config.planned:
        asked = key | {"planned": config.planned, "objective": config.objective, "budget": asdict(config.budget)}
        figures |= cells.get(asked, partial(planned, config, env_id, checkpoint))
    return figures


def _load(config: Ablate, checkpoint: Path) -> WorldModel:
    return WorldModel.from_pretrained(checkpoint, device=str(pick_device(config.device)))


def inspected(config: Ablate, env_id: str, checkpoint: Path) -> dict[str, Any]:
    """``inspect``'s figures, of fresh episodes."""
    world = _load(config, checkpoint)
    simulator = make(env_id, max_episode_steps=world.block * config.blocks, image_size=world.config.image_size)
    episodes = record_fresh(simulator, BEHAVIOURS, record_episode, env_id, config.episodes, config.eval_seed)
    fields = (simulator.proprio_fields, simulator.object_fields)
    simulator.close()
    found = inspect_world(world, episodes, fields, config.horizon, seed=config.eval_seed)
    last = found.ahead[-1]
    figures: dict[str, Any] = {"action_sensitivity_db": found.sensitivity, "psnr": last.psnr}
    figures |= {f"{place}_error": error for place, error in last.errors.items()}
    figures |= {f"{place}_seen": error for place, error in found.ahead[0].errors.items() if place != found.gripper}
    for kind in ("hidden", "readout"):
        probe = found.score(kind, found.object)
        figures[f"object_from_{kind}"] = None if probe is None else probe.error
    return figures


def told_apart(config: Ablate, env_id: str, checkpoint: Path) -> dict[str, Any]:
    """Whether the predicted reward tells the better of plans of one state."""
    world = _load(config, checkpoint)
    simulator = make(env_id, image_size=world.config.image_size)
    compared = {name: BEHAVIOURS[name] for name in ("random", "noisy")}
    scenes = record_scenes(
        simulator,
        compared,
        scenes=config.scenes,
        plans=config.plans,
        horizon=config.budget.horizon,
        seed=config.eval_seed,
    )
    simulator.close()
    scores = score_plans(world, scenes, seed=config.eval_seed)
    figures: dict[str, Any] = {"plan_correlation": scores.correlation, "plan_gain": scores.gain}
    return figures | {"plan_correlation_random": scores.within.get("random")}


def planned(config: Ablate, env_id: str, checkpoint: Path) -> dict[str, Any]:
    """How often a planner succeeds."""
    spec = PolicySpec(
        name="imagined",
        checkpoint=str(checkpoint),
        objective=config.objective,
        budget=config.budget,
        device=str(pick_device(config.device)),
    )
    results = run_episodes(
        env_id,
        spec.build,
        seeds=range(config.eval_seed, config.eval_seed + config.planned),
        make_simulator=partial(make, image_size=_load(config, checkpoint).config.image_size),
        label=f"{checkpoint.parent.name} {env_id}",
    )
    row = summarise(env_id, "imagined", results)
    return {"success": row.success, "ci95": row.ci95}


COLUMNS = (
    ("action_sensitivity_db", "action sensitivity [dB]", ".1f"),
    ("psnr", "PSNR at the end [dB]", ".1f"),
    ("ee_error", "tool error [cm]", ".1f"),
    ("object_seen", "object seen [cm]", ".1f"),
    ("object_error", "object foretold [cm]", ".1f"),
    ("object_from_readout", "object, probe [cm]", ".1f"),
    ("plan_correlation_random", "r, random plans", ".2f"),
    ("plan_correlation", "r, plans", ".2f"),
)
"""Figure, title and format of the table's columns before success."""


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Lines for people."""
    lines = []
    for row in rows:
        cells = [f"{row['env']}, {row['variant']}", f"{row['world_steps']} + {row['dida_steps']}"]
        cells += ["-" if row.get(name) is None else format(row[name], how) for name, _, how in COLUMNS]
        cells.append(f"{percent(row['success'])} ({between(row['ci95'])})" if "success" in row else "-")
        lines.append(cells)
    return lines


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """All figures."""
    flat = [{name: value for name, value in row.items() if name != "key"} for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))

    def write(aside: Path) -> None:
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(flat)

    write_atomically(path, write)


def main(config: Ablate) -> None:
    """Ablate, print, write."""
    rows = ablate(config)
    write_csv(config.out / "ablate.csv", rows)
    header = ("variant", "steps", *(title for _, title, _ in COLUMNS), "planner's success")
    notes = (
        f"{config.minutes:g} min of training each ({config.preset}, {config.next_token:.0%} of it next token), one "
        f"seed: small differences are chance. {config.episodes} episodes inspected, {config.horizon} blocks ahead; "
        f"{config.planned} planned episodes by {config.objective}, seeds from {config.eval_seed}."
    )
    print(write_markdown(config.out / "ablate.md", "One switch at a time", header, table(rows), notes))


if __name__ == "__main__":
    main(tyro.cli(Ablate))
