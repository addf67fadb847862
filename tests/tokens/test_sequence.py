"""The order of tokens: what is interleaved is parsed, every slot holds its own kind, every value is predicted once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emu_embodied.tokens.sequence import SequenceLayout
from emu_embodied.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary.compact(text=256, vision=12, action=8, state=16, reward=8)


@st.composite
def layouts(draw):
    return SequenceLayout(
        vocabulary=VOCABULARY,
        text_length=draw(st.integers(0, 5)),
        cameras=("front", "wrist", "side")[: draw(st.integers(1, 3))],
        camera_tokens=draw(st.integers(1, 5)),
        num_proprio=draw(st.integers(1, 4)),
        action_dim=draw(st.integers(1, 3)),
    )


def random_stream(layout: SequenceLayout, states: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    num_codes = len(layout.cameras) * layout.camera_tokens
    codes_BTN = torch.randint(12, (2, states, num_codes), generator=generator)
    proprio_BTP = torch.randint(16, (2, states, layout.num_proprio), generator=generator)
    actions_BTA = torch.randint(8, (2, states - 1, layout.action_dim), generator=generator)
    return codes_BTN, proprio_BTP, actions_BTA


@given(layouts(), st.integers(1, 4))
def test_parse_undoes_interleave(layout, states):
    codes, proprio, actions = random_stream(layout, states)
    text = torch.stack([layout.text_ids([])] * 2)
    ids = layout.interleave(text, layout.state_ids(codes, proprio), layout.action_ids(actions))
    assert ids.shape == (2, layout.length(states)) and 0 <= int(ids.min()) <= int(ids.max()) < VOCABULARY.size
    text_again, states_again, actions_again = layout.parse(ids)
    assert torch.equal(text_again, text)
    codes_again, proprio_again = layout.parse_state(states_again)
    assert torch.equal(codes_again, codes) and torch.equal(proprio_again, proprio)
    assert torch.equal(VOCABULARY.action.local(actions_again[..., 1:]), actions)
    # Vectors are laid out as ids are.
    vectors = ids[..., None] * torch.tensor([1.0, -1.0])
    assert all(
        torch.equal(part[..., 0].long(), same)
        for part, same in zip(layout.parse(vectors), (text, states_again, actions_again), strict=True)
    )


@given(layouts(), st.integers(1, 4), st.integers(0, 5))
def test_parse_undoes_interleave_of_subtasks(layout, states, length):
    codes, proprio, _ = random_stream(layout, states)
    sentence = list(b"lift!"[: min(length, layout.text_length)])
    text = torch.stack([layout.text_ids([])] * 2)
    subtasks = torch.stack([layout.text_ids(sentence), layout.end_ids()])[:, None].expand(-1, states - 1, -1)
    ids = layout.interleave(text, layout.state_ids(codes, proprio), subtasks)
    assert ids.shape == (2, layout.subgoal_length(states - 1) if states > 1 else layout.length(1))
    text_again, states_again, subtasks_again = layout.parse_subgoals(ids)
    assert torch.equal(text_again, text) and torch.equal(subtasks_again, subtasks)
    codes_again, proprio_again = layout.parse_state(states_again)
    assert torch.equal(codes_again, codes) and torch.equal(proprio_again, proprio)
    for k in range(states - 1):
        here = ids[:, layout.keyframe_offset(k) :][:, : layout.state_tokens]
        assert torch.equal(here, states_again[:, k + 1])
        # What follows the state before says which role the model plays.
        assert torch.equal(
            ids[:, layout.keyframe_offset(k) - layout.text_tokens], layout.follow_ids.ids(torch.arange(2))
        )
    ends = layout.sentence_ids
    assert torch.equal(ends.local(subtasks[..., 1:]) == ends.size - 1, subtasks[..., 1:] == VOCABULARY.special["pad"])


@pytest.mark.parametrize("vocabulary", [VOCABULARY, Vocabulary.emu35()], ids=["compact", "emu35"])
def test_ranges_of_the_planners_role_are_what_the_vocabulary_says(vocabulary):
    layout = SequenceLayout(
        vocabulary=vocabulary, text_length=4, cameras=("front",), camera_tokens=2, num_proprio=1, action_dim=1
    )
    special = vocabulary.special
    assert (layout.follow_ids.start, layout.follow_ids.stop - 1) == (special["bos"], special["eos"])
    assert layout.sentence_ids.stop - 1 == special["pad"] and layout.sentence_ids.start == vocabulary.text.start


@given(layouts(), st.integers(1, 3))
def test_offsets_point_at_segments(layout, states):
    codes, proprio, actions = random_stream(layout, states)
    text = torch.stack([layout.text_ids([])] * 2)
    ids = layout.interleave(text, layout.state_ids(codes, proprio), layout.action_ids(actions))
    for t in range(states):
        here = ids[:, layout.state_offset(t) :][:, : layout.state_tokens]
        assert torch.equal(here, layout.state_ids(codes[:, t], proprio[:, t]))
        if t + 1 < states:
            there = ids[:, layout.action_offset(t) :][:, : layout.action_tokens]
            assert torch.equal(there, layout.action_ids(actions[:, t]))


@given(layouts(), st.integers(-9, 40))
def test_other_lengths_are_no_sequence(layout, surplus):
    length = layout.length(2) + surplus
    good = {layout.length(states) for states in range(1, 40)}
    if length in good or length < 0:
        return
    with pytest.raises(ValueError, match="are no sequence"):
        layout.parse(torch.zeros(1, length))


@given(layouts())
def test_each_slot_is_read_one_position_early_and_takes_its_own_kind(layout):
    codes, proprio, _ = random_stream(layout, 1)
    ids = layout.state_ids(codes[0, 0], proprio[0, 0])
    covered = []
    for kind, positions, span in layout.readouts():
        slots = positions + 1
        covered += slots.tolist()
        if kind in ("frame", "proprio"):
            assert bool(((ids[slots] >= span.start) & (ids[slots] < span.stop)).all())
        else:
            assert ids[slots].tolist() == [VOCABULARY.special[kind]]
    # All slots but the cameras' opening tokens are predicted, each once, none from outside the state.
    openings = [camera * (1 + layout.camera_tokens) for camera in range(len(layout.cameras))]
    assert sorted(covered + openings) == list(range(layout.state_tokens))
    assert ids[openings].tolist() == [VOCABULARY.special["boi"]] * len(openings)


def test_a_state_with_a_foreign_id_is_refused():
    layout = SequenceLayout(
        vocabulary=VOCABULARY, text_length=2, cameras=("front",), camera_tokens=2, num_proprio=1, action_dim=1
    )
    ids = layout.state_ids(torch.tensor([3, 4]), torch.tensor([5]))
    assert [part.tolist() for part in layout.parse_state(ids)] == [[3, 4], [5]]
    ids[1] = VOCABULARY.action.start
    with pytest.raises(ValueError, match="not laid out"):
        layout.parse_state(ids)


def test_text_is_padded_and_too_long_a_text_is_refused():
    layout = SequenceLayout(
        vocabulary=VOCABULARY, text_length=4, cameras=("front",), camera_tokens=2, num_proprio=1, action_dim=1
    )
    bos, pad = VOCABULARY.special["bos"], VOCABULARY.special["pad"]
    assert layout.text_ids([7, 8]).tolist() == [bos, 7, 8, pad, pad]
    assert layout.text_ids([1, 2, 3, 4]).tolist() == [bos, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"instruction of 5 bytes; this model reads at most 4"):
        layout.text_ids([1, 2, 3, 4, 5])
