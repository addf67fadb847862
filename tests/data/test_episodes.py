"""The episode store: lossless, append-only, and not to be crashed by kills or damage."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_embodied.data.episodes import (
    DamagedEpisode,
    DatasetSpec,
    EpisodeStore,
    check_episode,
    content_hash,
    decode,
    encode,
)
from emu_embodied.records import Episode, Field
from tests.data.fakes import SPEC, make_episode


def same(a: Episode, b: Episode) -> bool:
    for field in dataclasses.fields(Episode):
        left, right = getattr(a, field.name), getattr(b, field.name)
        pairs = [(left[k], right[k]) for k in left] if field.name == "frames" else [(left, right)]
        for x, y in pairs:
            if isinstance(x, np.ndarray):
                if x.dtype != y.dtype or not np.array_equal(x, y):
                    return False
            elif x != y:
                return False
    return set(a.frames) == set(b.frames)


@pytest.fixture
def store(tmp_path: Path) -> EpisodeStore:
    store = EpisodeStore.create(tmp_path / "data", SPEC)
    for seed in range(4):
        store.append(make_episode(seed, env_id=SPEC.env_ids[seed % 2]))
    return store


def test_what_is_appended_is_read_back_after_reopening(store: EpisodeStore) -> None:
    again = EpisodeStore.open(store.folder)
    assert len(again) == 4 and again.spec == SPEC and again.entries == store.entries
    for seed, episode in enumerate(again):
        assert same(episode, make_episode(seed, env_id=SPEC.env_ids[seed % 2]))
    assert same(again[-1], again[3])
    with pytest.raises(IndexError):
        again[4]


@settings(max_examples=30, deadline=None)
@given(
    text=st.text(),
    phases=st.lists(st.text(max_size=5), min_size=1, max_size=4),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, text: str, phases: list[str], seed: int) -> None:
    episode = make_episode(1, blocks=len(phases), instruction=text, source=text, phases=tuple(phases))
    episode = dataclasses.replace(episode, seed=seed)
    path = tmp_path_factory.mktemp("one") / "0.npz"
    path.write_bytes(encode(episode).content)
    assert same(decode(path), episode)


def test_hash_ignores_order_and_notices_content(tmp_path: Path, store: EpisodeStore) -> None:
    other = EpisodeStore.create(tmp_path / "other", SPEC)
    for seed in (2, 0, 3, 1):
        other.append(make_episode(seed, env_id=SPEC.env_ids[seed % 2]))
    assert other.data_hash == store.data_hash == EpisodeStore.open(store.folder).data_hash
    other.append(make_episode(9))
    assert other.data_hash != store.data_hash


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Episode)])
def test_content_hash_covers_every_field(name: str) -> None:
    episode, other = make_episode(0), make_episode(1, env_id="Dash-v0", source="play", phases=("a", "b", "c", "d"))
    assert content_hash(dataclasses.replace(episode, **{name: getattr(other, name)})) != content_hash(episode)
    assert content_hash(episode) == content_hash(make_episode(0))


def test_two_writes_of_an_episode_are_the_same_bytes() -> None:
    assert encode(make_episode(5)) == encode(make_episode(5))


def test_unfinished_index_line_is_ignored_by_readers_and_mended_by_writers(store: EpisodeStore) -> None:
    index = store.folder / "index.jsonl"
    whole = index.read_bytes()
    index.write_bytes(whole[:-20])
    assert len(EpisodeStore.open(store.folder)) == 3
    assert index.read_bytes() == whole[:-20], "a reader must not write"
    assert EpisodeStore.open(store.folder, append=True).entries == store.entries
    assert index.read_bytes() == whole


@pytest.mark.parametrize("cut", range(1, 200, 23))
def test_append_after_a_kill_at_any_byte_of_the_index(store: EpisodeStore, cut: int) -> None:
    index = store.folder / "index.jsonl"
    index.write_bytes(index.read_bytes()[:-cut])
    mended = EpisodeStore.open(store.folder, append=True)
    mended.append(make_episode(7))
    again = EpisodeStore.open(store.folder)
    assert [entry.seed for entry in again.entries] == [0, 1, 2, 3, 7]
    assert same(again[4], make_episode(7))


def test_file_written_but_not_indexed_is_recovered_and_leftovers_removed(store: EpisodeStore) -> None:
    episodes = store.folder / "episodes"
    (episodes / "0000009.npz").write_bytes(encode(make_episode(9)).content)
    (episodes / ".0000010.123.tmp.npz").write_bytes(b"half")
    (episodes / "0000011.npz").write_bytes(b"half")
    with pytest.warns(RuntimeWarning, match="0000011.npz"):
        again = EpisodeStore.open(store.folder, append=True)
    assert [entry.seed for entry in again.entries] == [0, 1, 2, 3, 9]
    assert not (episodes / ".0000010.123.tmp.npz").exists()
    assert same(EpisodeStore.open(store.folder)[4], make_episode(9))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 16] = bytes(byte ^ 255 for byte in content[middle : middle + 16])
    path.write_bytes(bytes(content))


def pickled(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def other_episode(path: Path) -> None:
    path.write_bytes(encode(make_episode(77)).content)


def bad_text(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, text=np.frombuffer(b"[1]", np.uint8))


@pytest.mark.parametrize(
    "damage", [truncate, flip, pickled, other_episode, bad_text, Path.unlink, lambda p: p.write_bytes(b"")]
)
def test_damage_is_named_and_skipped(store: EpisodeStore, damage: object) -> None:
    damage(store.folder / "episodes" / "0000002.npz")  # type: ignore[operator]
    with pytest.raises(DamagedEpisode, match=r"0000002\.npz"):
        store[2]
    with pytest.warns(RuntimeWarning, match=r"0000002\.npz"):
        assert [episode.seed for episode in store.iter_valid()] == [0, 1, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [episode.seed for episode in store.iter_valid([3, 0])] == [3, 0]
    with pytest.raises(DamagedEpisode):
        list(store)


@pytest.mark.parametrize("at", range(0, 1200, 7))
def test_any_flipped_byte_gives_the_episode_or_damage(tmp_path: Path, at: int) -> None:
    store = EpisodeStore.create(tmp_path / "data", SPEC)
    store.append(make_episode(0, blocks=1))
    path = store.folder / "episodes" / "0000000.npz"
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 0x41
    path.write_bytes(bytes(content))
    try:
        assert same(store[0], make_episode(0, blocks=1))
    except DamagedEpisode as error:
        assert str(path) in str(error)


def test_damaged_index_line_is_named_and_skipped(store: EpisodeStore) -> None:
    index = store.folder / "index.jsonl"
    lines = index.read_text().splitlines()
    lines[1] = "{broken"
    entry = json.loads(lines[2])
    lines[2] = json.dumps({**entry, "file": "../../../secret.npz"})
    index.write_text("\n".join(lines) + "\n")
    with pytest.warns(RuntimeWarning) as caught:
        assert [entry.seed for entry in EpisodeStore.open(store.folder).entries] == [0, 3]
    assert ["line 2" in str(caught[0].message), "line 3" in str(caught[1].message)] == [True, True]


def test_create_refuses_what_is_there(tmp_path: Path, store: EpisodeStore) -> None:
    with pytest.raises(ValueError, match="dataset already"):
        EpisodeStore.create(store.folder, SPEC)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("!")
    with pytest.raises(ValueError, match="not empty"):
        EpisodeStore.create(tmp_path / "thesis", SPEC)
    with pytest.raises(ValueError, match="not empty"):
        EpisodeStore.create(tmp_path / "thesis" / "chapter1.tex", SPEC)
    with pytest.raises(ValueError, match=r"dataset\.json is missing"):
        EpisodeStore.open(tmp_path / "thesis")
    (tmp_path / "empty").mkdir()
    EpisodeStore.create(tmp_path / "empty", SPEC)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": "x"}',
        '{"format": "emu_embodied.episodes", "version": 99}',
        '{"format": "emu_embodied.episodes", "version": 1}',
        '{"format": "emu_embodied.episodes", "version": 1, "env_ids": 3}',
    ],
)
def test_foreign_dataset_description_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        EpisodeStore.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"block": 5}, ["3", "5"]),
        ({"env_ids": ("PandaPush-v0",)}, ["Dot-v0", "PandaPush-v0"]),
        ({"action_dim": 7}, ["2", "7"]),
        ({"cameras": {"front": (64, 64)}}, ["(8, 6)", "(64, 64)"]),
        ({"proprio": (SPEC.proprio[0], Field("goal", "cm", -1, 1))}, ["'m'", "'cm'"]),
    ],
)
def test_incompatible_dataset_is_refused_with_both_values(store: EpisodeStore, change: dict, values: list[str]) -> None:
    wanted: DatasetSpec = dataclasses.replace(SPEC, **change)
    with pytest.raises(ValueError, match="recorded differently") as caught:
        store.check_compatible(wanted)
    for value in values:
        assert value in str(caught.value)


def test_part_of_the_environments_is_compatible(store: EpisodeStore) -> None:
    store.check_compatible(dataclasses.replace(SPEC, env_ids=("Dash-v0",)))
    store.check_compatible(SPEC)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env_id": "Other-v0"}, "Other-v0"),
        ({"proprio_TP": np.zeros((5, 3), np.float32)}, "proprio_TP"),
        ({"proprio_TP": np.full((5, 2), np.nan, np.float32)}, "NaN"),
        ({"actions_TKA": np.full((4, 3, 2), 1.01, np.float32)}, "-1, 1"),
        ({"actions_TKA": np.zeros((4, 3, 2))}, "float64"),
        ({"actions_TKA": np.zeros((4, 5, 2), np.float32)}, r"\(4, 5, 2\).*\(4, 3, 2\)"),
        ({"success_T": np.zeros(4, np.bool_)}, "success_T"),
        ({"phases": ("a",)}, "phases"),
        ({"frames": {"front": np.zeros((5, 8, 6, 3), np.uint8)}}, "cameras"),
    ],
)
def test_episode_that_does_not_fit_is_refused(store: EpisodeStore, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        store.append(make_episode(0, **changes))
    assert len(store) == 4
    check_episode(make_episode(0), SPEC)


def test_recording_a_number_again_replaces_it(store: EpisodeStore) -> None:
    store.append(make_episode(8), number=1)
    for seen in (store, EpisodeStore.open(store.folder)):
        assert [entry.seed for entry in seen.entries] == [0, 8, 2, 3]
        assert same(seen[1], make_episode(8))


def test_numbers_are_the_episode_without_its_frames(store: EpisodeStore) -> None:
    whole, numbers = store[1], store.numbers(1)
    assert numbers.frames == {}
    assert same(dataclasses.replace(whole, frames={}), numbers)
    truncate(store.path(store.entries[2]))
    with pytest.warns(RuntimeWarning, match=r"0000002\.npz"):
        assert [episode.seed for episode in store.iter_valid(frames=False)] == [0, 1, 3]
