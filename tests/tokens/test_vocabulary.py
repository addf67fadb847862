"""Id ranges: ours lie one after another, Emu3.5's lie where BAAI put them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emu_embodied.presets import PRESETS
from emu_embodied.tokens.vocabulary import SPECIALS, IdRange, Vocabulary

SIZES = st.integers(1, 300)
KINDS = ("vision", "action", "state", "reward", "success")


def ids_of(vocabulary: Vocabulary) -> list[int]:
    ranges = [getattr(vocabulary, kind) for kind in ("text", *KINDS)]
    return [*vocabulary.special.values(), *(i for part in ranges for i in range(part.start, part.stop))]


@given(SIZES, SIZES, SIZES, SIZES, SIZES)
def test_compact_ranges_are_disjoint_and_fill_the_vocabulary(text, vision, action, state, reward):
    vocabulary = Vocabulary.compact(text=text, vision=vision, action=action, state=state, reward=reward)
    assert sorted(ids_of(vocabulary)) == list(range(vocabulary.size))
    assert (vocabulary.text.start, vocabulary.success.size) == (0, 2)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_room_for_its_ids(name):
    row = PRESETS[name]
    vocabulary = row.vocabulary()
    assert row.backbone(4).vocab_size == vocabulary.size
    assert (vocabulary.vision.size, vocabulary.action.size) == (row.ibq.n_embed, row.action_bins)
    assert (vocabulary.state.size, vocabulary.reward.size) == (row.state_bins, row.reward_bins)


def test_emu35_ids_are_those_of_the_released_files():
    vocabulary = Vocabulary.emu35()
    extra_0, extra_204 = 151_646, 151_850
    assert vocabulary.size == 282_926 == vocabulary.vision.stop
    assert (vocabulary.vision.start, vocabulary.vision.size) == (151_854, 131_072)
    assert vocabulary.text == IdRange(0, 151_643)
    named = {"pad": 151_643, "bos": 151_849, "eos": 151_850, "boi": 151_852, "eoi": 151_853}
    assert named.items() <= vocabulary.special.items()
    assert vocabulary.special["boa"] == extra_0 + 198  # <|extra_198|>, as UniVLA opens actions
    assert set(vocabulary.special) == set(SPECIALS)
    ours = {vocabulary.special[name] for name in ("boa", "reward", "success")}
    # Tokens that mean something in Emu3.5: CoT, subject spans, end of line and frame, time stamp.
    assert all(extra_0 <= i <= extra_204 for i in ours)
    assert ours.isdisjoint({151_696, 151_697, 151_706, 151_707, 151_746, 151_747, *range(151_846, 151_854)})


def test_emu35_new_ranges_reuse_the_rarest_text_ids_and_nothing_else():
    vocabulary = Vocabulary.emu35()
    taken = [i for kind in KINDS[1:] for i in range(getattr(vocabulary, kind).start, getattr(vocabulary, kind).stop)]
    assert len(set(taken)) == len(taken)
    assert max(taken) == vocabulary.text.stop - 1 and min(taken) > vocabulary.text.stop - 1000
    assert len(set(vocabulary.special.values())) == len(SPECIALS)
    assert not set(vocabulary.special.values()) & {*taken, *range(vocabulary.vision.start, vocabulary.vision.stop)}


@given(st.integers(0, 500), st.integers(1, 500), st.data())
def test_local_indices_and_ids_are_inverse(start, size, data):
    part = IdRange(start, size)
    local = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    assert torch.equal(part.local(part.ids(local)), local)
    for outside in (part.start - 1, part.stop):
        with pytest.raises(ValueError, match="not laid out"):
            part.local(torch.tensor([part.start, outside]))


def test_order_of_the_ranges_is_fixed():
    # A checkpoint stores sizes, not ids: reordering the ranges would silently change what its rows mean.
    vocabulary = Vocabulary.compact(text=4, vision=3, action=2, state=5, reward=6)
    starts = {kind: getattr(vocabulary, kind).start for kind in ("text", *KINDS)}
    assert starts == {"text": 0, "vision": 12, "action": 15, "state": 17, "reward": 22, "success": 28}
    assert [vocabulary.special[name] for name in SPECIALS] == list(range(4, 12))
