"""What a world-model checkpoint says of itself (``world.json``), and where checkpoints are found."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emu_embodied.decode.order import Order, check_order
from emu_embodied.decode.paths import known_path
from emu_embodied.models.checkpoints import read_config
from emu_embodied.records import Field, Stream
from emu_embodied.tokens.image_format import ImageFormat
from emu_embodied.tokens.sequence import SequenceLayout
from emu_embodied.tokens.text import ByteTokenizer
from emu_embodied.tokens.vocabulary import Vocabulary

WEIGHTS = Path(__file__).resolve().parent / "weights"
"""Checkpoints that ship inside the package, one folder each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldModelConfig:
    """What a checkpoint was trained for: the embodiment, the token stream and the decoding (``world.json``)."""

    env_ids: tuple[str, ...]
    """Environments in the training data."""
    data_hash: str
    """Identifies the training data."""
    cameras: tuple[str, ...]
    """Cameras whose frames are tokens, in order."""
    image_size: int
    """Side of a frame [pixels]."""
    camera_tokens: int
    """Codes of one frame."""
    codebook: int
    """Number of codes."""
    block: int
    """Env steps in an action block [control steps]."""
    action_dim: int
    """Action dimensions."""
    proprio: tuple[Field, ...]
    """Proprio fields with the range that the data covers."""
    text_length: int
    """Longest instruction [bytes; with Emu3.5's ids, tokens]."""
    action_bins: int
    """Bins of an action dimension."""
    state_bins: int
    """Bins of a proprio field."""
    reward_bins: int
    """Bins of the reward."""
    context_states: int
    """Observed states kept when the window is full [states]."""
    max_states: int
    """States in a training window [states]."""
    tokens: Literal["compact", "emu3.5"] = "compact"
    """Ids and image blocks: ours, or those of BAAI's released model."""
    paths: tuple[str, ...] = ()
    """Noise processes that the weights were adapted with (DiDA), the first is decoded with; none: next-token decoding
    only."""
    objects: tuple[Field, ...] = ()
    """What the model says of the things that the task is about, with the range that the data covers. Nobody tells it
    where they are: it reads that out of a frame, writes it behind the proprio bins of a state, and foretells it with
    the rest of the state."""
    changes: bool = False
    """Proprio and objects are read out as moves from the state before: a model that knows nothing yet then says that
    they stay, and what it has to learn is what the action does."""
    streams: tuple[Stream, ...] = ("pictures",)
    """Streams that the weights were trained on. Numbers alone are some five times shorter; they can say what matters of
    a state where an eye reads the objects' places."""
    stream: Stream = "pictures"
    """Which of them the world role reads and imagines, unless another is asked for."""
    policy_stream: Stream = "pictures"
    """Which of them the policy role was cloned on."""
    subgoals: int = 0
    """Subtasks in a window of the planner's role that the weights were trained on [subtasks]; 0: they know none."""
    policy_states: int = 1
    """Latest states that a decision of the policy role looks at [states]."""
    decoding: Literal["autoregressive", "dida"] = "autoregressive"
    """Decoder used unless another is asked for."""
    passes: int = 1
    """Parallel passes a state (DiDA)."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the most likely token."""
    order: Order = "random"
    """Which tokens settle first when there are several passes (DiDA)."""
    time_shift: float = 1.0
    """Above 1 the passes stay longer near noise (DiDA)."""
    source_noise: float = 0.0
    """Decoding with ``state_coupled``: share of tokens that start from noise instead of the state before, in [0, 1]."""
    entropy_bound: float = 1.0
    """Tokens whose entropies sum up to it settle together in the order ``entropy`` (DiDA) [nats]."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: naming the field and its range.
        """
        for name in ("image_size", "camera_tokens", "codebook", "block", "action_dim", "text_length", "action_bins"):
            _check_count(name, getattr(self, name), 1)
        for name in ("state_bins", "reward_bins", "context_states", "passes"):
            _check_count(name, getattr(self, name), 1)
        _check_count("max_states", self.max_states, self.context_states + 1)
        if not self.cameras or not self.proprio:
            raise ValueError("a world model reads at least one camera and one proprio field")
        if self.tokens not in ("compact", "emu3.5"):
            raise ValueError(f"tokens is {self.tokens!r}, choose compact or emu3.5")
        if self.decoding not in ("autoregressive", "dida"):
            raise ValueError(f"decoding is {self.decoding!r}, choose autoregressive or dida")
        for name in self.paths:
            known_path(name)
        if unknown := {self.stream, self.policy_stream} - set(self.streams):
            raise ValueError(
                f"these weights know the stream of {' and of '.join(self.streams)}, not of {unknown.pop()}: train them "
                "on it (`emu-embodied train dida --number-windows`)"
            )
        if "numbers" in self.streams and (not self.objects or self.tokens != "compact"):
            raise ValueError("numbers alone say nothing of a scene without objects: train an eye first (train eye)")
        _check_count("subgoals", self.subgoals, 0)
        _check_count("policy_states", self.policy_states, 1)
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}, it has to be at least 0")
        if not 0 <= self.source_noise <= 1:
            raise ValueError(f"source_noise is {self.source_noise}, it has to lie in [0, 1]")
        check_order(self.order, self.time_shift, self.entropy_bound)

    @property
    def layout(self) -> SequenceLayout:
        """Where everything stands in the token stream; that of numbers has pictures without codes."""
        bins = {"action": self.action_bins, "state": self.state_bins, "reward": self.reward_bins}
        if self.tokens == "emu3.5":
            vocabulary = Vocabulary.emu35(vision=self.codebook, **bins)
        else:
            vocabulary = Vocabulary.compact(text=ByteTokenizer.vocabulary_size, vision=self.codebook, **bins)
        return SequenceLayout(
            vocabulary=vocabulary,
            text_length=self.text_length,
            cameras=self.cameras,
            camera_tokens=self.camera_tokens if self.stream == "pictures" else 0,
            num_proprio=len(self.proprio) + len(self.objects),
            action_dim=self.action_dim,
            image=ImageFormat.emu35(self.camera_tokens) if self.tokens == "emu3.5" else None,
            changes=self.changes,
        )

    @classmethod
    def load(cls, path: Path) -> WorldModelConfig:
        """Read ``world.json``.

        Raises:
            ValueError: if the file is missing, is not JSON or is not a world model's.
        """
        if not path.is_file():
            raise ValueError(f"{path.parent} is no world-model checkpoint: {path.name} is missing")
        raw = read_config(path.parent, path.name)
        try:
            for name in ("proprio", "objects"):
                raw[name] = [Field(**field) for field in raw.get(name, ())]
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
            return cls(**values)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} does not describe a world model: {error}") from error


def shipped() -> tuple[str, ...]:
    """Names of the checkpoints inside the package."""
    return tuple(sorted(path.parent.name for path in WEIGHTS.glob("*/world.json")))


def checkpoint_folder(name_or_folder: str | Path) -> Path:
    """The folder of a shipped name or of a path.

    Raises:
        ValueError: if there is neither.
    """
    names = shipped()
    if str(name_or_folder) in names:
        return WEIGHTS / str(name_or_folder)
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    near = difflib.get_close_matches(str(name_or_folder), names, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    known = ", ".join(names) or "none are shipped here"
    raise ValueError(f"no checkpoint {str(name_or_folder)!r}: neither a folder nor a shipped name ({known}){hint}")


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, it has to be a whole number of at least {least}")
