"""``emu-embodied``: the composition root, and the one core file that may import the outer rooms (lazily).

Each subcommand is a dataclass whose fields are its flags; ``main`` parses one and runs it. User errors end in one line.
"""

from __future__ import annotations

import difflib
import json
import os
import signal
import sys
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import subcommand

from emu_embodied.cli_explore import Walk
from emu_embodied.cli_generate import Generate
from emu_embodied.cli_train import Device, Train, TrainDida, TrainTokenizer, TrainWorld

if TYPE_CHECKING:
    import numpy as np

    from emu_embodied.policies.registry import PolicySpec
    from emu_embodied.protocols import SubgoalModel
    from emu_embodied.world_model import WorldModel


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what this machine has (GL, devices, threads, versions, weights), and what to do about what is missing.

    With --checkpoint: how much memory one needs, and how it would run here; its weights are not read.
    """

    json: bool = False
    """Print JSON instead of text."""
    checkpoint: str | None = None
    """A shipped name, or a folder of ours or of Emu3.5's."""

    def run(self) -> int:
        """Probe and print; 1 if something that planning needs is missing, or the checkpoint does not fit."""
        from emu_embodied.doctor import examine, examine_checkpoint

        if self.checkpoint is not None:
            estimate = examine_checkpoint(self.checkpoint)
            print(json.dumps(estimate.to_dict(), indent=2) if self.json else estimate.text())
            return 0 if estimate.fits else 1
        report = examine()
        print(json.dumps(report.to_dict(), indent=2) if self.json else report.text())
        return 0 if report.healthy else 1


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Record episodes of scripted, noisy, random and playful behaviour (failures kept) into a dataset folder.

    Running it again with the same flags continues a run that was stopped.
    """

    env: str = ""
    """Environment id, or several with commas between."""
    suite: str = ""
    """All of a suite instead: panda, metaworld, pusht, fetch, ogbench, panda-gym."""
    episodes: int = 100
    """Episodes the dataset shall have."""
    out: Path
    """Dataset folder."""
    workers: int = 2
    """Processes; the bytes recorded do not depend on it."""
    seed: int = 0
    """Run seed. Small reset seeds stay free for evaluation."""
    image_size: int = 64
    """Side of a frame [pixels]; the preset `base` reads 128."""
    mixture: str = "expert=0.25,noisy=0.35,random=0.2,play=0.2"
    """Behaviours and their shares."""

    def run(self) -> int:
        """Collect."""
        from emu_embodied.data.collect import CollectConfig, collect
        from emu_embodied.envs.registry import make
        from emu_embodied.policies.behaviours import BEHAVIOURS
        from emu_embodied.provenance import make_meta, meta_dict

        config = CollectConfig(
            env=",".join(_env_ids(self.env, self.suite)),
            episodes=self.episodes,
            out=self.out,
            workers=self.workers,
            seed=self.seed,
            mixture=_shares(self.mixture),
        )
        simulators = partial(make, image_size=self.image_size)
        result = collect(config, simulators, BEHAVIOURS, meta=meta_dict(make_meta(seed=self.seed)))
        stored, name = len(result.store), result.store.data_hash[:16]
        print(f"{stored} episodes in {self.out} ({result.recorded} new), data hash {name}")
        for name, (solved, total) in sorted(result.success.items()):
            print(f"  {name}: {solved} of {total} episodes successful")
        return 0


def _env_ids(env: str, suite: str) -> list[str]:
    """The ids that ``--env`` names or ``--suite`` stands for, each of them known and installed."""
    from emu_embodied.envs.registry import check_env_id, suite_ids

    if bool(env) == bool(suite):
        raise ValueError("give --env or --suite, one of them")
    env_ids = [name.strip() for name in env.split(",")] if env else list(suite_ids(suite))
    for env_id in env_ids:
        check_env_id(env_id)
    return env_ids


def _shares(text: str) -> dict[str, float]:
    """``expert=0.5,play=0.5`` as a dictionary."""
    shares = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        try:
            shares[name.strip()] = float(share)
        except ValueError as error:
            raise ValueError(f"--mixture {text!r}: {part!r} is not behaviour=share, e.g. expert=0.5") from error
    return shares


@dataclass(frozen=True, kw_only=True)
class _Search:
    """Flags of everything that plans."""

    checkpoint: str = "nano"
    """A shipped name or a checkpoint folder."""
    planner: Literal["cem", "mppi", "shooting"] = "cem"
    """Solver of the imagined and true policies."""
    objective: str = "goal"
    """What plans are searched for: goal (the goal picture and place), or what the model predicts of the instruction:
    reward, success, or both of these."""
    samples: int | None = None
    """Candidate plans in an iteration."""
    iterations: int | None = None
    """Iterations of a decision."""
    horizon: int | None = None
    """Length of a plan [blocks]."""
    device: Device = "auto"
    """Where the world model runs."""

    def _spec(self, policy: str) -> PolicySpec:
        from emu_embodied.hardware import pick_device
        from emu_embodied.policies.registry import PlanningBudget, PolicySpec

        default = PlanningBudget()
        budget = replace(
            default,
            samples=default.samples if self.samples is None else self.samples,
            iterations=default.iterations if self.iterations is None else self.iterations,
            horizon=default.horizon if self.horizon is None else self.horizon,
        )
        return PolicySpec(
            name=policy,
            checkpoint=self.checkpoint,
            planner=self.planner,
            objective=self.objective,
            budget=budget,
            device=str(pick_device(self.device)),
        )


@dataclass(frozen=True, kw_only=True)
class Plan(_Search):
    """Plan and execute one episode; write a video (real | imagined), a figure and the result.

    Writes ``plan.mp4``, ``imagined_vs_real.png`` and ``result.json`` into --out.
    """

    env: str
    """Environment id."""
    policy: Literal["imagined", "shooting", "true"] = "imagined"
    """Where plans are tried out: in imagination, or (``true``) in the simulator itself."""
    subgoals: bool = False
    """Let the model say what to do next, in words and pictures, and plan to each picture in turn (instead of
    --objective); adds ``subgoals.png`` and ``subgoals.md``."""
    subgoal_model: Path | None = None
    """Folder of Emu3.5's own weights, to be asked instead of --checkpoint what to do next."""
    seed: int = 0
    """Reset seed of the environment, and of the planner."""
    out: Path
    """Folder for the results; refused if it holds an earlier result."""

    def run(self) -> int:
        """Plan, draw, and print the verdict."""
        from emu_embodied.envs.registry import check_env_id, make

        check_env_id(self.env)  # before anything that takes seconds to import
        from tqdm import tqdm

        from emu_embodied.policies.episode import run_episode
        from emu_embodied.policies.registry import check_fits, make_policy
        from emu_embodied.policies.subgoals import SubgoalPolicy
        from emu_embodied.provenance import make_meta
        from emu_embodied.records import Transition
        from emu_embodied.viz.report import write_plan_report
        from emu_embodied.world_model import WorldModel

        if (self.out / "result.json").exists():
            raise ValueError(f"{self.out} holds a result already: give another --out")
        if self.subgoal_model is not None and not self.subgoals:
            raise ValueError("--subgoal-model is for --subgoals: add it")
        if self.subgoals and self.policy == "shooting":
            raise ValueError("--subgoals is for the imagined and true policies; try --planner shooting")
        name = {"imagined": "subgoals", "true": "true_subgoals"}[self.policy] if self.subgoals else self.policy
        spec = self._spec(name)
        world = WorldModel.from_pretrained(self.checkpoint, device=spec.device) if spec.needs_model else None
        if world is None:
            simulator = make(self.env)
        else:
            simulator = make(self.env, image_size=world.config.image_size)
            check_fits(world, simulator)
        asked = None if world is None else self._asked(world, spec.device)
        policy = make_policy(spec, simulator, seed=self.seed, world_model=world, subgoal_model=asked, record=True)
        blocks = simulator.max_episode_steps // simulator.block
        with tqdm(total=blocks, desc="plan and act", unit="block") as progress:

            def count(transition: Transition) -> None:
                if isinstance(policy, SubgoalPolicy):
                    progress.set_postfix_str(policy.doing, refresh=False)
                progress.update()

            trace = run_episode(
                simulator,
                policy,
                seed=self.seed,
                env_id=self.env,
                policy_name=name,
                on_block=count,
            )
        simulator.close()
        data_hash = None if world is None else world.config.data_hash
        files = write_plan_report(trace, self.out, make_meta(seed=self.seed, data_hash=data_hash))
        for number, subgoal in enumerate(trace.subgoals, 1):
            print(f"  {number}. {subgoal.text}: {subgoal.outcome} after {subgoal.blocks} blocks")
        print(trace.verdict + (f"; {trace.ended}" if trace.ended else ""))
        for file in files:
            print(f"  {file}")
        return 0

    def _asked(self, world: WorldModel, device: str) -> SubgoalModel | None:
        """The model of ``--subgoal-model``."""
        if self.subgoal_model is None:
            return None
        from emu_embodied.interleaved import InterleavedModel
        from emu_embodied.prompted_subgoals import PromptedSubgoals

        model = InterleavedModel.from_pretrained(self.subgoal_model, device=device)
        return PromptedSubgoals(model, world.encode_frames, world.config.cameras[0])


@dataclass(frozen=True, kw_only=True)
class Bench(_Search):
    """Measure how often policies succeed: rows with Wilson 95 % intervals, as JSON and as a table.

    A file that exists is completed: rows of the same settings are kept, others are measured.
    """

    env: str = ""
    """Environment id, or several with commas between."""
    suite: str = ""
    """All of a suite instead: panda, metaworld, pusht, fetch, ogbench, panda-gym."""
    policy: str
    """random, scripted, shooting, imagined, true, subgoals or true_subgoals; or several with commas between."""
    episodes: int = 100
    """Episodes of a row."""
    seed: int = 0
    """First reset seed; the others follow."""
    workers: int = 2
    """Processes of one thread each."""
    json: Path
    """File for the rows."""

    def run(self) -> int:
        """Measure."""
        from emu_embodied.envs.registry import make
        from emu_embodied.policies.evaluate import bench, format_table, read_results, write_results
        from emu_embodied.provenance import make_meta
        from emu_embodied.world_config import WorldModelConfig, checkpoint_folder

        env_ids = _env_ids(self.env, self.suite)
        policies = [self._spec(name.strip()) for name in self.policy.split(",")]
        if self.episodes < 1:
            raise ValueError(f"--episodes is {self.episodes}, it has to be at least 1")
        kept = read_results(self.json) if self.json.exists() else []
        wanted = {(env_id, spec.name) for env_id in env_ids for spec in policies}
        others = [row for row in kept if (row.env, row.policy) not in wanted]
        data_hash, simulators = None, partial(make)
        if any(spec.needs_model for spec in policies):
            world = WorldModelConfig.load(checkpoint_folder(self.checkpoint) / "world.json")
            data_hash, simulators = world.data_hash, partial(make, image_size=world.image_size)
        meta = make_meta(seed=self.seed, data_hash=data_hash)
        rows = bench(
            env_ids,
            policies,
            episodes=self.episodes,
            seed=self.seed,
            make_simulator=simulators,
            workers=self.workers,
            kept=kept,
            on_row=lambda done: write_results(self.json, [*others, *done], meta),
        )
        write_results(self.json, [*others, *rows], meta)
        print(format_table([*others, *rows]))
        return 0


@dataclass(frozen=True, kw_only=True)
class Imagine:
    """Score imagination against the simulator, horizon by horizon, on fresh episodes; draw some of them.

    Writes the figures to --json, and ``imagine.png`` (real above imagined) into --out.
    """

    checkpoint: str = "nano"
    """A shipped name or a checkpoint folder."""
    env: str
    """Environment id."""
    episodes: int = 20
    """Episodes, of mixed behaviour, with seeds that no training run draws."""
    horizon: int = 10
    """Blocks imagined from each episode's start."""
    seed: int = 0
    """First reset seed."""
    decoding: Literal["default", "autoregressive", "dida"] = "default"
    """Which decoder; the checkpoint's own by default."""
    passes: int | None = None
    """Parallel passes of a state (dida); the checkpoint's own by default."""
    device: Device = "auto"
    """Where the world model runs."""
    json: Path
    """File for the figures."""
    out: Path
    """Folder for the picture."""

    def run(self) -> int:
        """Imagine and compare."""
        from emu_embodied.envs.registry import check_env_id, make

        check_env_id(self.env)  # before anything that takes seconds to import
        from emu_embodied.data.recording import record_episode
        from emu_embodied.files import write_json
        from emu_embodied.hardware import pick_device
        from emu_embodied.metrics.horizons import record_fresh, score_horizons
        from emu_embodied.policies.behaviours import BEHAVIOURS
        from emu_embodied.policies.registry import check_fits
        from emu_embodied.provenance import make_meta, meta_dict
        from emu_embodied.viz.horizons import draw_horizons
        from emu_embodied.world_model import WorldModel

        if self.horizon < 1 or self.episodes < 1:
            raise ValueError("--horizon and --episodes have to be at least 1")
        for written in (self.json, self.out / "imagine.png"):
            if written.exists():
                raise ValueError(f"{written} exists already: give another --json and --out")
        world = WorldModel.from_pretrained(self.checkpoint, device=str(pick_device(self.device)))
        own = world.config
        decoding = own.decoding if self.decoding == "default" else self.decoding
        passes = own.passes if self.passes is None else self.passes
        if decoding == "autoregressive" and self.passes is not None:
            raise ValueError("--passes is for parallel decoding: add --decoding dida")
        world = world.with_decoding(decoding, passes=passes, temperature=own.temperature)
        steps = world.block * self.horizon
        simulator = make(self.env, max_episode_steps=steps, image_size=world.config.image_size)
        check_fits(world, simulator)
        episodes = record_fresh(simulator, BEHAVIOURS, record_episode, self.env, self.episodes, self.seed)
        simulator.close()
        scores = score_horizons(world, episodes, self.horizon, seed=self.seed)
        meta = make_meta(seed=self.seed, data_hash=world.config.data_hash, decoding=decoding, passes=passes)
        write_json(self.json, {"per_horizon": [row.to_dict() for row in scores.rows], "meta": meta_dict(meta)})
        picture = draw_horizons(scores, self.out / "imagine.png")
        print(scores.table())
        print(f"  {self.json}\n  {picture}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Explore(Walk):
    """Explore a world that the model imagines: one instruction, one picture; or freely with --free.

    Instructions come from the terminal, a line each; an empty line ends. Writes what `generate` writes into --out.
    """

    def run(self) -> int:
        """Walk; an environment's camera is only looked at."""
        return self.walk(_camera_shows)


def _camera_shows(env_id: str, camera: str, seed: int) -> np.ndarray:
    """What a camera shows after a reset, at the size that Emu3.5 was tuned on for robots."""
    from emu_embodied.envs.registry import check_env_id, make

    check_env_id(env_id)
    simulator = make(env_id, image_size=512)
    try:
        simulator.reset(seed=seed)
        frames = simulator.observe().frames
    finally:
        simulator.close()
    if camera not in frames:
        raise ValueError(f"{env_id} has no camera {camera!r}{_nearest(camera, frames)}")
    return frames[camera]


def unknown_word(arguments: Sequence[str]) -> str | None:
    """What is wrong with a subcommand or flag that does not exist, with the nearest one that does."""
    table: dict[str, Any] = _SUBCOMMANDS
    words = list(arguments)
    while words and not words[0].startswith("-"):
        word = words.pop(0)
        if word not in table:
            return f"unknown subcommand {word!r}{_nearest(word, table)}"
        if not isinstance(table[word], dict):
            flags = {f"--{name.replace('_', '-')}" for name in table[word].__dataclass_fields__} | {"--help"}
            for flag in (word.split("=")[0] for word in words if word.startswith("--")):
                if flag.replace("_", "-") not in flags:
                    return f"unknown flag {flag}{_nearest(flag, flags)}"
            return None
        table = table[word]
    return None


def _nearest(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(known))}"


_SUBCOMMANDS: dict[str, Any] = {
    "doctor": Doctor,
    "collect": Collect,
    "train": {"tokenizer": TrainTokenizer, "world": TrainWorld, "dida": TrainDida},
    "plan": Plan,
    "bench": Bench,
    "imagine": Imagine,
    "generate": Generate,
    "explore": Explore,
}
Command = (
    Annotated[Doctor, subcommand("doctor")]
    | Annotated[Collect, subcommand("collect")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Imagine, subcommand("imagine")]
    | Annotated[Generate, subcommand("generate")]
    | Annotated[Explore, subcommand("explore")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse a command line and run it; user errors print one line and return 2."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may wait for a hub
    arguments = sys.argv[1:] if arguments is None else arguments
    if mistake := unknown_word(arguments):
        return _refuse(mistake)
    command = tyro.cli(
        Command,
        prog="emu-embodied",
        description="World models a robot can plan with: collect, train, imagine, plan, measure.",
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            return command.run()
    except (ValueError, ImportError, OSError) as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("emu-embodied: interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: object) -> None:
    """End as Ctrl-C does, so that worker processes are ended too."""
    raise KeyboardInterrupt


def _refuse(message: str) -> int:
    print(f"emu-embodied: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
