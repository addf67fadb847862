from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_embodied.decode.events import ImageDone, ImageStarted, Note, TextChunk
from emu_embodied.decode.stream import StreamGrammar, read_stream
from emu_embodied.tokens.image_block import Markup
from tests.interleaved_models import CODES, make_tokenizer

TEXT = make_tokenizer()
MARKUP = Markup.of(TEXT, CODES)
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=6)
STRUCTURE = [
    MARKUP.boi, MARKUP.img, MARKUP.eol, MARKUP.eoi, MARKUP.bog, MARKUP.eog, MARKUP.boc, MARKUP.eoc, MARKUP.bss,
    MARKUP.ess, MARKUP.eos, MARKUP.bos, MARKUP.times, ord("1"), ord("2"), MARKUP.vision.start, MARKUP.vision.start + 3,
    ord("a"), 0xC3, 0xA4, 300, -1, MARKUP.vision.stop,
]  # fmt: skip


def read(ids):
    return read_stream(ids, MARKUP, TEXT.decode_bytes)


@st.composite
def images(draw):
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    codes = draw(st.lists(st.integers(0, CODES - 1), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(codes).view(rows, columns)


@st.composite
def answers(draw):
    """Ids of a well-formed answer, and its segments as (kind, text or codes)."""
    ids, segments = [MARKUP.bss], []

    def say(kind, opening, closing):
        words = draw(WORDS)
        ids.extend([*opening, *words.encode(), *closing])
        segments.append((kind, words))

    if draw(st.booleans()):
        say("global_cot", [MARKUP.bog], [MARKUP.eog])
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            say("text", [], [])
        if draw(st.booleans()):
            say("image_cot", [MARKUP.boc], [MARKUP.eoc])
        codes = draw(images())
        ids.extend(MARKUP.block(codes))
        segments.append(("image", codes))
    return [*ids, MARKUP.ess, MARKUP.eos], segments


def plain(answer):
    return [(s.kind, s.text if s.codes is None else s.codes.tolist()) for s in answer.segments]


def expected(segments):
    kept = [(kind, part.tolist() if kind == "image" else part) for kind, part in segments]
    return [(kind, part) for kind, part in kept if kind != "text" or part.strip()]


@given(answers())
@settings(deadline=None, max_examples=60)
def test_well_formed_answers_are_read_back_without_a_note(made):
    ids, segments = made
    answer = read(ids)
    assert plain(answer) == expected(segments) and answer.notes == ()


@given(st.lists(st.sampled_from(STRUCTURE), max_size=40))
@settings(deadline=None, max_examples=300)
def test_any_ids_are_read(ids):
    answer = read(ids)
    for segment in answer.segments:
        if segment.codes is not None:
            assert segment.codes.dim() == 2 and 0 <= segment.codes.min() <= segment.codes.max() < CODES
        else:
            assert segment.text


@given(answers(), st.data())
@settings(deadline=None, max_examples=60)
def test_a_cut_stream_keeps_all_that_is_complete(made, data):
    ids, segments = made
    cut = data.draw(st.integers(0, len(ids)))
    answer = read(ids[:cut])
    whole = sum(token == MARKUP.eoi for token in ids[:cut])
    pictures = [part.tolist() for kind, part in segments if kind == "image"]
    got = [part for kind, part in plain(answer) if kind == "image"]
    depth = sum(token == MARKUP.boi for token in ids[:cut]) - whole
    # An image that lacks nothing but its EOI is complete too, and noted.
    assert got in (pictures[:whole], pictures[: whole + depth]) and len(answer.notes) >= depth
    inside = sum((token in (MARKUP.bog, MARKUP.boc)) - (token in (MARKUP.eog, MARKUP.eoc)) for token in ids[:cut])
    assert bool(answer.notes) == (depth + inside > 0)


@given(answers(), st.integers(0, 10_000), st.sampled_from(STRUCTURE))
@settings(deadline=None, max_examples=100)
def test_one_wrong_token_spoils_one_image_at_most(made, place, wrong):
    ids, segments = made
    place %= len(ids)
    answer = read([*ids[:place], wrong, *ids[place:]])
    pictures = [part.tolist() for kind, part in segments if kind == "image"]
    got = [part for kind, part in plain(answer) if kind == "image"]
    missing = [part for part in pictures if part not in got]
    assert len(missing) <= 1 and (not missing or answer.notes)


def test_notes_say_what_is_wrong():
    block = MARKUP.block(torch.arange(6).view(2, 3))
    broken = {
        "left out: the stream ends before its end (1 of 2 rows)": block[:-3],
        "has all its codes but no EOI: text follows": [*block[:-1], ord("x")],
        "its rows differ in length (1 of 2 rows)": [*block[:-2], block[-1]],
        "says 2 x 3 codes, it has 3 x 3": [*block[:-1], MARKUP.eol, *block[-4:-1], MARKUP.eoi],
        "does not say its size": [token for token in block if token not in (ord("2"), MARKUP.times)],
        "ends in an image's size": block[:3],
        "ends before its first code": [MARKUP.boi, MARKUP.eoi],
        "EOI (466) stands where text belongs": [MARKUP.eoi],
        "a visual token (467) stands where text belongs": [MARKUP.vision.start] * 5,
        "a thought (image_cot) was not closed": [MARKUP.boc, ord("a"), *block],
        "within a thought (global_cot) that was not closed": [MARKUP.bog, ord("a")],
        "the end of a thought (image_cot) that was not open": [MARKUP.eoc],
    }
    for note, ids in broken.items():
        answer = read([*MARKUP.block(torch.zeros(1, 2, dtype=torch.long)), ord("z"), *ids])
        assert any(note in found for found in answer.notes), (note, answer.notes)
        assert plain(answer)[0] == ("image", [[0, 0]]) and plain(answer)[1][1].startswith("z")


def test_an_image_that_contradicts_its_size_is_taken_as_it_is():
    codes = torch.arange(6).view(2, 3)
    block = MARKUP.block(codes)
    (segment,) = read([block[0], ord("9"), *block[2:]]).segments
    assert torch.equal(segment.codes, codes)


def test_characters_are_never_cut():
    grammar = StreamGrammar(MARKUP, TEXT.decode_bytes)
    pieces = [grammar.push(byte) for byte in "aä€".encode()]
    texts = [[event.text for event in events] for events in pieces]
    assert texts == [["a"], [], ["ä"], [], [], ["€"]]
    grammar.push("ä".encode()[0])
    assert grammar.close() == [TextChunk("\ufffd")]


def test_events_of_one_image():
    grammar = StreamGrammar(MARKUP, TEXT.decode_bytes)
    codes = torch.arange(4).view(2, 2)
    events = [event for token in MARKUP.block(codes) for event in grammar.push(token)]
    assert events[0] == ImageStarted(0, (2, 2)) and isinstance(events[1], ImageDone) and len(events) == 2
    assert torch.equal(events[1].codes, codes) and grammar.images == 1


def walk(grammar, choose):
    """Tokens by the grammar's own word until an image is complete."""
    grammar.push(MARKUP.boi)
    tokens = [MARKUP.boi]
    while grammar.in_image:
        step = grammar.step()
        tokens.append(step.forced if step.forced is not None else choose(step))
        assert step.ids.start <= tokens[-1] < step.ids.stop
        assert not any(isinstance(event, Note) for event in grammar.push(tokens[-1]))
    return tokens


def test_steps_lead_to_whole_images_of_the_size_asked_for():
    grammar = StreamGrammar(MARKUP, TEXT.decode_bytes, size=(3, 12))
    assert grammar.step().part == "text" and grammar.step().ids == MARKUP.text
    ids = walk(grammar, lambda step: step.ids.start + 4)
    assert MARKUP.parse_block(ids).tolist() == [[4] * 12] * 3


def test_free_sizes_have_two_digits_and_hold_for_the_images_after():
    for same in (True, False):
        grammar = StreamGrammar(MARKUP, TEXT.decode_bytes, same_size=same)
        first = MARKUP.parse_block(walk(grammar, lambda step: step.ids.start))
        second = MARKUP.parse_block(walk(grammar, lambda step: step.ids.start + 1))
        assert first.shape == (10, 10) and second.shape == ((10, 10) if same else (21, 21))
