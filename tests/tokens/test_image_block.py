from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_embodied.tokens.image_block import ASPECTS, Markup, block_length, grid, resized
from tests.interleaved_models import CODES, make_tokenizer

TEXT = make_tokenizer()
MARKUP = Markup.of(TEXT, CODES)
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@st.composite
def grids(draw):
    rows, columns = draw(SIZES)
    codes = draw(st.lists(st.integers(0, CODES - 1), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(codes).view(rows, columns)


@given(grids())
@settings(deadline=None, max_examples=50)
def test_a_block_is_written_as_released_and_read_back(codes):
    ids = MARKUP.block(codes)
    rows, columns = codes.shape
    lines = ("".join(f"<|visual token {code:06d}|>" for code in row) for row in codes.tolist())
    written = f"<|image start|>{rows}*{columns}<|image token|>{'<|extra_200|>'.join(lines)}<|image end|>"
    assert ids == TEXT.encode(written) and len(ids) == block_length((rows, columns))
    assert torch.equal(MARKUP.parse_block(ids), codes)


def test_lengths_of_the_released_grids():
    assert block_length((64, 64)) == 4167 and block_length((45, 45)) == 2077 and block_length((32, 32)) == 1063
    assert block_length((4, 100)) == 4 * 100 + 4 - 1 + 4 + 4


@pytest.mark.parametrize(
    "spoil, fault",
    [
        (lambda ids: ids[1:], "must start with BOI"),
        (lambda ids: ids[:-1], "end with EOI"),
        (lambda ids: [token for token in ids if token != MARKUP.times], "no two numbers"),
        (lambda ids: [*ids[:-2], ids[-1]], "says 2 rows of 3 codes"),
        (lambda ids: [MARKUP.vision.start if token == MARKUP.eol else token for token in ids], "2 rows of 3"),
        (lambda ids: [*ids[:-2], 5, ids[-1]], "ids outside"),
    ],
)
def test_broken_blocks_are_refused(spoil, fault):
    ids = MARKUP.block(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=fault):
        MARKUP.parse_block(spoil(ids))


@pytest.mark.parametrize("codes", [torch.zeros(4, dtype=torch.long), torch.full((1, 1), CODES), torch.full((1, 1), -1)])
def test_codes_that_make_no_block(codes):
    with pytest.raises(ValueError, match="codes"):
        MARKUP.block(codes)


def test_another_tokenizer_is_refused():
    reordered = {bytes([byte]): 255 - byte for byte in range(256)}
    with pytest.raises(ValueError, match="digits"):
        Markup.of(type(TEXT)(reordered), CODES)


@given(st.integers(16, 3000), st.integers(16, 3000), st.sampled_from([262_144, 518_400, 1_048_576]))
@settings(deadline=None)
def test_resizing_keeps_area_and_shape(height, width, area):
    rows, columns = resized(height, width, area)
    assert (
        abs(rows - (area * height / width) ** 0.5 / 16) <= 1
        and abs(columns - (area * width / height) ** 0.5 / 16) <= 1 + width / height
    )


def test_resizing_by_the_released_numbers():
    assert resized(720, 720, 518_400) == (45, 45)
    assert resized(480, 640, 518_400) == (39, 52)
    assert resized(1080, 1920, 1_048_576) == (48, 85)
    assert resized(8, 8, 64, cell=4) == (2, 2)


def test_images_too_small_or_too_narrow():
    with pytest.raises(ValueError, match="15 x 40 pixels is smaller than one cell of 16 x 16"):
        resized(15, 40, 1000)
    with pytest.raises(ValueError, match="no whole cell left"):
        resized(16, 4000, 10_000)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_the_released_grids_have_their_aspect(aspect):
    width, height = (int(side) for side in aspect.split(":"))
    rows, columns = grid(aspect)
    assert abs(columns / rows / (width / height) - 1) < 0.03 and 3900 < rows * columns <= 4100


def test_sizes_by_name():
    assert grid("auto") is None
    assert grid("512x768") == (32, 48) and grid("8x12", cell=4) == (2, 3)
    assert grid("1:1", area=518_400) == (45, 45) and grid("5:4") == (57, 72)
    for wrong in ("0:1", "big", "4:3:2", "7x7", "99999x16", "-4x4"):
        with pytest.raises(ValueError, match="image size"):
            grid(wrong)
