"""``rl``: reinforce a checkpoint by what a simulator says of it. Part of the composition root."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emu_embodied.cli_train import Device

if TYPE_CHECKING:
    from emu_embodied.train.rl import RLSettings
    from emu_embodied.train.teacher_loop import MakeTeacher
    from emu_embodied.world_model import WorldModel

# Large rounds, few and small steps: what was measured of larger ones stands in LOG.md.
_GRPO_PANDA: dict[str, Any] = {
    "rollouts": 1280, "group": 8, "groups": 16, "epochs": 1, "batch": 512, "discount": 0.7, "learning_rate": 1.5e-4,
    "kl_weight": 0.001,
}  # fmt: skip

RL_PRESETS: dict[str, dict[str, Any]] = {
    "grpo-panda-reach": {"env": "PandaReach-v0", **_GRPO_PANDA},
    "grpo-panda-push": {"env": "PandaPush-v0", **_GRPO_PANDA},
}
"""Name -> flags of ``rl``; those given on the command line win."""


@dataclass(frozen=True, kw_only=True)
class RL:
    """Reinforce a checkpoint's policy (or its imagination) by the verdict of a simulator: GRPO.

    Writes metrics.jsonl, a checkpoint that `bench --policy token` takes, and report.md with curves into --out. Running
    it again with --resume goes on, also with a larger budget.
    """

    preset: str = ""
    """A row of flags: grpo-panda-reach, grpo-panda-push; other flags win over it."""
    env: str | None = None
    """Environment id, or several with commas between: all of them in every batch."""
    checkpoint: str = "nano"
    """Where to start: a shipped name or a checkpoint folder."""
    out: Path
    """Folder of the run."""
    loop: Literal["policy", "imagination", "imagined", "planner"] = "policy"
    """What learns from what: the policy from real rollouts; the world role from how true its next states are; the
    policy from imagined rollouts; the policy from a teacher's episodes that the simulator confirmed."""
    rollouts: int | None = None
    """Budget of real rollouts, over all calls."""
    group: int | None = None
    """Rollouts from one restored state."""
    groups: int | None = None
    """Groups in a round."""
    epochs: int | None = None
    """How often a round is learned from."""
    batch: int | None = None
    """Decisions (or imagined states) in an optimizer step."""
    learning_rate: float | None = None
    """AdamW's rate."""
    kl_weight: float | None = None
    """Weight of the KL to the checkpoint one started from."""
    variant: Literal["grpo", "dapo", "dr_grpo"] | None = None
    """How advantages and tokens are weighed."""
    branch: Literal["episode", "block"] | None = None
    """Loop policy: groups of whole episodes, or of single blocks at every state of one."""
    discount: float | None = None
    """Credit each block with what came of it and after it, later gains discounted by this; else the end counts."""
    temperature: float | None = None
    """Of the draw of tokens in rollouts."""
    reward: str | None = None
    """Reward terms and weights, e.g. success=1,progress=0.5,time=0.2."""
    lora_rank: int | None = None
    """Train adapters of this rank instead of all weights (needs peft)."""
    sampling: Literal["dida", "autoregressive"] = "dida"
    """Loop imagination: how next states are drawn."""
    world: str | None = None
    """Loop imagined: the model to imagine in; --checkpoint if left out."""
    horizon: int | None = None
    """Loop imagined: blocks of an imagined rollout."""
    refresh_every: int | None = None
    """Loop imagined: rounds between refreshes of the model; 0 for none."""
    teacher: Literal["imagined", "true", "scripted"] = "imagined"
    """Loop planner: a planner in imagination, one in the true simulator, or the scripted expert."""
    objective: str = "goal"
    """Loop planner: what the teacher plans for."""
    max_minutes: float | None = None
    """Time budget of this call [min]."""
    workers: int | None = None
    """Processes that simulate; 0 for none but this one."""
    resume: bool = False
    """Go on with the run in --out."""
    report: bool = False
    """Only draw the report of the run in --out again."""
    seed: int = 0
    """Seed of everything."""
    device: Device = "auto"
    """Where the network computes."""

    def run(self) -> int:
        """Train, report."""
        from emu_embodied.viz.rl_report import write_report

        if self.report:
            print(f"report: {write_report(self.out)}")
            return 0
        settings = self.settings()
        from emu_embodied.train.loop import TrainingFailed

        try:
            return self._train(settings)
        except TrainingFailed as error:
            raise ValueError(str(error)) from error

    def settings(self) -> RLSettings:
        """What the flags say, over the preset's row.

        Raises:
            ValueError: for an unknown preset, environment, loop or reward term, or a number out of its range.
        """
        from emu_embodied.envs.registry import check_env_id

        row = self._row()
        asked = {**row, **{name: value for name in _NUMBERS if (value := getattr(self, name)) is not None}}
        env = self.env or row.get("env", "")
        env_ids = tuple(name.strip() for name in env.split(",") if name.strip())
        for env_id in env_ids:
            check_env_id(env_id)
        from emu_embodied.train.grpo import GRPOConfig
        from emu_embodied.train.imagined_loop import ImaginedConfig
        from emu_embodied.train.reinforce import RLConfig
        from emu_embodied.train.rewards import RewardConfig
        from emu_embodied.train.rl import RLSettings

        objective = {name: asked[name] for name in ("group", "kl_weight", "variant", "discount") if name in asked}
        trainer = {name: asked[name] for name in _TRAINER if name in asked}
        weights = self.reward or row.get("reward") or ("agreement=1" if self.loop == "imagination" else None)
        if weights is not None:
            trainer["reward"] = RewardConfig(weights=_weights(weights))
        imagined = {name: asked[name] for name in ("horizon", "refresh_every") if name in asked}
        return RLSettings(
            env_ids=env_ids,
            loop=self.loop,
            config=RLConfig(objective=GRPOConfig(**objective), max_minutes=self.max_minutes, seed=self.seed, **trainer),
            sampling=self.sampling,
            imagined=ImaginedConfig(**imagined),
            teacher=f"{self.teacher}, {self.objective}" if self.loop == "planner" else "",
        )

    def _row(self) -> dict[str, Any]:
        if not self.preset:
            return {}
        if self.preset not in RL_PRESETS:
            near = get_close_matches(self.preset, RL_PRESETS, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown preset {self.preset!r}: did you mean {near!r}? Known: {', '.join(RL_PRESETS)}")
        return RL_PRESETS[self.preset]

    def _train(self, settings: RLSettings) -> int:
        from emu_embodied.envs.registry import make
        from emu_embodied.hardware import pick_device
        from emu_embodied.policies.registry import check_fits
        from emu_embodied.train.meta import inherit_meta
        from emu_embodied.train.rl import train_rl
        from emu_embodied.viz.rl_report import write_report
        from emu_embodied.world_config import checkpoint_folder
        from emu_embodied.world_model import WorldModel

        device = str(pick_device(self.device))
        folder = checkpoint_folder(self.checkpoint)
        if folder.resolve() == self.out.resolve():
            raise ValueError(f"--out is --checkpoint ({self.out}): give another --out, the start is needed to resume")
        world = WorldModel.from_pretrained(self.checkpoint, device=device)
        simulators = partial(make, image_size=world.config.image_size, cameras=world.config.cameras)
        for env_id in settings.env_ids:
            simulator = simulators(env_id)
            try:
                check_fits(world, simulator)
            finally:
                simulator.close()
        imaginer = None
        if self.loop == "imagined":
            imaginer = WorldModel.from_pretrained(self.world or self.checkpoint, device=device)
            imaginer = imaginer.with_stream(world.config.policy_stream)  # it goes on from what the policy looks at
        inherit_meta(folder, self.out, "rl")
        progress = _Progress(settings.config.rollouts)
        result = train_rl(
            settings,
            world,
            simulators,
            self.out,
            resume=self.resume,
            start=self.checkpoint,
            imaginer=imaginer,
            make_teacher=self._teacher(world) if self.loop == "planner" else None,
            on_line=progress,
        )
        progress.close()
        if result.stopped == "signal":
            print(f"interrupted after {result.rollouts} rollouts: the same command with --resume goes on from there")
            return 130
        print(f"{result.rollouts} rollouts, {result.rounds} rounds: {result.why}; report: {write_report(self.out)}")
        env = ",".join(settings.env_ids)
        print(f"next: emu-embodied bench --env {env} --policy token --checkpoint {self.out} --json bench.json")
        return 0

    def _teacher(self, world: WorldModel) -> MakeTeacher:
        from emu_embodied.policies.registry import PolicySpec, make_policy
        from emu_embodied.world_model import WorldModel as Loaded

        spec = PolicySpec(name=self.teacher, checkpoint=self.checkpoint, objective=self.objective)
        # Not the one that learns: the teacher's imagination stays what it was.
        model = Loaded.from_pretrained(self.world or self.checkpoint, device=world.device) if spec.needs_model else None
        return lambda simulator, seed: make_policy(spec, simulator, seed=seed, world_model=model)


_TRAINER = (
    "rollouts", "groups", "epochs", "batch", "learning_rate", "temperature", "branch", "lora_rank", "workers",
)  # fmt: skip
_NUMBERS = (*_TRAINER, "group", "kl_weight", "variant", "discount", "horizon", "refresh_every")


def _weights(text: str) -> dict[str, float]:
    """``success=1,time=0.2`` as a dictionary."""
    weights = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            weights[name.strip()] = float(weight)
        except ValueError as error:
            raise ValueError(f"--reward {text!r}: {part!r} is not term=weight, e.g. success=1") from error
    return weights


class _Progress:
    """One line that tells success, reward terms, KL and the time left."""

    def __init__(self, rollouts: int) -> None:
        from tqdm import tqdm

        waits = 0.2 if sys.stderr.isatty() else 30  # a log file wants a line now and then, not a film
        self._bar = tqdm(total=rollouts, desc="rl", unit="rollout", dynamic_ncols=True, mininterval=waits)

    def __call__(self, line: dict[str, float]) -> None:
        shown = {"success": f"{100 * line['success']:.0f} %", "reward": f"{line['reward']:.2f}"}
        shown |= {name: f"{value:.1f}" for name, value in line.items() if name.startswith("reward/")}
        if "kl" in line:
            shown["kl"] = f"{line['kl']:.3f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(int(line["rollouts"]) - self._bar.n)

    def close(self) -> None:
        self._bar.close()
