"""Is parallel decoding right? One set of weights, every way of decoding it, from token accuracy to planning success.

For next token and for every noise process x number of passes: what imagination gets right horizon by horizon, whether
it can tell the better of two plans of one state, how fast it is, and how often the planner that uses it succeeds. Rows
are kept in ``compare_decoding.json`` as they come; the same command goes on where it was stopped.

python -m emu_embodied.experiments.compare_decoding --checkpoint nano --env PandaReach-v0,PandaPush-v0 \
    --out results/compare_decoding
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from emu_embodied.data.recording import record_episode
from emu_embodied.decode.order import Order
from emu_embodied.envs.registry import check_env_id, make
from emu_embodied.experiments.decoding_figure import draw_decoding
from emu_embodied.experiments.decoding_rows import COMPARED, Row, Variant, format_rows, write_table
from emu_embodied.files import write_json
from emu_embodied.hardware import pick_device
from emu_embodied.metrics.horizons import record_fresh, score_horizons
from emu_embodied.metrics.plans import Scene, record_scenes, score_plans
from emu_embodied.policies.behaviours import BEHAVIOURS
from emu_embodied.policies.episode import EpisodeSimulator
from emu_embodied.policies.evaluate import run_episodes, summarise, weights_hash
from emu_embodied.policies.registry import PlanningBudget, PolicySpec, check_fits, make_policy
from emu_embodied.protocols import Policy
from emu_embodied.provenance import make_meta, meta_dict
from emu_embodied.records import Episode
from emu_embodied.world_model import WorldModel


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareDecoding:
    """What to compare."""

    checkpoint: str = "nano"
    """A shipped name or a checkpoint folder."""
    env: str
    """Environment id, or several with commas between."""
    out: Path
    """Folder for ``compare_decoding.json``, ``.csv`` and a figure for each environment."""
    paths: str | None = None
    """Noise processes, with commas between; all that the checkpoint was adapted with if left out."""
    passes: str = "1,2,4,8,16"
    """Parallel passes of a state, with commas between."""
    orders: str = "random"
    """What settles first when there are several passes: random, confidence, entropy; or several with commas between."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the most likely token."""
    source_noise: float = 0.0
    """Of ``state_coupled``: share of tokens that start from noise instead of the state before."""
    horizon: int = 4
    """Blocks imagined in the comparison with recorded episodes."""
    recorded: int = 12
    """Recorded episodes of mixed behaviour to compare imagination with [episodes]."""
    scenes: int = 10
    """States from which several plans are compared."""
    plans: int = 24
    """Plans of a scene: random ones and an expert's with noise, in turn."""
    episodes: int = 5
    """Planned episodes of a row, with the same seeds for all; 0 leaves planning out."""
    success_passes: str | None = None
    """Passes that episodes are planned with, with commas between, as these take longest; all if left out."""
    objective: str = "reward"
    """What plans are searched for: reward, success, both or goal."""
    samples: int = 32
    """Candidate plans in an iteration of the planner."""
    iterations: int = 2
    """Iterations of a decision."""
    plan_horizon: int = 2
    """Length of a plan [blocks]; also that of the plans of a scene."""
    seed: int = 0
    """First reset seed of everything that is recorded or planned."""
    workers: int = 1
    """Processes that plan episodes."""
    threads: int = 1
    """CPU threads of this process."""
    device: str = "auto"
    """Where the world model runs."""


@dataclass(frozen=True, slots=True)
class DecodedPolicy:
    """Makes the planner of an episode, in whichever process plans it."""

    spec: PolicySpec
    variant: Variant

    def __call__(self, simulator: EpisodeSimulator, seed: int) -> Policy:
        """The policy of one episode."""
        world = _decoded(self.spec.checkpoint, self.spec.device, self.variant)
        return make_policy(self.spec, simulator, seed=seed, world_model=world)


@lru_cache(maxsize=1)
def _decoded(checkpoint: str, device: str, variant: Variant) -> WorldModel:
    return variant.decoded(WorldModel.from_pretrained(checkpoint, device=device))


@dataclass(frozen=True, slots=True)
class Evidence:
    """What really happened in an environment, recorded once and compared with every way of decoding."""

    episodes: list[Episode]
    scenes: list[Scene]

    @classmethod
    def record(cls, env_id: str, world: WorldModel, config: CompareDecoding) -> Evidence:
        """Record episodes as long as the horizon, and plans of some states."""
        steps = world.block * config.horizon
        short = make(env_id, max_episode_steps=steps, image_size=world.config.image_size)
        check_fits(world, short)
        episodes = record_fresh(short, BEHAVIOURS, record_episode, env_id, config.recorded, config.seed)
        short.close()
        simulator = make(env_id, image_size=world.config.image_size)
        scenes = record_scenes(
            simulator,
            {name: BEHAVIOURS[name] for name in COMPARED},
            scenes=config.scenes,
            plans=config.plans,
            horizon=config.plan_horizon,
            seed=config.seed,
        )
        simulator.close()
        return cls(episodes, scenes)


def variants(config: CompareDecoding, adapted: Sequence[str]) -> list[Variant]:
    """Next token first, then every noise process x order x passes (one pass has no order).

    Raises:
        ValueError: if a number of passes is not positive.
    """
    names = [name.strip() for name in config.paths.split(",")] if config.paths is not None else list(adapted)
    orders: list[Any] = [order.strip() for order in config.orders.split(",")]
    found = [Variant("autoregressive", temperature=config.temperature)]
    for passes in _numbers(config.passes):
        for name in names:
            for order in orders if passes > 1 else orders[:1]:
                settles: Order = order if passes > 1 else "random"
                found.append(Variant(name, passes, settles, config.temperature, config.source_noise))
    return found


def _numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError(f"passes are {text}: each has to be at least 1")
    return values


def imagination_settings(config: CompareDecoding) -> dict[str, Any]:
    """What the figures of imagination depend on besides the way of decoding."""
    names = ("temperature", "source_noise", "horizon", "recorded", "scenes", "plans", "plan_horizon", "seed")
    return {"weights": weights_hash(config.checkpoint), **{name: getattr(config, name) for name in names}}


def compare(config: CompareDecoding) -> list[Row]:
    """Measure what is not measured yet; every row is saved as it comes.

    Raises:
        ValueError: if the checkpoint was not adapted with a path asked for, or does not fit an environment.
    """
    env_ids = [name.strip() for name in config.env.split(",")]
    for env_id in env_ids:
        check_env_id(env_id)
    world = WorldModel.from_pretrained(config.checkpoint, device=str(pick_device(config.device)))
    chosen = variants(config, world.config.paths)
    for variant in chosen:
        variant.decoded(world)  # what cannot be decoded is refused before anything is measured
    book = Book(config, world.config.data_hash)
    for env_id in env_ids:
        missing = [variant for variant in chosen if not book.has_imagination(env_id, variant)]
        if missing:
            evidence = Evidence.record(env_id, world, config)
            for variant in tqdm(missing, desc=f"imagine {env_id}", unit="decoding"):
                book.add(imagine(variant, world, env_id, evidence, config))
    for env_id in env_ids if config.episodes else []:
        for variant in tqdm(list(_planned(chosen, config)), desc=f"plan {env_id}", unit="decoding"):
            if not book.has_planning(env_id, variant):
                book.add_planning(env_id, variant, plan(variant, env_id, config, world.config.image_size))
    return [row for env_id in env_ids for variant in chosen if (row := book.find(env_id, variant))]


def imagine(variant: Variant, world: WorldModel, env_id: str, evidence: Evidence, config: CompareDecoding) -> Row:
    """The figures of imagination."""
    decoded = variant.decoded(world)
    horizons = score_horizons(decoded, evidence.episodes, config.horizon, seed=config.seed)
    plans = score_plans(decoded, evidence.scenes, seed=config.seed, label=variant.label)
    return Row(
        env=env_id,
        method=variant.method,
        passes=variant.passes,
        order=variant.order,
        per_horizon=[row.to_dict() for row in horizons.rows],
        plans=plans.to_dict(),
        settings=imagination_settings(config),
    )


def policy_spec(config: CompareDecoding) -> PolicySpec:
    """The planner that all ways of decoding are given to."""
    budget = PlanningBudget(samples=config.samples, iterations=config.iterations, horizon=config.plan_horizon)
    device = str(pick_device(config.device))
    return PolicySpec(
        name="imagined", checkpoint=config.checkpoint, objective=config.objective, budget=budget, device=device
    )


def plan(variant: Variant, env_id: str, config: CompareDecoding, image_size: int) -> dict[str, Any]:
    """How often the planner succeeds."""
    results = run_episodes(
        env_id,
        DecodedPolicy(policy_spec(config), variant),
        seeds=range(config.seed, config.seed + config.episodes),
        make_simulator=partial(make, image_size=image_size),
        workers=config.workers,
        label=variant.label,
    )
    return asdict(summarise(env_id, variant.label, results, planning_settings(config)))


def planning_settings(config: CompareDecoding) -> dict[str, Any]:
    """What a row's success depends on besides the way of decoding."""
    spec = policy_spec(config)
    return {
        "weights": weights_hash(config.checkpoint),
        "temperature": config.temperature,
        "source_noise": config.source_noise,
        "seed": config.seed,
        "objective": spec.objective,
        "planner": spec.planner,
        "budget": asdict(spec.budget),
    }


def _planned(chosen: Sequence[Variant], config: CompareDecoding) -> Iterator[Variant]:
    if config.success_passes is None:
        return iter(chosen)
    wanted = {0, *_numbers(config.success_passes)}
    return (variant for variant in chosen if variant.passes in wanted)


class Book:
    """The rows of a folder: read when it is opened, written whenever one is added.

    Raises:
        ValueError: if the folder holds a file of something else.
    """

    def __init__(self, config: CompareDecoding, data_hash: str) -> None:
        self.config = config
        self.folder = config.out
        self.file = config.out / "compare_decoding.json"
        self.meta = meta_dict(make_meta(seed=config.seed, data_hash=data_hash))
        self.rows: dict[tuple[str, str, int, str], Row] = {}
        self._imagination, self._planning = imagination_settings(config), planning_settings(config)
        if self.file.exists():
            try:
                rows = [Row(**row) for row in json.loads(self.file.read_text())["rows"]]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.file} holds no comparison ({error!r}); give another --out") from error
            self.rows = {(row.env, row.method, row.passes, row.order): row for row in rows}

    def find(self, env_id: str, variant: Variant) -> Row | None:
        """The row of a way of decoding, if it was measured with the present settings."""
        row = self.rows.get((env_id, variant.method, variant.passes, variant.order))
        return row if row is not None and row.settings == self._imagination else None

    def has_imagination(self, env_id: str, variant: Variant) -> bool:
        """Whether there is nothing left to imagine."""
        return self.find(env_id, variant) is not None

    def has_planning(self, env_id: str, variant: Variant) -> bool:
        """Whether as many episodes were planned as are asked for."""
        row = self.find(env_id, variant)
        planned = row.planning if row is not None else None
        return (
            planned is not None
            and planned["episodes"] == self.config.episodes
            and planned["settings"] == self._planning
        )

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows[row.env, row.method, row.passes, row.order] = row
        self._write()

    def add_planning(self, env_id: str, variant: Variant, planning: dict[str, Any]) -> None:
        """Keep what planning found."""
        row = self.find(env_id, variant)
        assert row is not None
        self.add(replace(row, planning=planning))

    def _write(self) -> None:
        write_json(self.file, {"rows": [asdict(row) for row in self.rows.values()], "meta": self.meta})


def main(config: CompareDecoding) -> None:
    """Compare, print the table, write CSV and figures."""
    torch.set_num_threads(config.threads)
    rows = compare(config)
    print(format_rows(rows))
    files = [config.out / "compare_decoding.csv"]
    write_table(files[0], rows)
    for env_id in dict.fromkeys(row.env for row in rows):
        summaries = [row.summary() for row in rows if row.env == env_id]
        files += draw_decoding(summaries, env_id, config.out / f"compare_decoding_{env_id}")
    for file in files:
        print(f"  {file}")


if __name__ == "__main__":
    main(tyro.cli(CompareDecoding))
