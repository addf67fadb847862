"""The ``train`` subcommand: one dataclass of flags for each stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg, subcommand

if TYPE_CHECKING:
    from emu_embodied.train.loop import LoopConfig, LoopResult
    from emu_embodied.train.pretrain import WorldTraining

Device = Annotated[str, arg(metavar="{auto,cpu,cuda,cuda:N}")]


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """Flags that the training stages share."""

    preset: str = "nano"
    """Size: nano (a laptop's CPU; pusht and metaworld are nano with those suites' cameras and windows), small (one GPU,
    an hour), base (one GPU, a day); emu3.5 is only adapted."""
    data: Path
    """Dataset folder that `collect` made."""
    out: Path
    """Checkpoint folder. All stages but the last may share it; a stage that is there already needs --resume."""
    steps: int | None = None
    """Optimizer steps, over all calls; the stage's own number if left out."""
    max_minutes: float | None = None
    """Stop (with a decayed learning rate) after this time [min]."""
    resume: bool = False
    """Continue a run that was stopped."""
    seed: int = 0
    """Seed of weights, batches and noise."""
    batch: int | None = None
    """Batch size (frames, states, or windows of states); the stage's own if left out."""
    learning_rate: float | None = None
    """Peak learning rate; the stage's own if left out."""
    optimizer: Literal["adamw", "muon"] | None = None
    """``muon`` learns hidden matrices by Muon; the transformer's stages do unless told otherwise."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    device: Device = "auto"
    """Where to train."""

    def _loop(self, default: LoopConfig) -> LoopConfig:
        return replace(
            default,
            steps=default.steps if self.steps is None else self.steps,
            max_minutes=self.max_minutes,
            learning_rate=default.learning_rate if self.learning_rate is None else self.learning_rate,
            optimizer=default.optimizer if self.optimizer is None else self.optimizer,
            seed=self.seed,
            threads=self.threads,
            device=self.device,
        )

    def _report(self, result: LoopResult, success: str) -> int:
        if result.stopped == "signal":
            print(f"interrupted at step {result.step}: the same command with --resume goes on from there")
            return 130
        print(success)
        return 0


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer(_Stage):
    """Stage 1: frames to codes (IBQ), from the pixels of a dataset."""

    def run(self) -> int:
        """Train."""
        from emu_embodied.data.episodes import EpisodeStore
        from emu_embodied.presets import preset
        from emu_embodied.train.tokenizer import TokenizerTraining, train_tokenizer

        row = preset(self.preset)
        store = EpisodeStore.open(self.data)
        config = TokenizerTraining()
        config = replace(config, loop=self._loop(config.loop), batch=config.batch if self.batch is None else self.batch)
        _, result = train_tokenizer(store, row.ibq, row.cameras, config, self.out, resume=self.resume)
        return self._report(
            result,
            f"tokenizer in {self.out / 'tokenizer'}; next: "
            f"emu-embodied train world --data {self.data} --out {self.out}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainEye(_Stage):
    """Stage 2, where a dataset tells where things are: pictures and an instruction to the places of what it is about.

    A model that is trained with it writes these places into its token stream, foretells them, and plans by them
    (`--objective objects`). Without it the model knows pictures only.
    """

    def run(self) -> int:
        """Train."""
        from emu_embodied.data.episodes import EpisodeStore
        from emu_embodied.presets import preset
        from emu_embodied.train.eye import EyeTraining, train_eye

        row = preset(self.preset)
        store = EpisodeStore.open(self.data)
        config = EyeTraining()
        config = replace(config, loop=self._loop(config.loop), batch=config.batch if self.batch is None else self.batch)
        _, result = train_eye(store, row.cameras, row.image_size, config, self.out, resume=self.resume)
        return self._report(
            result,
            f"eye in {self.out / 'eye'}; next: emu-embodied train world --data {self.data} --out {self.out}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainReward(_Stage):
    """Beside the eye, on the same data: numbers of a state and an instruction to reward and success.

    A checkpoint that holds one judges imagined states by it (`--objective reward`); without it, reward is read out of
    the transformer. It takes a minute or two, at any time after the dataset is there.
    """

    def run(self) -> int:
        """Train."""
        from emu_embodied.data.episodes import EpisodeStore
        from emu_embodied.train.reward_model import RewardTraining, train_reward_model

        store = EpisodeStore.open(self.data)
        config = RewardTraining()
        config = replace(config, loop=self._loop(config.loop), batch=config.batch if self.batch is None else self.batch)
        _, result = train_reward_model(store, config, self.out, resume=self.resume)
        return self._report(result, f"reward model in {self.out / 'reward'}: checkpoints in {self.out} judge by it now")


@dataclass(frozen=True, kw_only=True)
class _WorldStage(_Stage):
    """Flags that the stages of the transformer share."""

    subgoal_share: float | None = None
    """Share of a batch's windows from which subtasks and their keyframes are learned; 0 leaves them out."""
    subgoal_steps: int | None = None
    """Subtasks in such a window; fewer make more windows in the same time."""

    def _training(self) -> WorldTraining:
        from emu_embodied.train.pretrain import WorldTraining

        default = WorldTraining()
        return replace(
            default,
            loop=self._loop(default.loop),
            batch=default.batch if self.batch is None else self.batch,
            subgoal_share=default.subgoal_share if self.subgoal_share is None else self.subgoal_share,
            subgoal_steps=default.subgoal_steps if self.subgoal_steps is None else self.subgoal_steps,
        )


@dataclass(frozen=True, kw_only=True)
class TrainWorld(_WorldStage):
    """Stage 3: the transformer, by next token over interleaved instruction, states and actions.

    If --out holds an eye, the places that it reads are part of every state.
    """

    tokenizer: Path | None = None
    """Folder of the vision tokenizer; by default the one in --out, else the shipped one of the same preset."""

    def run(self) -> int:
        """Train."""
        from emu_embodied.data.episodes import EpisodeStore
        from emu_embodied.envs.subtasks import subtasks
        from emu_embodied.presets import preset
        from emu_embodied.tokens.frames import IBQFrameTokenizer
        from emu_embodied.train.meta import inherit_tokenizer
        from emu_embodied.train.pretrain import train_world
        from emu_embodied.world_files import read_eye

        row = preset(self.preset)
        store = EpisodeStore.open(self.data)
        folder = self._tokenizer_folder()
        print(f"tokenizer: {folder}")
        frames = IBQFrameTokenizer.from_pretrained(folder)
        eye = read_eye(self.out)
        inherit_tokenizer(folder.parent, self.out)
        result = train_world(
            store, row, frames, self._training(), self.out, resume=self.resume, subtasks=subtasks, eye=eye
        )
        return self._report(result, f"world model in {self.out}; next: emu-embodied train dida --out {self.out}")

    def _tokenizer_folder(self) -> Path:
        from emu_embodied.world_config import WEIGHTS

        own = self.out / "tokenizer"
        if self.tokenizer is not None:
            if own.is_dir() and own.resolve() != self.tokenizer.resolve():
                raise ValueError(f"{own} exists already, --tokenizer names another: give another --out")
            return self.tokenizer
        for folder in (own, WEIGHTS / self.preset / "tokenizer"):
            if folder.is_dir():
                return folder
        raise ValueError(f"no tokenizer in {own}: run `emu-embodied train tokenizer --out {self.out}` first")


@dataclass(frozen=True, kw_only=True)
class TrainDida(_WorldStage):
    """Stage 4: discrete diffusion adaptation, after which a state is predicted in parallel.

    A model without an eye gets that of --out, if there is one.
    """

    init: str | None = None
    """Checkpoint to adapt: a folder or a shipped name; by default the one in --out, else the shipped one. One that is
    adapted already can be adapted further into a new --out, with the same or other noise."""
    path: str | None = None
    """Noise processes, comma-separated: uniform, metric, state_coupled, mask. Each noisy copy of a state draws one; the
    model then decodes with the first. By default those that the checkpoint was adapted with, else uniform."""
    own_steps: int = 0
    """In a quarter of the windows, states follow the model's own predictions instead of the data, so often in a row."""
    number_windows: int = 0
    """Windows of numbers alone in a batch, beside those of --batch: five times shorter, and imagined as much faster
    (bench --stream numbers). They need an eye."""
    distilled_windows: int = 0
    """Windows that the next-token model samples before training; half of every batch is then drawn from them."""

    def run(self) -> int:
        """Train."""
        from emu_embodied.data.episodes import EpisodeStore
        from emu_embodied.decode.paths import known_path
        from emu_embodied.envs.subtasks import subtasks
        from emu_embodied.presets import preset
        from emu_embodied.train.adapt import train_dida
        from emu_embodied.train.meta import inherit_meta
        from emu_embodied.world_config import checkpoint_folder
        from emu_embodied.world_files import read_eye
        from emu_embodied.world_model import WorldModel

        preset(self.preset)
        asked = tuple(known_path(name.strip()) for name in self.path.split(",")) if self.path is not None else ()
        store = EpisodeStore.open(self.data)
        inside = (self.out / "world.json").exists()
        if self.init is not None and inside and not self.resume and Path(self.init).resolve() != self.out.resolve():
            raise ValueError(f"{self.out} holds a world model already, --init names another: give another --out")
        source = self.init or (str(self.out) if inside else self.preset)
        world = WorldModel.from_pretrained(source)
        paths = asked or world.config.paths or ("uniform",)
        print(f"adapting: {source}, noise: {', '.join(paths)}")
        given = {name: getattr(self, name) for name in ("own_steps", "distilled_windows", "number_windows")}
        config, eye = replace(self._training(), **given), read_eye(self.out)
        if self.number_windows and world.eye is None and eye is None:
            raise ValueError(
                f"{source} has no eye, so --number-windows would teach nothing of the scene: train eye first"
            )
        inherit_meta(checkpoint_folder(source), self.out)
        result = train_dida(store, world, config, self.out, resume=self.resume, paths=paths, subtasks=subtasks, eye=eye)
        return self._report(
            result, f"adapted world model in {self.out}; next: emu-embodied plan --checkpoint {self.out}"
        )


@dataclass(frozen=True, kw_only=True)
class TrainPolicy(_Stage):
    """Stage 5: the policy role, by cloning the experts of a dataset; what it gives acts with `bench --policy token`.

    The world role is kept alive beside it (--world-weight), so that one checkpoint acts and imagines.
    """

    init: str | None = None
    """Checkpoint to start from: a folder or a shipped name; by default the shipped one of --preset."""
    env: str = ""
    """Imitate episodes of this environment only, or of several with commas between."""
    sources: str = "expert,noisy"
    """Behaviours that are imitated, comma-separated."""
    episodes: int | None = None
    """Imitate only the first so many episodes of each environment, for policies of chosen strength."""
    solved_only: bool = False
    """Imitate only episodes that end in success."""
    stream: Literal["pictures", "numbers"] = "pictures"
    """What a decision looks at: frames and numbers, or numbers alone, where the checkpoint knows that stream."""
    number_windows: int | None = None
    """Windows of numbers alone beside those of --world-windows; as many if left out, where the checkpoint knows
    them."""
    context_states: int | None = None
    """Latest states a decision looks at; 1 unless given."""
    world_windows: int | None = None
    """Windows of states in each batch that the world role is trained on; 0 lets it be forgotten."""
    world_weight: float | None = None
    """Weight of the world role's loss."""

    def run(self) -> int:
        """Train."""
        from emu_embodied.data.episodes import EpisodeStore
        from emu_embodied.presets import preset
        from emu_embodied.train.meta import inherit_meta
        from emu_embodied.train.policy import PolicyTraining, train_policy
        from emu_embodied.world_config import checkpoint_folder
        from emu_embodied.world_model import WorldModel

        preset(self.preset)
        store = EpisodeStore.open(self.data)
        source = self.init or self.preset
        folder = checkpoint_folder(source)
        if folder.resolve() == self.out.resolve():
            raise ValueError(f"--init and --out are the same folder {self.out}: give another --out")
        default = PolicyTraining()
        given: dict[str, Any] = {
            "batch": self.batch,
            "stream": self.stream,
            "context_states": self.context_states,
            "world_windows": self.world_windows,
            "world_weight": self.world_weight,
        }
        config = replace(
            default,
            loop=self._loop(default.loop),
            sources=_names(self.sources),
            env_ids=_names(self.env),
            episodes=self.episodes,
            solved_only=self.solved_only,
            **{name: value for name, value in given.items() if value is not None},
        )
        world = WorldModel.from_pretrained(source)
        world.with_stream(self.stream)  # what it does not know is refused before anything is written
        if "numbers" in world.config.streams:
            windows = config.world_windows if self.number_windows is None else self.number_windows
            config = replace(config, world=replace(config.world, number_windows=windows))
        elif self.number_windows:
            raise ValueError(f"{source} does not know the stream of numbers: `train dida --number-windows` teaches it")
        print(f"cloning {self.sources} into {source}")
        inherit_meta(folder, self.out, "policy")
        result = train_policy(store, world, config, self.out, resume=self.resume)
        return self._report(
            result, f"policy in {self.out}; next: emu-embodied bench --policy token --checkpoint {self.out}"
        )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one stage: tokenizer, eye, reward, world, dida, policy, in this order. All but the last may share --out."""

    stage: (
        Annotated[TrainTokenizer, subcommand("tokenizer")]
        | Annotated[TrainEye, subcommand("eye")]
        | Annotated[TrainReward, subcommand("reward")]
        | Annotated[TrainWorld, subcommand("world")]
        | Annotated[TrainDida, subcommand("dida")]
        | Annotated[TrainPolicy, subcommand("policy")]
    )

    def run(self) -> int:
        """Train the stage."""
        from emu_embodied.train.loop import TrainingFailed

        try:
            return self.stage.run()
        except TrainingFailed as error:
            raise ValueError(str(error)) from error
