"""Reinforce a checkpoint: puts a loop, the trainer and the files of a run together."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from emu_embodied.acting import Actor
from emu_embodied.data.recording import SimulatorFactory
from emu_embodied.files import write_json
from emu_embodied.provenance import make_meta
from emu_embodied.train import adapters
from emu_embodied.train.imagination_loop import ImaginationLoop, Sampling
from emu_embodied.train.imagined_loop import ImaginedConfig, ImaginedLoop
from emu_embodied.train.policy_loop import PolicyLoop
from emu_embodied.train.reinforce import Loop, Reference, RLConfig, RLResult, Trained, reinforce
from emu_embodied.train.simulators import open_crew
from emu_embodied.train.teacher_loop import MakeTeacher, TeacherLoop
from emu_embodied.world_model import WorldModel

LoopName = Literal["policy", "imagination", "imagined", "planner"]
"""``policy``: the policy on the simulator's verdict. ``imagination``: the world role on how true its next states are.
``imagined``: the policy inside imagination. ``planner``: what a teacher did and the simulator confirmed is imitated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RLSettings:
    """What is reinforced by what."""

    env_ids: tuple[str, ...]
    """Environments, in one batch."""
    loop: LoopName = "policy"
    """See ``LoopName``."""
    config: RLConfig = field(default_factory=RLConfig)
    """The trainer's."""
    sampling: Sampling = "dida"
    """Loop ``imagination``: how next states are drawn."""
    imagined: ImaginedConfig = field(default_factory=ImaginedConfig)
    """Loop ``imagined``."""
    teacher: str = ""
    """Loop ``planner``: what the teacher is, for the record."""

    def __post_init__(self) -> None:
        """Check names.

        Raises:
            ValueError: for no environment, or an unknown loop (with the nearest).
        """
        if not self.env_ids:
            raise ValueError("reinforcement needs an environment: give --env")
        known = get_args(LoopName)
        if self.loop not in known:
            near = difflib.get_close_matches(self.loop, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown loop {self.loop!r}: did you mean {near!r}? Known: {', '.join(known)}")

    def describe(self) -> dict[str, object]:
        """What has to be the same when a run is resumed, beside the trainer's."""
        return {
            "env_ids": list(self.env_ids),
            "loop": self.loop,
            "sampling": self.sampling,
            "imagined": asdict(self.imagined),
            "teacher": self.teacher,
        }


def train_rl(
    settings: RLSettings,
    world: WorldModel,
    simulators: SimulatorFactory,
    out: Path,
    *,
    resume: bool,
    start: str = "",
    imaginer: WorldModel | None = None,
    make_teacher: MakeTeacher | None = None,
    on_line: Callable[[dict[str, float]], None] | None = None,
) -> RLResult:
    """Reinforce a world model in place and keep it in ``out`` as a checkpoint.

    Args:
        settings: what and how.
        world: freshly loaded: a resumed run too begins with the weights that the KL is measured to.
        simulators: makes the simulator of an id; picklable if there are workers.
        out: the run's folder, see ``reinforce``. The model of loop ``imagined`` is kept in ``out/world``.
        resume: go on with the run there.
        start: the checkpoint that ``world`` was loaded from, for the record.
        imaginer: loop ``imagined``: the model to imagine in, another object than ``world``.
        make_teacher: loop ``planner``: makes the teacher of an episode.
        on_line: called with every line of the log.

    Raises:
        ValueError: if an environment is unknown or has no snapshot, weights cannot act, or ``out`` holds another run.
        TrainingFailed: see ``reinforce``.
    """
    config = settings.config
    actor = Actor(world)
    if settings.loop == "imagined" and imaginer is None:
        raise ValueError("loop imagined needs a world model to imagine in")
    if settings.loop == "planner" and make_teacher is None:
        raise ValueError("loop planner needs a teacher")
    without = None
    if config.lora_rank:
        adapters.attach(world.backbone, config.lora_rank, config.seed)
        without = partial(adapters.disabled, world.backbone)
    else:
        world.backbone.requires_grad_(True)
    policy = Trained({"policy": world.backbone})
    trained, refreshed = policy, settings.loop == "imagined" and settings.imagined.refresh_every > 0
    if imaginer is not None and refreshed:
        imaginer.backbone.requires_grad_(True)
        trained = Trained({"policy": world.backbone, "world": imaginer.backbone})
    reference = Reference(policy, without) if config.objective.kl_weight else None

    def save() -> None:
        with adapters.merged(world.backbone) if config.lora_rank else nullcontext():
            world.save_pretrained(out)
        if imaginer is not None and refreshed:
            imaginer.save_pretrained(out / "world")

    with ExitStack() as closing:
        last_frames = settings.loop in ("imagined", "imagination")
        crew = closing.enter_context(open_crew(simulators, config.workers, last_frames=last_frames))
        loop: Loop
        if settings.loop == "policy":
            loop = PolicyLoop(crew, actor, settings.env_ids, config)
        elif settings.loop == "imagination":
            loop = ImaginationLoop(crew, actor, settings.env_ids, config, settings.sampling)
        elif imaginer is not None and settings.loop == "imagined":
            loop = ImaginedLoop(crew, actor, imaginer, settings.env_ids, config, settings.imagined)
        else:
            assert make_teacher is not None
            loop = TeacherLoop(simulators, make_teacher, actor, settings.env_ids, config, closing)
        result = reinforce(
            loop, trained, config, out, reference=reference, resume=resume,
            describe=settings.describe() | {"start": start}, save=save, on_line=on_line,
        )  # fmt: skip
    _write_meta(out, settings, world, start, result)
    return result


def _write_meta(out: Path, settings: RLSettings, world: WorldModel, start: str, result: RLResult) -> None:
    path = out / "meta.json"
    stages = json.loads(path.read_text()) if path.exists() else {}
    if not (out / "world.json").exists():
        warnings.warn(f"nothing was learned yet: {out} holds no checkpoint", stacklevel=2)
    meta = make_meta(
        seed=settings.config.seed,
        data_hash=world.config.data_hash,
        start=start,
        config=asdict(settings),
        rollouts=result.rollouts,
        stopped=result.stopped,
        figures=result.last,
    )
    write_json(path, {**stages, "rl": asdict(meta)})
