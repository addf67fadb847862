"""Subtasks in episodes: where they begin, which state completes them, and the windows drawn from them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emu_embodied.data.batches import TokenDataset
from emu_embodied.data.subgoals import DONE, DONE_SHARE, UNKNOWN, SubgoalIndex, _weights, segments

ORDER = ("retreat", "approach", "push")
SENTENCES = {phase: f"{phase} it" for phase in ORDER}
PHASES = (*ORDER, "random", "done")


def flags(*successes: int, states: int) -> list[bool]:
    return [t in successes for t in range(states)]


@pytest.mark.parametrize(
    ("phases", "solved", "expected"),
    [
        # One after the other; the last is complete where the task is.
        ("approach approach push push", (4,), "a2 a2 p4 p4 done"),
        # Noise belongs to the subtask that it interrupts, at the start to the one that follows.
        ("random approach random approach push", (5,), "a4 a4 a4 a4 p5 done"),
        # A push that is given up was not completed; raising the tool after it was.
        ("push retreat approach push", (4,), "? r2 a3 p4 done"),
        # Nor was a subtask at whose end the recording ends.
        ("approach push push", (), "a1 ? ? ?"),
        # Solved, lost and solved again.
        ("push done approach push", (1, 4), "p1 done a3 p4 done"),
        ("done done", (0, 1, 2), "done done done"),
        ("random random", (), "? ? ?"),
    ],
)
def test_segments(phases: str, solved: tuple[int, ...], expected: str) -> None:
    labels = phases.split()
    found = segments(labels, flags(*solved, states=len(labels) + 1), ORDER)
    shown = [{None: "?", "": "done"}.get(phase, f"{(phase or ' ')[0]}{state}") for phase, state in found]
    assert " ".join(shown) == expected


episodes = st.lists(
    st.lists(st.tuples(st.sampled_from(PHASES), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=5
)


def dataset(recorded: list[list[tuple[str, bool]]], imitate: list[bool] | None = None) -> TokenDataset:
    """Rows are numbered; proprio holds the episode."""
    lengths = torch.tensor([len(blocks) + 1 for blocks in recorded])
    total = int(lengths.sum())
    owner = torch.repeat_interleave(torch.arange(len(recorded)), lengths)
    return TokenDataset(
        torch.arange(total)[:, None],
        owner[:, None].float(),
        torch.zeros(total, 1, 1),
        torch.arange(total) / total,
        torch.tensor([flag for blocks in recorded for flag in (False, *(solved for _, solved in blocks))]),
        tuple("push it" for _ in recorded),
        torch.tensor(imitate or [True] * len(recorded)),
        lengths.cumsum(0) - lengths,
        lengths,
        torch.arange(len(recorded)) % 2,
        tuple(tuple(phase for phase, _ in blocks) for blocks in recorded),
    )


def draw(index: SubgoalIndex, batch: int, steps: int, seed: int = 0):
    texts = torch.arange(len(index.tokens.length_E))[:, None]
    sentences = torch.arange(len(index.sentences))[:, None]
    return index.sample(batch, steps, texts, sentences, torch.Generator().manual_seed(seed))


@given(recorded=episodes, steps=st.integers(1, 4), seed=st.integers(0, 9))
def test_windows_follow_one_episode_and_keyframes_end_segments(recorded, steps, seed) -> None:
    tokens = dataset(recorded)
    index = SubgoalIndex.build(tokens, lambda instruction: SENTENCES)
    if not len(index.starts_W):
        assert not bool(tokens.success_M.any())
        return
    batch = draw(index, 64, steps, seed)
    rows_BT = batch.codes_BTN[:, :, 0]
    assert bool((batch.proprio_BTP == batch.proprio_BTP[:, :1]).all()), "a window crosses episodes"
    assert torch.equal(batch.text_BL[:, 0].float(), batch.proprio_BTP[:, 0, 0])
    for rows, follows in zip(rows_BT.tolist(), batch.follows_BT.tolist(), strict=True):
        first = int(tokens.first_E[(tokens.first_E <= rows[0]).sum() - 1])
        episode = int((tokens.first_E <= rows[0]).sum()) - 1
        phases = tokens.phases[episode]
        assert follows[0] != UNKNOWN
        over = False
        for row, follow, after in zip(rows, follows, [*rows[1:], None], strict=True):
            if over:
                assert follow == UNKNOWN, "something follows the end"
                continue
            assert (follow == DONE) == bool(tokens.success_M[row]) or follow == UNKNOWN
            over = follow <= DONE
            if follow <= DONE or after is None:
                continue
            # The keyframe is the last state of its segment: no other subtask, no success before it, one of them in it.
            assert after > row
            phase = index.sentences[follow].removesuffix(" it")
            between = [phases[state - first] for state in range(row, after)]
            assert {label for label in between if label in ORDER} <= {phase}
            assert not bool(tokens.success_M[row:after].any())
            at = after - first
            later = next((label for label in phases[at:] if label in ORDER), None)
            assert bool(tokens.success_M[after]) or ORDER.index(str(later)) > ORDER.index(phase)
    assert torch.equal(batch.subtasks_BTL[..., 0] > 0, batch.shown_BT)


def test_only_what_is_worth_imitating_and_succeeds_is_shown() -> None:
    good = [("approach", False), ("push", True)]
    tokens = dataset([good, good, [("approach", False), ("push", False)]], [True, False, True])
    index = SubgoalIndex.build(tokens, lambda instruction: SENTENCES)
    assert index.starts_W.tolist() == [0, 1, 2] and index.episode_W.tolist() == [0, 0, 0]
    assert not len(SubgoalIndex.build(tokens, lambda instruction: {}).sentences[1:])


def test_environments_are_drawn_alike_and_few_windows_start_at_the_end() -> None:
    long = [("approach", False)] * 6 + [("push", True)]
    index = SubgoalIndex.build(dataset([long, [("push", True)] * 8]), lambda instruction: SENTENCES)
    batch = draw(index, 20_000, 1)
    assert float((batch.proprio_BTP[:, 0, 0] == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float((batch.follows_BT[:, 0] == DONE).float().mean()) == pytest.approx(DONE_SHARE, abs=0.01)


def test_same_seed_same_windows() -> None:
    index = SubgoalIndex.build(dataset([[("approach", False), ("push", True)]] * 3), lambda instruction: SENTENCES)
    first, again, other = (draw(index, 16, 2, seed) for seed in (1, 1, 2))
    assert torch.equal(first.codes_BTN, again.codes_BTN) and torch.equal(first.follows_BT, again.follows_BT)
    assert not torch.equal(first.codes_BTN, other.codes_BTN)


def test_windows_with_further_to_go_are_drawn_more_often() -> None:
    """In proportion to the blocks left; each environment and what is done keep their shares."""
    weight_W = _weights(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([3, 1, 0, 2, 2]))
    going = 1 - DONE_SHARE
    torch.testing.assert_close(weight_W, torch.tensor([0.75 * going, 0.25 * going, DONE_SHARE, going / 2, going / 2]))
