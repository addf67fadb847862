"""The episode store: a folder that is appended to, read at random, and survives kills and damaged files.

::

    dataset.json     what every episode in it has in common (``DatasetSpec``)
    index.jsonl      one line per episode, appended after its file is in place
    episodes/*.npz   lossless; arrays of an ``Episode`` by field name, text in one JSON array

Everything is read with ``allow_pickle=False``. An episode's sha256 is that of its content, not of its file, so a
dataset's hash does not depend on the zlib version, and not on the order of appending.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from emu_embodied.files import write_atomically, write_json
from emu_embodied.records import Episode, Field

FORMAT = "emu_embodied.episodes"
FORMAT_VERSION = 1
COMPRESSION = 1
"""zlib level. A push (2 cameras x 13 frames of 64 px) takes 6.5 ms; at level 6 10.5 ms, for a third fewer bytes."""

_OBJECTS = "objects_TO"
_ARRAYS = ("proprio_TP", "actions_TKA", "rewards_TK", "reward_T", "success_T", _OBJECTS)
_FRAMES = "frames."
_TEXT = "text"


class DamagedEpisode(ValueError):
    """An episode file is missing, truncated, altered or foreign. The message names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec:
    """What all episodes of a dataset have in common."""

    env_ids: tuple[str, ...]
    """Gymnasium ids the episodes are recorded from."""
    block: int
    """K, env steps in one action block [env steps]."""
    action_dim: int
    """A, action dimensions, each in [-1, 1]."""
    cameras: dict[str, tuple[int, int]]
    """Camera name -> (height, width) [pixels]."""
    proprio: tuple[Field, ...]
    """Names, units and ranges of the P proprio entries."""
    objects: tuple[Field, ...] = ()
    """Those of the O entries of ``Episode.objects_TO``."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; ``from_dict`` reads it back."""
        return {
            "env_ids": list(self.env_ids),
            "block": self.block,
            "action_dim": self.action_dim,
            "cameras": {name: list(size) for name, size in self.cameras.items()},
            "proprio": [dataclasses.asdict(field) for field in self.proprio],
            "objects": [dataclasses.asdict(field) for field in self.objects],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> DatasetSpec:
        """Read what ``to_dict`` wrote.

        Raises:
            ValueError: if a key is missing or of another type.
        """
        try:
            return cls(
                env_ids=tuple(str(env_id) for env_id in content["env_ids"]),
                block=int(content["block"]),
                action_dim=int(content["action_dim"]),
                cameras={str(name): (int(size[0]), int(size[1])) for name, size in content["cameras"].items()},
                proprio=tuple(Field(**field) for field in content["proprio"]),
                objects=tuple(Field(**field) for field in content.get("objects", ())),
            )
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"not a dataset description: {error!r}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexEntry:
    """One line of ``index.jsonl``."""

    file: str
    """File name inside ``episodes/``."""
    env_id: str
    """Environment it was recorded from."""
    seed: int
    """The environment's reset seed."""
    source: str
    """Behaviour that chose the actions."""
    length: int
    """T [blocks]."""
    success: bool
    """Whether any recorded state solves the task."""
    sha256: str
    """Hash of the content (``content_hash``)."""


@dataclass(frozen=True, slots=True)
class EncodedEpisode:
    """An episode as the bytes of its file, so that a worker process can do the compressing."""

    entry: IndexEntry
    content: bytes


class EpisodeStore:
    """A dataset folder. Make one with ``create`` or ``open``."""

    def __init__(self, folder: Path, spec: DatasetSpec, entries: list[IndexEntry]) -> None:
        self.folder = folder
        self.spec = spec
        self._entries = entries
        self._position = {entry.file: i for i, entry in enumerate(entries)}

    @classmethod
    def create(cls, folder: str | Path, spec: DatasetSpec) -> EpisodeStore:
        """Start a dataset in a new or empty folder.

        Raises:
            ValueError: if the folder holds something already.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "a dataset already (open it to append)" if (folder / "dataset.json").exists() else "not empty"
            raise ValueError(f"{folder} is {what}; give a new or empty folder")
        write_json(folder / "dataset.json", {"format": FORMAT, "version": FORMAT_VERSION, **spec.to_dict()})
        (folder / "episodes").mkdir(exist_ok=True)
        return cls(folder, spec, [])

    @classmethod
    def open(cls, folder: str | Path, *, append: bool = False) -> EpisodeStore:
        """Open an existing dataset.

        Args:
            folder: where it is.
            append: whether this process will append. It then repairs what a kill left: an unfinished index line is
                cut off, episode files without a line get theirs. A reader only ignores both.

        Raises:
            ValueError: if there is no dataset, or one of an unknown format version.
        """
        folder = Path(folder)
        try:
            content = json.loads((folder / "dataset.json").read_text())
        except FileNotFoundError as error:
            raise ValueError(f"no dataset in {folder}: dataset.json is missing") from error
        except ValueError as error:
            raise ValueError(f"{folder / 'dataset.json'} is not valid JSON: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{folder / 'dataset.json'} does not describe an {FORMAT} dataset")
        if content.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{folder} has dataset format {content.get('version')}, this version reads {FORMAT_VERSION}"
            )
        try:
            spec = DatasetSpec.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{folder / 'dataset.json'}: {error}") from error
        store = cls(folder, spec, _read_index(folder / "index.jsonl"))
        if append:
            store._repair()
        return store

    @property
    def entries(self) -> tuple[IndexEntry, ...]:
        """The index, in the order of appending."""
        return tuple(self._entries)

    @property
    def data_hash(self) -> str:
        """sha256 over the sorted hashes of all episodes: the same content gives the same hash in any order."""
        return hashlib.sha256("\n".join(sorted(entry.sha256 for entry in self._entries)).encode()).hexdigest()

    def path(self, entry: IndexEntry) -> Path:
        """Where the entry's file is."""
        return self.folder / "episodes" / entry.file

    def append(self, episode: Episode, *, number: int | None = None) -> IndexEntry:
        """Store an episode; see ``append_encoded``.

        Raises:
            ValueError: if the episode does not fit the dataset (another env, block size, camera, shape, dtype, range).
        """
        check_episode(episode, self.spec)
        return self.append_encoded(encode(episode), number=number)

    def append_encoded(self, encoded: EncodedEpisode, *, number: int | None = None) -> IndexEntry:
        """Store an episode that ``check_episode`` accepted: its file is written and renamed, then its line is added.

        Args:
            encoded: from ``encode``.
            number: names the file; the next free one if None. A number that is there already is replaced.
        """
        if number is None:
            number = max((int(entry.file.split(".")[0]) for entry in self._entries), default=-1) + 1
        entry = dataclasses.replace(encoded.entry, file=f"{number:07d}.npz")
        write_atomically(self.path(entry), lambda aside: cast(None, aside.write_bytes(encoded.content)))
        self._add_line(entry)
        return entry

    def check_compatible(self, wanted: DatasetSpec) -> None:
        """Refuse a dataset that was recorded differently from what is wanted.

        A caller that cares about some values only replaces those in the dataset's own:
        ``store.check_compatible(dataclasses.replace(store.spec, block=5))``.

        Raises:
            ValueError: with both values; an env id that is wanted must be among the dataset's.
        """
        clashes = []
        if not set(wanted.env_ids) <= set(self.spec.env_ids):
            clashes.append(f"environment: dataset {', '.join(self.spec.env_ids)}; wanted {', '.join(wanted.env_ids)}")
        for label, name in (("block size", "block"), ("action dimensions", "action_dim"), ("cameras", "cameras")):
            found, asked = getattr(self.spec, name), getattr(wanted, name)
            if found != asked:
                clashes.append(f"{label}: dataset {found}; wanted {asked}")
        for label, has, wants in (
            ("proprio", self.spec.proprio, wanted.proprio),
            ("object", self.spec.objects, wanted.objects),
        ):
            if has != wants:
                found = [field for field in has if field not in wants]
                asked = [field for field in wants if field not in has]
                clashes.append(f"{label} fields: dataset {found or 'in another order'}; wanted {asked or 'fewer'}")
        if clashes:
            raise ValueError(f"the dataset in {self.folder} was recorded differently: " + " | ".join(clashes))

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Episode:
        """Read one episode.

        Raises:
            IndexError: past the end.
            DamagedEpisode: if its file cannot be used.
        """
        entry = self._entries[index]
        path = self.path(entry)
        episode = decode(path)
        if content_hash(episode) != entry.sha256:
            raise DamagedEpisode(f"{path} does not hold the episode that index.jsonl names (another sha256)")
        try:
            check_episode(episode, self.spec)
        except ValueError as error:
            raise DamagedEpisode(f"{path}: {error}") from error
        return episode

    def numbers(self, index: int) -> Episode:
        """One episode without its frames: they are not unpacked, so the content's hash is not checked either.

        Raises:
            IndexError: past the end.
            DamagedEpisode: if its file cannot be used.
        """
        return decode(self.path(self._entries[index]), frames=False)

    def __iter__(self) -> Iterator[Episode]:
        """All episodes; raises ``DamagedEpisode`` where ``iter_valid`` would warn."""
        return (self[i] for i in range(len(self)))

    def iter_valid(self, indices: Iterable[int] | None = None, *, frames: bool = True) -> Iterator[Episode]:
        """Episodes (all, or those asked for) that can be read; a damaged file is named in a warning and skipped.

        Args:
            indices: which.
            frames: whether with their frames, see ``numbers``.
        """
        for i in range(len(self)) if indices is None else indices:
            try:
                episode = self[i] if frames else self.numbers(i)
            except DamagedEpisode as error:
                warnings.warn(f"skipped: {error}", RuntimeWarning, stacklevel=2)
            else:
                yield episode

    def _add_line(self, entry: IndexEntry) -> None:
        line = json.dumps(dataclasses.asdict(entry)) + "\n"
        # One write in append mode: either the whole line or (killed inside it) a tail that readers recognise.
        with open(self.folder / "index.jsonl", "ab", buffering=0) as index:
            index.write(line.encode())
        known = self._position.get(entry.file)
        if known is None:
            self._position[entry.file] = len(self._entries)
            self._entries.append(entry)
        else:
            self._entries[known] = entry

    def _repair(self) -> None:
        index = self.folder / "index.jsonl"
        if index.exists():
            content = index.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(index, whole)
        for aside in (self.folder / "episodes").glob(".*.tmp.npz"):
            aside.unlink(missing_ok=True)
        for path in sorted((self.folder / "episodes").glob("[0-9]*.npz")):
            if path.name in self._position:
                continue
            try:
                episode = decode(path)
                check_episode(episode, self.spec)
            except ValueError as error:
                warnings.warn(f"not indexed: {error}", RuntimeWarning, stacklevel=3)
            else:
                self._add_line(dataclasses.replace(_entry(episode), file=path.name))


def check_episode(episode: Episode, spec: DatasetSpec) -> None:
    """Whether an episode fits a dataset.

    Raises:
        ValueError: naming the entry with its value and the one expected.
    """
    if episode.env_id not in spec.env_ids:
        raise ValueError(f"episode of {episode.env_id}, dataset of {', '.join(spec.env_ids)}")
    blocks = len(episode)
    if blocks < 1:
        raise ValueError("an episode has at least one block")
    if len(episode.phases) != blocks:
        raise ValueError(f"{len(episode.phases)} phases for {blocks} blocks")
    if set(episode.frames) != set(spec.cameras):
        raise ValueError(f"cameras {sorted(episode.frames)}, dataset has {sorted(spec.cameras)}")
    shapes: dict[str, tuple[np.ndarray, type, tuple[int, ...]]] = {
        f"frames of {name}": (episode.frames[name], np.uint8, (blocks + 1, *size, 3))
        for name, size in spec.cameras.items()
    }
    shapes["proprio_TP"] = (episode.proprio_TP, np.float32, (blocks + 1, len(spec.proprio)))
    shapes["actions_TKA"] = (episode.actions_TKA, np.float32, (blocks, spec.block, spec.action_dim))
    shapes["rewards_TK"] = (episode.rewards_TK, np.float32, (blocks, spec.block))
    shapes["reward_T"] = (episode.reward_T, np.float32, (blocks + 1,))
    shapes["success_T"] = (episode.success_T, np.bool_, (blocks + 1,))
    shapes["objects_TO"] = (episode.objects_TO, np.float32, (blocks + 1, len(spec.objects)))
    for name, (array, dtype, shape) in shapes.items():
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}")
        if dtype is np.float32 and not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinity")
    if np.abs(episode.actions_TKA).max() > 1:
        raise ValueError("actions_TKA leaves [-1, 1]")


def content_hash(episode: Episode) -> str:
    """sha256 over names, dtypes, shapes and bytes of everything in an episode."""
    digest = hashlib.sha256(_text(episode))
    for name, array in _arrays(episode).items():
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def encode(episode: Episode) -> EncodedEpisode:
    """The bytes of an episode's file; the same episode gives the same bytes (with the same zlib)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=COMPRESSION) as archive:
        text = np.frombuffer(_text(episode), np.uint8)
        for name, array in {**_arrays(episode), _TEXT: text}.items():
            # A name alone gets the date 1980-01-01; np.savez would give no say over the compression level.
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return EncodedEpisode(_entry(episode), buffer.getvalue())


def decode(path: Path, *, frames: bool = True) -> Episode:
    """Read one episode file.

    Args:
        path: the file.
        frames: whether to unpack the frames, most of it.

    Raises:
        DamagedEpisode: naming the file and what is wrong with it.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            wanted = [name for name in archive.files if frames or not name.startswith(_FRAMES)]
            arrays = {name: archive[name] for name in wanted}
        text = json.loads(arrays.pop(_TEXT).tobytes())
        films = {name.removeprefix(_FRAMES): arrays.pop(name) for name in list(arrays) if name.startswith(_FRAMES)}
        return Episode(
            env_id=str(text["env_id"]),
            seed=int(text["seed"]),
            source=str(text["source"]),
            instruction=str(text["instruction"]),
            phases=tuple(str(phase) for phase in text["phases"]),
            frames=films,
            **{name: arrays[name] for name in _ARRAYS if name != _OBJECTS},
            objects_TO=arrays.get(_OBJECTS, np.zeros((len(arrays["reward_T"]), 0), np.float32)),
        )
    except FileNotFoundError as error:
        raise DamagedEpisode(f"{path} is missing") from error
    except Exception as error:  # zipfile, zlib and numpy raise many types on damaged bytes; all mean the same here
        raise DamagedEpisode(f"{path} is damaged or no episode: {type(error).__name__}: {error}") from error


def _entry(episode: Episode) -> IndexEntry:
    return IndexEntry(
        file="",
        env_id=episode.env_id,
        seed=episode.seed,
        source=episode.source,
        length=len(episode),
        success=bool(episode.success_T.any()),
        sha256=content_hash(episode),
    )


def _text(episode: Episode) -> bytes:
    text = {
        "env_id": episode.env_id,
        "seed": episode.seed,
        "source": episode.source,
        "instruction": episode.instruction,
        "phases": list(episode.phases),
    }
    return json.dumps(text, sort_keys=True).encode()


def _arrays(episode: Episode) -> dict[str, np.ndarray]:
    frames = {_FRAMES + name: episode.frames[name] for name in sorted(episode.frames)}
    arrays = {name: getattr(episode, name) for name in _ARRAYS}
    if not episode.objects_TO.size:
        del arrays[_OBJECTS]  # as in episodes that were recorded before there were objects
    return frames | arrays


def _read_index(path: Path) -> list[IndexEntry]:
    entries: dict[str, IndexEntry] = {}
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line or number == len(lines):  # what follows the last newline is a line still being written
            continue
        try:
            entry = IndexEntry(**json.loads(line))
            if not re.fullmatch(r"\d+\.npz", entry.file) or not re.fullmatch("[0-9a-f]{64}", entry.sha256):
                raise ValueError("bad file name or sha256")
        except (ValueError, TypeError) as error:
            warnings.warn(f"skipped: line {number} of {path} is no index entry: {error}", RuntimeWarning, stacklevel=3)
            continue
        entries[entry.file] = entry  # an episode that was recorded again replaces the first
    return list(entries.values())
