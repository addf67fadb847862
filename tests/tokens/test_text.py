from __future__ import annotations

import base64
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_embodied.tokens.text import ByteTokenizer, TextTokenizer

REFERENCE = Path(__file__).parents[2] / ".." / "shared" / "emu35_reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"{REFERENCE} holds the official files; absent")
PLAIN = st.text(st.characters(exclude_categories=["Cs"]))


@given(PLAIN)
def test_bytes_round_trip(text):
    ids = ByteTokenizer().encode(text)
    assert all(0 <= token < ByteTokenizer.vocabulary_size for token in ids)
    assert ByteTokenizer().decode(ids) == text


@given(st.lists(st.integers(0, 255)))
def test_any_bytes_decode(ids):
    assert isinstance(ByteTokenizer().decode(ids), str)


def test_bytes_that_are_no_text():
    assert ByteTokenizer().decode([0xFF, ord("a")]) == "�a"
    assert ByteTokenizer().encode("\ud800") == [ord("?")]


@pytest.fixture(scope="module")
def alphabet() -> TextTokenizer:
    """A tokenizer of single bytes: everything but the byte-pair ranks is as released."""
    pytest.importorskip("tiktoken")
    return TextTokenizer({bytes([byte]): byte for byte in range(256)})


SPECIAL = st.one_of(
    st.sampled_from(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    st.integers(0, 204).map("<|extra_{}|>".format),
    st.sampled_from(["<|image token|>", "<|image start|>", "<|image end|>"]),
    st.integers(0, 131_071).map("<|visual token {:06d}|>".format),
)
LOOKALIKE = st.sampled_from(
    ["<|extra_205|>", "<|extra_007|>", "<|visual token 131072|>", "<|visual token 7|>", "<|", "|>"]
)


@given(st.lists(st.one_of(PLAIN, SPECIAL, LOOKALIKE)).map("".join))
@settings(deadline=None)
def test_round_trip_with_special_tokens(alphabet, text):
    assert alphabet.decode(alphabet.encode(text)) == unicodedata.normalize("NFC", text)


@given(SPECIAL)
def test_special_tokens_are_one_id(alphabet, name):
    (token,) = alphabet.encode(name)
    assert token == alphabet.special_id(name) and alphabet.special_name(token) == name
    assert alphabet.encode(f"a{name}b") == [ord("a"), token, ord("b")]


@given(LOOKALIKE)
def test_lookalikes_are_text(alphabet, name):
    assert alphabet.special_id(name) is None
    assert alphabet.encode(name) == list(name.encode())


def test_ids_outside_the_vocabulary_are_refused(alphabet):
    for token in (-1, alphabet.vocabulary_size):
        with pytest.raises(ValueError, match=f"token id {token} is no special token"):
            alphabet.decode([token])


def test_text_is_composed(alphabet):
    assert alphabet.encode("e\u0301") == alphabet.encode("\u00e9") == list("é".encode())


@pytest.fixture(scope="module")
def official() -> TextTokenizer:
    pytest.importorskip("tiktoken")
    return TextTokenizer.from_pretrained(REFERENCE / "tokenizer")


@needs_reference
def test_ids_equal_the_official_tokenizer(official):
    for case in json.loads((REFERENCE / "text_ids.json").read_text()):
        assert official.encode(case["text"]) == case["ids"]
        assert official.decode(case["ids"]) == case["text"]
    assert official.vocabulary_size == 282_926
    assert official.encode("0123456789*") == [*range(15, 25), 9]


@needs_reference
def test_computed_image_tokens_are_those_of_the_official_list(official):
    names = (REFERENCE / "tokenizer" / "emu3_vision_tokens.txt").read_text().splitlines()
    assert [official.special_id(name) for name in names] == list(range(151_851, 282_926))


@needs_reference
@given(st.lists(st.one_of(PLAIN, SPECIAL)).map("".join))
@settings(deadline=None)
def test_official_round_trip(official, text):
    assert official.decode(official.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.fixture(scope="module")
def whole(official):
    """The official way: one tiktoken encoding that knows the special tokens (but for the many visual ones)."""
    import tiktoken

    ranks = {official._bytes.decode_single_token_bytes(token): token for token in range(151_643)}
    special = {official.special_name(token): token for token in range(151_643, 151_854)}
    return tiktoken.Encoding("whole", pat_str=official._bytes._pat_str, mergeable_ranks=ranks, special_tokens=special)


@needs_reference
@given(st.lists(st.one_of(PLAIN, SPECIAL.filter(lambda name: "visual" not in name))).map("".join))
@settings(deadline=None)
def test_splitting_at_special_tokens_equals_tiktoken_with_all_of_them(official, whole, text):
    assert official.encode(text) == whole.encode(unicodedata.normalize("NFC", text), allowed_special="all")


@pytest.mark.parametrize(
    "content, fault",
    [
        (None, "emu3.tiktoken is missing"),
        (b"not base64!! x\n", "emu3.tiktoken, line 1: expected 'base64 rank'"),
        (base64.b64encode(b"a") + b" 0\n", "emu3.tiktoken holds 1 of 151643 ranks"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, fault):
    if content is not None:
        (tmp_path / "emu3.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=fault):
        TextTokenizer.from_pretrained(tmp_path)
