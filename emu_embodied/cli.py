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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import subcommand

from emu_embodied.cli_explore import Walk
from emu_embodied.cli_generate import Generate
from emu_embodied.cli_inspect import Card, Inspect
from emu_embodied.cli_plan import Bench, Plan, named_envs
from emu_embodied.cli_rl import RL
from emu_embodied.cli_train import (
    Device,
    Train,
    TrainDida,
    TrainEye,
    TrainPolicy,
    TrainReward,
    TrainTokenizer,
    TrainWorld,
)

if TYPE_CHECKING:
    import numpy as np


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
    """All of a suite instead: panda, metaworld, pusht, fetch, ogbench, panda-gym, libero-goal (-spatial, -10 ...)."""
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
    cameras: str = ""
    """Cameras to record, with commas between; all that the environment draws by default. The preset `nano` reads the
    first, and drawing is most of what recording costs."""
    mixture: str = "expert=0.25,noisy=0.35,random=0.2,play=0.2"
    """Behaviours and their shares."""
    pairs: Literal["all", "seen"] = "all"
    """`seen` leaves out the pairs of colour and side that the language test asks for (the Panda's own tasks)."""

    def run(self) -> int:
        """Collect."""
        from emu_embodied.data.collect import CollectConfig, collect
        from emu_embodied.envs.language import make_spoken
        from emu_embodied.envs.registry import make
        from emu_embodied.policies.behaviours import BEHAVIOURS
        from emu_embodied.provenance import make_meta, meta_dict

        config = CollectConfig(
            env=",".join(named_envs(self.env, self.suite)),
            episodes=self.episodes,
            out=self.out,
            workers=self.workers,
            seed=self.seed,
            mixture=_shares(self.mixture),
            variant="" if self.pairs == "all" else f"pairs {self.pairs}",
        )
        cameras: dict[str, Any] = (
            {"cameras": tuple(name.strip() for name in self.cameras.split(","))} if self.cameras else {}
        )
        maker = make if self.pairs == "all" else partial(make_spoken, pairs=self.pairs)
        simulators = partial(maker, image_size=self.image_size, **cameras)
        result = collect(config, simulators, BEHAVIOURS, meta=meta_dict(make_meta(seed=self.seed)))
        stored, name = len(result.store), result.store.data_hash[:16]
        print(f"{stored} episodes in {self.out} ({result.recorded} new), data hash {name}")
        for name, (solved, total) in sorted(result.success.items()):
            print(f"  {name}: {solved} of {total} episodes successful")
        return 0


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
    "train": {
        "tokenizer": TrainTokenizer,
        "eye": TrainEye,
        "reward": TrainReward,
        "world": TrainWorld,
        "dida": TrainDida,
        "policy": TrainPolicy,
    },
    "rl": RL,
    "plan": Plan,
    "bench": Bench,
    "imagine": Imagine,
    "inspect": Inspect,
    "card": Card,
    "generate": Generate,
    "explore": Explore,
}
Command = (
    Annotated[Doctor, subcommand("doctor")]
    | Annotated[Collect, subcommand("collect")]
    | Annotated[Train, subcommand("train")]
    | Annotated[RL, subcommand("rl")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Imagine, subcommand("imagine")]
    | Annotated[Inspect, subcommand("inspect")]
    | Annotated[Card, subcommand("card")]
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
