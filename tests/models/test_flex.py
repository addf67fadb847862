"""FlexAttention against attention piece by piece and against the mask written out."""

import pytest
import torch

from emu_embodied.models.attention import attend, attend_with_copies
from emu_embodied.models.flex import attend_with_copies_flex, block_mask
from emu_embodied.models.masks import NoisyCopies

COPIES = [
    NoisyCopies(20, (6, 12), 7),
    NoisyCopies(300, (40, 140, 240), 60),
    NoisyCopies(9, (9,), 130),
]


def tensors(copies: NoisyCopies, device: str, *, grad: bool = False):
    generator = torch.Generator().manual_seed(0)
    length = copies.clean_length + len(copies.block_starts) * copies.block_length
    shapes = [(2, length, 4, 32), (2, 2, length, 32), (2, 2, length, 32)]
    return [torch.randn(shape, generator=generator).to(device).requires_grad_(grad) for shape in shapes]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("copies", COPIES, ids=["small", "several blocks", "no clean tokens after"])
def test_flex_attention_equals_the_pieces(copies):
    query, key, value = tensors(copies, "cpu")
    with torch.no_grad():
        found = attend_with_copies_flex(query, key, value, copies)
        torch.testing.assert_close(found, attend_with_copies(query, key, value, copies), atol=2e-6, rtol=1e-5)
        bias = torch.zeros(query.shape[1], query.shape[1]).masked_fill(~copies.dense(), -torch.inf)
        torch.testing.assert_close(found, attend(query, key, value, bias), atol=2e-6, rtol=1e-5)
    assert block_mask(copies, "cpu") is block_mask(copies, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has gradients on CUDA devices only")
@pytest.mark.parametrize("copies", COPIES, ids=["small", "several blocks", "no clean tokens after"])
def test_flex_attention_has_the_gradients_of_the_pieces(copies):
    grads = []
    for flex in (False, True):
        query, key, value = tensors(copies, "cuda", grad=True)
        same = NoisyCopies(copies.clean_length, copies.block_starts, copies.block_length, flex)
        attend_with_copies(query, key, value, same).square().sum().backward()
        grads.append([query.grad, key.grad, value.grad])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)
