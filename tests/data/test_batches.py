"""Windows for training: inside episodes, uniform, and from codes that are made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from emu_embodied.data import batches
from emu_embodied.data.batches import TokenDataset, encode_dataset, fingerprint
from emu_embodied.data.episodes import EpisodeStore
from tests import tiny

EPISODES = 8


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture
def store(tmp_path) -> EpisodeStore:
    return tiny.make_store(tmp_path / "data", EPISODES)


@pytest.fixture
def encoded(monkeypatch, tokenizer):
    """How many frames were encoded, call by call."""
    frames, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda f: frames.append(len(f)) or encode(f))
    return frames


def counting(lengths: list[int], envs: list[int] | None = None) -> TokenDataset:
    """Rows are numbered; proprio holds (episode, place in it)."""
    total = sum(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.cat([torch.arange(n) for n in lengths])
    length_E = torch.tensor(lengths)
    return TokenDataset(
        torch.arange(total, dtype=torch.int32)[:, None],
        torch.stack([owner, place], 1).float(),
        torch.arange(total).float()[:, None, None],
        torch.arange(total) / total,
        owner % 2 == 0,
        tuple(f"episode {e}" for e in range(len(lengths))),
        length_E > 3,
        length_E.cumsum(0) - length_E,
        length_E,
        torch.tensor(envs or [0] * len(lengths)),
        tuple(("drift",) * (n - 1) for n in lengths),
    )


def draw(tokens: TokenDataset, count: int, states: int, seed: int = 0):
    texts = torch.arange(len(tokens.length_E))[:, None]
    return tokens.sample(count, states, texts, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lengths", [[4, 1, 6, 3], [3, 3], [1, 1, 1, 9], [5]])
@pytest.mark.parametrize("states", [1, 3])
def test_windows_are_consecutive_states_of_one_episode(lengths, states):
    tokens = counting(lengths)
    batch = draw(tokens, 3000, states)
    episode_BT, place_BT = batch.proprio_BTP.unbind(-1)
    assert bool((episode_BT == episode_BT[:, :1]).all())
    assert torch.equal(place_BT - place_BT[:, :1], torch.arange(states).float().expand(3000, -1))
    episode_B = episode_BT[:, 0].long()
    assert torch.equal(batch.text_BL[:, 0], episode_B)
    assert torch.equal(batch.imitate_B, tokens.imitate_E[episode_B])
    assert torch.equal(batch.success_BT, (episode_BT % 2 == 0))
    assert batch.codes_BTN.dtype == torch.int64
    assert torch.equal(batch.actions_BTKA[..., 0, 0], batch.codes_BTN[:, :-1, 0].float())  # the action taken in a state
    assert batch.actions_BTKA.shape[1] == states - 1
    # Every place where a window fits is drawn, each about as often.
    starts, counts = batch.codes_BTN[:, 0, 0].unique(return_counts=True)
    assert len(starts) == sum(max(0, n - states + 1) for n in lengths)
    assert float(counts.min()) > 0.6 * 3000 / len(starts)


def test_every_environment_is_drawn_alike_however_long_its_episodes_are():
    tokens = counting([3, 3, 20, 20], envs=[0, 0, 1, 1])
    batch = draw(tokens, 4000, 3)
    short = float((batch.text_BL[:, 0] < 2).float().mean())
    assert 0.45 < short < 0.55


def test_the_generator_decides():
    tokens = counting([4, 6])
    first, same, other = (draw(tokens, 20, 2, seed).codes_BTN for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_windows_longer_than_every_episode_are_refused():
    with pytest.raises(ValueError, match="windows of 7 states do not fit: of 3 episodes the longest has 6"):
        draw(counting([4, 6, 2]), 1, 7)


def test_a_split_parts_whole_episodes():
    tokens = counting([4, 6, 2, 5, 3])
    train, held = tokens.split(0.4)
    assert sorted([*train.rows().tolist(), *held.rows().tolist()]) == list(range(20))
    assert sorted(train.instructions + held.instructions) == sorted(tokens.instructions)
    for part in (train, held):
        seen = draw(part, 500, 2)
        assert set(seen.codes_BTN.flatten().tolist()) <= set(part.rows().tolist())
        owner = [part.instructions[i] for i in seen.text_BL[:, 0].tolist()]
        assert owner == [f"episode {int(e)}" for e in seen.proprio_BTP[:, 0, 0]]


def test_a_dataset_holds_what_was_recorded(store, tokenizer, tmp_path):
    tokens = encode_dataset(store, tokenizer, tiny.CAMERAS, tmp_path / "codes.safetensors")
    assert tokens.imitate_E.tolist() == [True, True, False, False] * 2
    for e, episode in enumerate(store):
        rows = slice(int(tokens.first_E[e]), int(tokens.first_E[e] + tokens.length_E[e]))
        codes = torch.cat([tokenizer.encode(episode.frames[camera]) for camera in tiny.CAMERAS], 1)
        assert torch.equal(tokens.codes_MN[rows].long(), codes)
        assert np.array_equal(tokens.proprio_MP[rows], episode.proprio_TP)
        assert np.array_equal(tokens.actions_MKA[rows][:-1], episode.actions_TKA)
        assert not bool(tokens.actions_MKA[rows][-1].any())
        assert np.array_equal(tokens.reward_M[rows], episode.reward_T)
        assert np.array_equal(tokens.success_M[rows], episode.success_T)
        assert tokens.instructions[e] == episode.instruction
        assert tokens.phases[e] == episode.phases


def same(first: TokenDataset, second: TokenDataset) -> bool:
    texts = ("instructions", "phases")
    return all(getattr(first, name) == getattr(second, name) for name in texts) and all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in first.__slots__ if name not in texts
    )


def test_codes_are_made_once(store, tokenizer, encoded, tmp_path):
    cache = tmp_path / "codes.safetensors"
    first = encode_dataset(store, tokenizer, tiny.CAMERAS, cache)
    assert encoded == [12] * EPISODES
    before = cache.read_bytes()
    assert same(encode_dataset(store, tokenizer, tiny.CAMERAS, cache), first)
    assert len(encoded) == EPISODES and cache.read_bytes() == before
    store.append(tiny.make_episode(99))
    assert len(encode_dataset(store, tokenizer, tiny.CAMERAS, cache).length_E) == EPISODES + 1
    assert len(encoded) == EPISODES + 1  # only the new one


@pytest.mark.parametrize("damage", ["truncated", "foreign", "no metadata"])
def test_a_damaged_cache_is_made_anew(store, tokenizer, encoded, tmp_path, damage):
    cache = tmp_path / "codes.safetensors"
    first = encode_dataset(store, tokenizer, tiny.CAMERAS, cache)
    if damage == "truncated":
        cache.write_bytes(cache.read_bytes()[:-20])
    elif damage == "foreign":
        cache.write_bytes(b"nonsense")
    else:
        batches.save_file({"codes": torch.zeros(48, 8, dtype=torch.int32)}, cache)
    assert same(encode_dataset(store, tokenizer, tiny.CAMERAS, cache), first)
    assert len(encoded) == 2 * EPISODES


def test_another_tokenizer_or_camera_makes_its_own_codes(store, tokenizer, tmp_path):
    cache = tmp_path / "codes.safetensors"
    first = encode_dataset(store, tokenizer, tiny.CAMERAS, cache)
    other = tiny.make_tokenizer(seed=7)
    assert fingerprint(other) != fingerprint(tokenizer) == fingerprint(tiny.make_tokenizer())
    codes = encode_dataset(store, other, tiny.CAMERAS, cache).codes_MN
    assert not torch.equal(codes, first.codes_MN)
    assert torch.equal(codes[:6, :4].long(), other.encode(store[0].frames["front"]))
    for cameras in (("wrist",), ("wrist", "front")):
        codes = encode_dataset(store, tokenizer, cameras, cache).codes_MN
        assert torch.equal(codes[:6, :4].long(), tokenizer.encode(store[0].frames["wrist"]))


def test_the_order_of_appending_does_not_matter(tokenizer, tmp_path):
    stores = []
    for name, order in (("a", [0, 1, 2, 3]), ("b", [2, 0, 3, 1])):
        store = EpisodeStore.create(tmp_path / name, tiny.make_store(tmp_path / f"{name} spec", 1).spec)
        for number in order:
            store.append(tiny.make_episode(number), number=number)
        stores.append(store)
    cache = tmp_path / "codes.safetensors"
    first = encode_dataset(stores[0], tokenizer, tiny.CAMERAS, cache)
    assert stores[0].data_hash == stores[1].data_hash
    assert same(encode_dataset(stores[1], tokenizer, tiny.CAMERAS, cache), first)
    assert same(encode_dataset(stores[1], tokenizer, tiny.CAMERAS, tmp_path / "other.safetensors"), first)


def test_damaged_episodes_are_named_and_left_out(store, tokenizer, tmp_path):
    cache = tmp_path / "codes.safetensors"
    whole = encode_dataset(store, tokenizer, tiny.CAMERAS, cache)
    paths = [store.path(store.entries[i]) for i in (2, 5)]
    kept = Path(shutil.copy(paths[0], tmp_path / "kept"))
    paths[0].write_bytes(paths[0].read_bytes()[:100])
    with pytest.warns(RuntimeWarning, match=paths[0].name):
        partial = encode_dataset(store, tokenizer, tiny.CAMERAS, cache)
    assert len(partial.length_E) == EPISODES - 1
    assert torch.equal(partial.codes_MN, torch.cat([whole.codes_MN[:12], whole.codes_MN[18:]]))
    # Another one of the same length is damaged instead: as many rows, other episodes.
    shutil.copy(kept, paths[0])
    paths[1].unlink()
    with pytest.warns(RuntimeWarning, match=paths[1].name):
        partial = encode_dataset(store, tokenizer, tiny.CAMERAS, cache)
    assert torch.equal(partial.codes_MN, torch.cat([whole.codes_MN[:30], whole.codes_MN[36:]]))


def test_data_without_a_camera_or_without_episodes_is_refused(store, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"has cameras \('front', 'wrist'\), training needs \('front', 'side'\)"):
        encode_dataset(store, tokenizer, ("front", "side"), tmp_path / "codes.safetensors")
    empty = EpisodeStore.create(tmp_path / "empty", store.spec)
    with pytest.raises(ValueError, match="no readable episode"):
        encode_dataset(empty, tokenizer, tiny.CAMERAS, tmp_path / "codes.safetensors")
