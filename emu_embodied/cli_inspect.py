"""``inspect`` and ``card``: what a checkpoint knows, and what is to be told of it. Part of the composition root."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emu_embodied.cli_train import Device


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Ask a checkpoint what it knows, on fresh episodes: probes of positions, tokenizer, heed of actions.

    Writes the figures to --json, and a picture of them beside it.
    """

    checkpoint: str = "nano"
    """A shipped name or a checkpoint folder."""
    env: str
    """Environment id."""
    episodes: int = 400
    """Episodes, of mixed behaviour, with seeds that no training run draws; probes are fitted on two thirds."""
    blocks: int = 4
    """Longest episode [blocks]."""
    horizon: int = 4
    """Blocks imagined."""
    scenes: int = 8
    """States from which plans are compared by their predicted reward; 0 leaves that out."""
    plans: int = 16
    """Plans of such a state."""
    seed: int = 0
    """First reset seed."""
    device: Device = "auto"
    """Where the world model runs."""
    json: Path
    """File for the figures; the picture has its name and the ending png."""

    def run(self) -> int:
        """Record, probe, print."""
        from emu_embodied.envs.registry import check_env_id, make

        check_env_id(self.env)  # before anything that takes seconds to import
        from emu_embodied.data.recording import record_episode
        from emu_embodied.files import write_json
        from emu_embodied.hardware import pick_device
        from emu_embodied.metrics.horizons import record_fresh
        from emu_embodied.metrics.inspection import inspect_world
        from emu_embodied.policies.behaviours import BEHAVIOURS
        from emu_embodied.policies.evaluate import weights_hash
        from emu_embodied.policies.registry import check_fits
        from emu_embodied.provenance import make_meta, meta_dict
        from emu_embodied.viz.inspection import draw_inspection
        from emu_embodied.world_model import WorldModel

        picture = self.json.with_suffix(".png")
        for written in (self.json, picture):
            if written.exists():
                raise ValueError(f"{written} exists already: give another --json")
        if not 1 <= self.horizon <= self.blocks:
            raise ValueError(f"--horizon is {self.horizon}, it has to be from 1 to the {self.blocks} of --blocks")
        world = WorldModel.from_pretrained(self.checkpoint, device=str(pick_device(self.device)))
        full = make(self.env, image_size=world.config.image_size)
        check_fits(world, full)
        budget = full.max_episode_steps
        full.close()
        steps = min(budget, world.block * self.blocks)
        simulator = make(self.env, max_episode_steps=steps, image_size=world.config.image_size)
        episodes = record_fresh(simulator, BEHAVIOURS, record_episode, self.env, self.episodes, self.seed)
        fields = (simulator.proprio_fields, simulator.object_fields)
        simulator.close()
        found = inspect_world(world, episodes, fields, self.horizon, seed=self.seed)
        content: dict[str, Any] = found.to_dict()
        plans = self._compare_plans(world)
        meta = make_meta(
            seed=self.seed,
            data_hash=world.config.data_hash,
            env=self.env,
            episodes=self.episodes,
            blocks=steps // world.block,
            horizon=self.horizon,
            weights=weights_hash(self.checkpoint),
        )
        write_json(self.json, {**content, "plans": plans, "meta": meta_dict(meta)})
        draw_inspection(found, f"{self.checkpoint}, {self.env}", picture)
        print(found.table())
        if plans is not None:
            print(f"predicted reward between plans of one state: r {_number(plans['correlation'])}; of random plans "
                  f"alone {_number(plans['within'].get('random'))}")  # fmt: skip
        print(f"  {self.json}\n  {picture}")
        return 0

    def _compare_plans(self, world: Any) -> dict[str, Any] | None:
        """``PlanScores`` of random and noisy plans, two blocks long."""
        from emu_embodied.envs.registry import make
        from emu_embodied.metrics.plans import record_scenes, score_plans
        from emu_embodied.policies.behaviours import BEHAVIOURS

        if not self.scenes:
            return None
        simulator = make(self.env, image_size=world.config.image_size)
        compared = {name: BEHAVIOURS[name] for name in ("random", "noisy")}
        scenes = record_scenes(
            simulator, compared, scenes=self.scenes, plans=self.plans, horizon=min(2, self.horizon), seed=self.seed
        )
        simulator.close()
        return score_plans(world, scenes, seed=self.seed).to_dict()


@dataclass(frozen=True, kw_only=True)
class Card:
    """Write MODEL_CARD.md into a checkpoint folder: data, hash, training, what was measured, limits, licence.

    Measurements given are kept in the folder (measured.json); those of other weights are refused.
    """

    checkpoint: str
    """A shipped name or a checkpoint folder."""
    inspect: str = ""
    """Files that `inspect` wrote, with commas between."""
    bench: str = ""
    """Files that `bench` wrote, with commas between."""

    def run(self) -> int:
        """Render and write."""
        from emu_embodied.model_card import write_card
        from emu_embodied.policies.evaluate import weights_hash
        from emu_embodied.world_config import checkpoint_folder

        folder = checkpoint_folder(self.checkpoint)
        inspections, benches = (
            [Path(name.strip()) for name in names.split(",") if name.strip()] for names in (self.inspect, self.bench)
        )
        print(f"  {write_card(folder, weights_hash(self.checkpoint), inspections, benches)}")
        return 0


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
