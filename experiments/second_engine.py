"""The model was trained in MuJoCo: what is it worth in PyBullet, and how much of the gap do 50 episodes there close?

The same tasks, robot and control in both engines; contact, friction and pictures differ. Measured in both: how often a
policy succeeds (beside planning in the true simulator and a random policy), and what imagination gets right. Then so
many episodes are collected in PyBullet, the checkpoint is adapted to them for a few minutes (as ``train dida --init``
does), and all of it is measured again. Cells are kept in ``second_engine.json``; the same command goes on where it was
stopped.

python -m emu_embodied.experiments.second_engine --checkpoint nano --tasks PandaReach,PandaPush --out results/engines
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from emu_embodied.data.collect import CollectConfig, collect
from emu_embodied.data.recording import record_episode
from emu_embodied.envs.registry import check_env_id, make
from emu_embodied.envs.subtasks import subtasks
from emu_embodied.experiments.cells import Cells, between, percent, write_markdown
from emu_embodied.hardware import pick_device
from emu_embodied.metrics.horizons import record_fresh, score_horizons
from emu_embodied.metrics.inspection import foretell, sensitivity
from emu_embodied.metrics.intervals import newcombe
from emu_embodied.metrics.probes import places
from emu_embodied.policies.behaviours import BEHAVIOURS
from emu_embodied.policies.evaluate import run_episodes, summarise, weights_hash
from emu_embodied.policies.registry import PlanningBudget, PolicySpec, check_fits
from emu_embodied.provenance import make_meta, meta_dict
from emu_embodied.train.adapt import train_dida
from emu_embodied.train.loop import LoopConfig
from emu_embodied.train.meta import inherit_meta
from emu_embodied.train.pretrain import WorldTraining
from emu_embodied.world_config import WorldModelConfig, checkpoint_folder
from emu_embodied.world_model import WorldModel

ENGINES = {"mujoco": "", "bullet": "Bullet"}
"""Engine -> what it adds to the id of a task."""
MODELLESS = ("random", "scripted", "true")
"""Policies that no adaptation changes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SecondEngine:
    """What to measure."""

    checkpoint: str = "nano"
    """A shipped name or a checkpoint folder, trained in MuJoCo."""
    tasks: str = "PandaReach,PandaPush"
    """Tasks, with commas between."""
    out: Path
    """Folder for ``second_engine.json``, ``.md``, the PyBullet data and the adapted checkpoint."""
    policies: str = "imagined,true,random"
    """Policies, with commas between."""
    objective: str = "goal"
    """What is planned for."""
    budget: PlanningBudget = field(default_factory=PlanningBudget)
    """What a search may cost."""
    episodes: int = 50
    """Episodes of a cell."""
    recorded: int = 20
    """Recorded episodes that imagination is compared with; 0 leaves that out."""
    horizon: int = 4
    """Blocks imagined."""
    collected: int = 50
    """PyBullet episodes for adaptation, of all tasks together; 0 leaves it out."""
    minutes: float = 5.0
    """Time for adaptation [min]."""
    training: WorldTraining = field(
        default_factory=lambda: WorldTraining(
            loop=LoopConfig(steps=20_000, learning_rate=3e-4, warmup_steps=20, ema_decay=0.99, threads=1),
            subgoal_share=0.0,
        )
    )
    """How it is adapted; ``minutes`` end it."""
    seed: int = 0
    """First reset seed of what is measured; collecting draws its own."""
    workers: int = 1
    """Processes."""
    device: str = "auto"
    """Where the model runs."""


def run(config: SecondEngine) -> list[dict[str, Any]]:
    """Measure, adapt, measure again: whatever is not there yet.

    Raises:
        ValueError: if the checkpoint does not fit a task, or was trained on PyBullet already.
    """
    tasks = [name.strip() for name in config.tasks.split(",")]
    env_ids = {engine: [f"{task}{suffix}-v0" for task in tasks] for engine, suffix in ENGINES.items()}
    for env_id in (name for names in env_ids.values() for name in names):
        check_env_id(env_id)
    world = WorldModelConfig.load(checkpoint_folder(config.checkpoint) / "world.json")
    if seen := set(world.env_ids) & set(env_ids["bullet"]):
        raise ValueError(
            f"{config.checkpoint} was trained on {', '.join(sorted(seen))}: give one that knows MuJoCo alone"
        )
    cells = Cells(config.out / "second_engine.json", seed=config.seed, data_hash=world.data_hash)
    rows = _measure(config, config.checkpoint, "as trained", env_ids, cells)
    if config.collected:
        adapted = adapt(config, env_ids["bullet"])
        rows += _measure(config, str(adapted), f"{config.collected} episodes of PyBullet", env_ids, cells)
    return rows


def adapt(config: SecondEngine, env_ids: list[str]) -> Path:
    """Collect in PyBullet and adapt the checkpoint; what is finished is not done again. Returns the new folder."""
    image_size = WorldModelConfig.load(checkpoint_folder(config.checkpoint) / "world.json").image_size
    data, out = config.out / "bullet", config.out / "adapted"
    if (out / "done").exists():
        return out
    found = collect(
        CollectConfig(
            env=",".join(env_ids), episodes=config.collected, out=data, workers=config.workers, seed=config.seed
        ),
        partial(make, image_size=image_size),
        BEHAVIOURS,
        meta=meta_dict(make_meta(seed=config.seed)),
    )
    world = WorldModel.from_pretrained(config.checkpoint, device=str(pick_device(config.device)))
    inherit_meta(checkpoint_folder(config.checkpoint), out)
    loop = replace(config.training.loop, max_minutes=config.minutes, device=config.device)
    result = train_dida(
        found.store,
        world,
        replace(config.training, loop=loop),
        out,
        resume=(out / "training").exists(),
        paths=world.config.paths or ("uniform",),
        subtasks=subtasks,
    )
    if result.stopped == "signal":
        raise KeyboardInterrupt
    (out / "done").touch()
    return out


def _measure(
    config: SecondEngine, checkpoint: str, state: str, env_ids: dict[str, list[str]], cells: Cells
) -> list[dict[str, Any]]:
    weights = weights_hash(checkpoint)
    image_size = WorldModelConfig.load(checkpoint_folder(checkpoint) / "world.json").image_size
    rows = []
    for engine, names in env_ids.items():
        for env_id in names:
            for policy in (name.strip() for name in config.policies.split(",")):
                if policy in MODELLESS and checkpoint != config.checkpoint:
                    continue
                spec = PolicySpec(
                    name=policy,
                    checkpoint=checkpoint,
                    objective=config.objective,
                    budget=config.budget,
                    device=str(pick_device(config.device)),
                )
                key = {"kind": "success", "engine": engine, "env": env_id, "policy": policy, "seed": config.seed}
                key |= {"episodes": config.episodes}
                if spec.needs_model:
                    key["weights"] = weights
                if spec.plans:
                    key |= {"objective": config.objective, "budget": asdict(config.budget)}
                simulators = partial(make, image_size=image_size)
                rows.append(cells.get(key, partial(_success, config, spec, env_id, simulators)) | {"state": state})
            if config.recorded:
                key = {"kind": "imagination", "engine": engine, "env": env_id, "weights": weights}
                key |= {"recorded": config.recorded, "horizon": config.horizon, "seed": config.seed}
                rows.append(cells.get(key, partial(_imagination, config, checkpoint, env_id)) | {"state": state})
    return rows


def _success(config: SecondEngine, spec: PolicySpec, env_id: str, simulators: Any) -> dict[str, Any]:
    results = run_episodes(
        env_id,
        spec.build,
        seeds=range(config.seed, config.seed + config.episodes),
        make_simulator=simulators,
        render=spec.looks,
        workers=config.workers,
        label=f"{env_id} {spec.name}",
    )
    row = asdict(summarise(env_id, spec.name, results))
    figures = {name: row[name] for name in ("success", "ci95", "return_mean")}
    return figures | {"successes": sum(result.success for result in results)}


def _imagination(config: SecondEngine, checkpoint: str, env_id: str) -> dict[str, Any]:
    """What imagination gets right, mean over horizons; the tokenizer's own picture of the engine beside it."""
    world = WorldModel.from_pretrained(checkpoint, device=str(pick_device(config.device)))
    steps = world.block * config.horizon
    simulator = make(env_id, max_episode_steps=steps, image_size=world.config.image_size)
    check_fits(world, simulator)
    episodes = record_fresh(simulator, BEHAVIOURS, record_episode, env_id, config.recorded, config.seed)
    robot, things = places(simulator.proprio_fields), places(simulator.object_fields)
    simulator.close()
    rows = score_horizons(world, episodes, config.horizon, seed=config.seed).rows
    ahead = foretell(world, episodes, config.horizon, robot[:1], things, seed=config.seed)
    names = ("psnr", "copy_last_psnr", "tokenizer_psnr", "token_accuracy", "copy_last_token_accuracy", "reward_corr")
    means = {name: _mean([getattr(row, name) for row in rows]) for name in names}
    return means | {"errors_cm": ahead[-1].errors, "action_sensitivity_db": sensitivity(ahead)}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def success_lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """One line for each task and policy: both engines, the gap, and for the adapted model what of it is closed."""
    found = {}
    for row in rows:
        key = row["key"]
        if key["kind"] == "success":
            task = key["env"].replace("Bullet", "")
            found[task, key["policy"], row["state"], key["engine"]] = row
    lines = []
    for (task, policy, state, engine), there in found.items():
        if engine != "bullet":
            continue
        home = found[task, policy, state, "mujoco"]
        count = there["key"]["episodes"]
        gap = newcombe(home["successes"], count, there["successes"], count)
        before = found.get((task, policy, "as trained", "bullet"), there)
        gained = ""
        if before is not there:
            change = newcombe(there["successes"], count, before["successes"], count)
            gained = f"{100 * (there['success'] - before['success']):+.0f} ({between(change)})"
        rates = [f"{percent(row['success'])} ({between(row['ci95'])})" for row in (home, there)]
        lost = f"{100 * (home['success'] - there['success']):+.0f} ({between(gap)})"
        lines.append([f"{task}, {policy}, {state}", *rates, lost, gained])
    return lines


def imagination_lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """One line for each environment and model."""
    lines = []
    for row in rows:
        if row["key"]["kind"] == "imagination":
            errors = ", ".join(f"{name} {error:.1f}" for name, error in row["errors_cm"].items())
            pictures = [f"{row[name]:.1f}" for name in ("psnr", "copy_last_psnr", "tokenizer_psnr")]
            reward = "-" if row["reward_corr"] is None else f"{row['reward_corr']:.2f}"
            lines.append([f"{row['key']['env']}, {row['state']}", *pictures, f"{row['token_accuracy']:.2f}", reward,
                          errors, f"{row['action_sensitivity_db']:.1f}"])  # fmt: skip
    return lines


def main(config: SecondEngine) -> None:
    """Run, print, write."""
    rows = run(config)
    print(
        write_markdown(
            config.out / "second_engine.md",
            "A model trained in MuJoCo, in PyBullet",
            ("task, policy, model", "MuJoCo", "PyBullet", "gap [points]", "gained in PyBullet [points]"),
            success_lines(rows),
            f"{config.episodes} episodes a cell from seed {config.seed}; intervals 95 %, Wilson and Newcombe. Adapted: "
            f"{config.collected} episodes, {config.minutes:g} min.",
        )
    )
    if config.recorded:
        header = ("environment, model", "PSNR [dB]", "copy", "tokenizer's ceiling", "tokens right", "reward r",
                  f"errors after {config.horizon} blocks [cm]", "action sensitivity [dB]")  # fmt: skip
        print(
            write_markdown(
                config.out / "imagination.md",
                "Imagination in both engines",
                header,
                imagination_lines(rows),
                f"{config.recorded} recorded episodes of mixed behaviour a row, means over {config.horizon} blocks.",
            )
        )


if __name__ == "__main__":
    main(tyro.cli(SecondEngine))
