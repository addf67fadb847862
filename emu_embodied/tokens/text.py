"""Text to token ids: bytes for our small presets, Emu3.5's vocabulary for the released model."""

from __future__ import annotations

import binascii
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from emu_embodied.files import write_atomically
from emu_embodied.require import require


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255: no file, no unknown words."""

    vocabulary_size = 256
    """Number of ids [tokens]."""

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes of a text; what UTF-8 cannot hold (lone surrogates) becomes ``?``."""
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids in 0..255; bytes that are not UTF-8 become U+FFFD."""
        return bytes(ids).decode("utf-8", errors="replace")


_RANKS = 151_643
_NAMED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_EXTRAS = 205
_IMAGE = ("<|image token|>", "<|image start|>", "<|image end|>")
_VISUAL = 131_072
_SPECIAL = re.compile(
    r"<\|(?:endoftext|im_start|im_end|extra_(?:0|[1-9]\d{0,2})|image (?:token|start|end)|visual token \d{6})\|>",
    re.ASCII,
)
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TextTokenizer:
    """Emu3.5's text tokenizer: Qwen's byte-pair ranks, then special, image and visual tokens.

    The ids of all tokens beyond the byte-pair ranks follow from their names, so the list of 131,075 image and visual
    tokens that the official folder also holds is not read.

    Args:
        ranks: byte string -> id, ids 0..len - 1 (``from_pretrained`` reads them).
    """

    FILE = "emu3.tiktoken"

    def __init__(self, ranks: dict[bytes, int]) -> None:
        tiktoken = require("tiktoken", extra="emu35")
        self._bytes = tiktoken.Encoding("emu3", pat_str=_SPLIT, mergeable_ranks=ranks, special_tokens={})
        self._first_extra = len(ranks) + len(_NAMED)
        self._first_image = self._first_extra + _EXTRAS
        self.first_visual = self._first_image + len(_IMAGE)
        self.vocabulary_size = self.first_visual + _VISUAL
        self._ranks = len(ranks)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TextTokenizer:
        """Read ``emu3.tiktoken`` from an official folder.

        Raises:
            ValueError: naming the file, if it is missing or damaged.
        """
        path = Path(folder) / cls.FILE
        if not path.is_file():
            raise ValueError(f"{path} is missing: give the folder of Emu3.5's text tokenizer, which holds {cls.FILE}")
        return cls(_read_ranks(path))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``emu3.tiktoken`` into ``folder``."""
        tokens = (self._bytes.decode_single_token_bytes(rank) for rank in range(self._ranks))
        lines = [b"%b %d\n" % (binascii.b2a_base64(token, newline=False), rank) for rank, token in enumerate(tokens)]
        write_atomically(Path(folder) / self.FILE, lambda aside: aside.write_bytes(b"".join(lines)))

    def encode(self, text: str) -> list[int]:
        """Ids of a text in NFC; special tokens written in it (``<|extra_100|>`` ...) become their ids."""
        text = unicodedata.normalize("NFC", text)
        ids: list[int] = []
        start = 0
        for match in _SPECIAL.finditer(text):
            special = self.special_id(match.group())
            if special is not None:
                ids += self._bytes.encode_ordinary(text[start : match.start()])
                ids.append(special)
                start = match.end()
        return ids + self._bytes.encode_ordinary(text[start:])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens by their names; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: if an id is outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids: a token may end within a character, which only its successors complete.

        Raises:
            ValueError: if an id is outside the vocabulary.
        """
        pieces: list[bytes] = []
        run: list[int] = []
        for token in ids:
            if 0 <= token < self._ranks:
                run.append(token)
                continue
            pieces += (self._bytes.decode_bytes(run), self.special_name(token).encode())
            run = []
        return b"".join([*pieces, self._bytes.decode_bytes(run)])

    def special_id(self, name: str) -> int | None:
        """Id of a special token by its name, e.g. ``<|visual token 000000|>``; None if there is no such token."""
        if name in _NAMED:
            return self._ranks + _NAMED.index(name)
        if name in _IMAGE:
            return self._first_image + _IMAGE.index(name)
        if not _SPECIAL.fullmatch(name):
            return None
        number = int("".join(filter(str.isdigit, name)))
        if name.startswith("<|extra"):
            return self._first_extra + number if number < _EXTRAS else None
        return self.first_visual + number if number < _VISUAL else None

    def special_name(self, token: int) -> str:
        """Name of a special token by its id.

        Raises:
            ValueError: if the id is not that of a special token.
        """
        if not self._ranks <= token < self.vocabulary_size:
            raise ValueError(f"token id {token} is no special token of this vocabulary of {self.vocabulary_size} ids")
        if token < self._first_extra:
            return _NAMED[token - self._ranks]
        if token < self._first_image:
            return f"<|extra_{token - self._first_extra}|>"
        if token < self.first_visual:
            return _IMAGE[token - self._first_image]
        return f"<|visual token {token - self.first_visual:06d}|>"


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Parse lines of ``base64 rank``."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected 'base64 rank', found {line[:40]!r}") from error
    if len(ranks) != _RANKS or set(ranks.values()) != set(range(_RANKS)):
        raise ValueError(f"{path} holds {len(ranks)} of {_RANKS} ranks: it is cut off, or of another tokenizer")
    return ranks
