"""Does the instruction decide? One policy in the same scenes, told the truth, the truth in new words, or another's.

Success with the scene's own instruction against that with one of another episode, and with one that names the other
thing (and the other side); beside it what new words cost, and pairs of colour and side that training never saw together
(if its data were recorded with ``collect --pairs seen``: ``--data`` looks). Cells are kept in ``language.json`` as they
come; the same command goes on where it was stopped.

python -m emu_embodied.experiments.language --checkpoint nano --env PandaReach-v0,PandaPush-v0 --objective reward \
    --episodes 50 --out results/language
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.envs.language import Pairs, Telling, make_spoken
from emu_embodied.envs.tasks import HELD_OUT_PAIRS
from emu_embodied.experiments.cells import Cells, between, percent, write_markdown
from emu_embodied.hardware import pick_device
from emu_embodied.metrics.intervals import newcombe
from emu_embodied.policies.evaluate import run_episodes, summarise, weights_hash
from emu_embodied.policies.registry import PlanningBudget, PolicySpec
from emu_embodied.world_config import WorldModelConfig, checkpoint_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """What to ask."""

    checkpoint: str = "nano"
    """A shipped name or a checkpoint folder."""
    env: str
    """Environment id of the Panda's own tasks, or several with commas between."""
    out: Path
    """Folder for ``language.json`` and ``language.md``."""
    policy: Literal["imagined", "token", "scripted", "true"] = "imagined"
    """Who is told; scripted and true do not listen, and show what that looks like."""
    objective: str = "reward"
    """What ``imagined`` searches for: reward, success, both or objects. A goal picture would tell all by itself."""
    budget: PlanningBudget = field(default_factory=PlanningBudget)
    """What its search may cost."""
    conditions: str = "as trained,new words,new pairs,both new,another's,the other thing"
    """Which to measure, with commas between; differences are taken from the first of them all."""
    episodes: int = 50
    """Episodes of a cell."""
    seed: int = 0
    """First reset seed."""
    workers: int = 1
    """Processes."""
    device: str = "auto"
    """Where the model runs."""
    data: Path | None = None
    """The dataset that the checkpoint was trained on, to see whether it left the pairs out."""


CONDITIONS: dict[str, tuple[Pairs, Telling]] = {
    "as trained": ("seen", "true"),
    "new words": ("seen", "rephrased"),
    "new pairs": ("held_out", "true"),
    "both new": ("held_out", "rephrased"),
    "another's": ("seen", "shuffled"),
    "the other thing": ("seen", "swapped"),
}
"""Name -> scenes and what is told in them. All of ``seen`` are the same scenes."""


def ask(config: Language) -> list[dict[str, Any]]:
    """Measure what is not measured yet: one cell for each environment and condition.

    Raises:
        ValueError: for an unknown environment, condition or policy.
    """
    chosen = [name.strip() for name in config.conditions.split(",")]
    for name in chosen:
        if name not in CONDITIONS:
            raise ValueError(f"unknown condition {name!r}: choose of {', '.join(CONDITIONS)}")
    env_ids = [name.strip() for name in config.env.split(",")]
    for env_id in env_ids:
        make_spoken(env_id, image_size=8, cameras=()).close()  # what cannot be told is refused before anything is run
    spec = PolicySpec(
        name=config.policy,
        checkpoint=config.checkpoint,
        objective=config.objective,
        budget=config.budget,
        device=str(pick_device(config.device)),
    )
    world = WorldModelConfig.load(checkpoint_folder(config.checkpoint) / "world.json")
    cells = Cells(config.out / "language.json", seed=config.seed, data_hash=world.data_hash)
    rows = []
    for env_id in env_ids:
        for condition in chosen:
            pairs, telling = CONDITIONS[condition]
            key = {"env": env_id, "condition": condition, "episodes": config.episodes, "seed": config.seed}
            key |= {"policy": config.policy}
            if spec.needs_model:
                key["weights"] = weights_hash(config.checkpoint)
            if spec.plans:
                key |= {"objective": config.objective, "budget": asdict(config.budget)}
            simulators = partial(make_spoken, pairs=pairs, telling=telling, image_size=world.image_size)
            rows.append(cells.get(key, partial(_cell, config, env_id, condition, spec, simulators)))
    return rows


def _cell(config: Language, env_id: str, condition: str, spec: PolicySpec, simulators: Any) -> dict[str, Any]:
    results = run_episodes(
        env_id,
        spec.build,
        seeds=range(config.seed, config.seed + config.episodes),
        make_simulator=simulators,
        render=spec.looks,
        workers=config.workers,
        label=f"{env_id}, {condition}",
    )
    row = asdict(summarise(env_id, spec.name, results))
    return {name: row[name] for name in ("success", "ci95", "return_mean", "seconds_per_action")} | {
        "successes": sum(result.success for result in results)
    }


def pairs_in(store: EpisodeStore) -> dict[str, int]:
    """How many episodes of a dataset are of pairs that it may have left out, and how many of others.

    The side is that of the goal in the first state, or where the instruction names one, that.
    """
    names = [name.name for name in store.spec.objects]
    counts: Counter[str] = Counter()
    for episode in store.iter_valid(frames=False):
        words = episode.instruction.replace(":", "").split()
        side = next((word for word in words if word in ("left", "right")), None)
        if side is None and "goal_y" in names:
            side = "left" if episode.objects_TO[0, names.index("goal_y")] < 0 else "right"
        held = any((word, side) in HELD_OUT_PAIRS for word in words)
        counts["unknown" if side is None else "held out" if held else "seen"] += 1
    return dict(counts)


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Lines for people: success, and its difference from the first condition of the environment."""
    lines = []
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = row["key"]
        base = first.setdefault(key["env"], row)
        gap = newcombe(row["successes"], key["episodes"], base["successes"], base["key"]["episodes"])
        difference = "" if row is base else f"{100 * (row['success'] - base['success']):+.0f} ({between(gap)})"
        lines.append(
            [f"{key['env']}, {key['condition']}", str(key["episodes"]), percent(row["success"]), between(row["ci95"]),
             difference]
        )  # fmt: skip
    return lines


def main(config: Language) -> None:
    """Ask, print, write."""
    rows = ask(config)
    pairs = ", ".join(f"{name} ({side})" for name, side in sorted(HELD_OUT_PAIRS))
    notes = f"New pairs are {pairs}; whether the training data left them out was not looked at (give --data)."
    if config.data is not None:
        counts = pairs_in(EpisodeStore.open(config.data))
        found = ", ".join(f"{count} of {name} pairs" for name, count in sorted(counts.items()))
        notes = f"New pairs are {pairs}; the training data hold {found} [episodes]."
    header = (f"{config.policy}, {config.checkpoint}", "episodes", "success", "95 % interval", "difference [points]")
    print(write_markdown(config.out / "language.md", "Does the instruction decide?", header, table(rows), notes))


if __name__ == "__main__":
    main(tyro.cli(Language))
