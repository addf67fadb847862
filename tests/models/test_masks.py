import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_embodied.models.attention import attend, attend_with_copies
from emu_embodied.models.masks import NoisyCopies, causal, causal_then_parallel, dida_training_mask


def allowed(query: int, key: int, clean: int, starts: list[int], block: int) -> bool:
    """Emu3.5, Fig. 9, written out for one pair of tokens."""

    def copy_of(token: int) -> int | None:
        return None if token < clean else (token - clean) // block

    if copy_of(query) is None:
        return copy_of(key) is None and key <= query
    if copy_of(key) is None:
        return key < starts[copy_of(query)]
    return copy_of(key) == copy_of(query)


@st.composite
def layouts(draw):
    clean = draw(st.integers(1, 14))
    starts = draw(st.lists(st.integers(0, clean), max_size=3))
    return clean, starts, draw(st.integers(1, 5))


@given(layouts())
@settings(max_examples=40, deadline=None)
def test_training_mask_is_the_predicate(layout):
    clean, starts, block = layout
    mask = dida_training_mask(clean, starts, block)
    length = clean + len(starts) * block
    assert mask.dtype == torch.bool and mask.shape == (length, length)
    expected = [[allowed(query, key, clean, starts, block) for key in range(length)] for query in range(length)]
    assert mask.tolist() == expected
    assert torch.equal(NoisyCopies(clean, tuple(starts), block).dense(), mask)


@pytest.mark.parametrize("clean, noisy", [(0, 4), (3, 4), (5, 0)])
def test_decoding_mask_is_the_last_block_of_a_training_mask(clean, noisy):
    assert torch.equal(causal_then_parallel(clean, noisy), dida_training_mask(clean, [clean], noisy))


def test_causal():
    assert causal(3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]


def test_a_block_outside_the_clean_stream_is_refused():
    with pytest.raises(ValueError, match=r"block_starts \[7\] must lie in \[0, 6\]"):
        dida_training_mask(6, [7], 2)


def heads(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention written out: [S, T, H, D] queries, [S, G, E, D] keys and values."""
    groups = query.shape[2] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("sthd,shed->shte", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("shte,shed->sthd", weights, value)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_masked_attention_equals_eager(groups):
    clean, starts, block = 11, [3, 7], 4
    mask = dida_training_mask(clean, starts, block)
    query, key, value = heads(0, 2, 19, 4, 8), heads(1, 2, groups, 19, 8), heads(2, 2, groups, 19, 8)
    expected = eager(query, key, value, mask)
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(attend(query, key, value, bias), expected)
    torch.testing.assert_close(
        F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=mask, enable_gqa=True).transpose(
            1, 2
        ),
        expected,
    )
    torch.testing.assert_close(
        attend_with_copies(query, key, value, NoisyCopies(clean, tuple(starts), block)), expected
    )


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("case", ["causal", "bias", "open", "padded prefix"])
def test_attention_over_a_shared_prefix_equals_separate_copies(groups, case, grad):
    """Both ways of computing it: joined parts (inference on a CPU) and expanded copies (elsewhere)."""
    tokens, prefix_length = 5, 7
    own_length = tokens if case == "causal" else 9
    query, key, value = (
        heads(0, 3, tokens, 4, 8),
        heads(1, 3, groups, own_length, 8),
        heads(2, 3, groups, own_length, 8),
    )
    prefix = (heads(3, 1, groups, prefix_length, 8), heads(4, 1, groups, prefix_length, 8))
    own = torch.ones(tokens, own_length, dtype=torch.bool)
    if case == "causal":
        own = causal(tokens)
    elif case != "open":
        own[:3, 5:] = False
    seen = torch.ones(prefix_length, dtype=torch.bool)
    if case == "padded prefix":
        seen[-2:] = False
    mask = torch.cat([seen.expand(tokens, -1), own], 1)
    full_key, full_value = (
        torch.cat([part.expand(3, -1, -1, -1), rest], 2) for part, rest in zip(prefix, (key, value), strict=True)
    )

    def bias(mask: torch.Tensor) -> torch.Tensor:
        return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)

    with torch.set_grad_enabled(grad):
        found = attend(
            query,
            key,
            value,
            bias(own) if case in ("bias", "padded prefix") else None,
            causal=case == "causal",
            prefix=prefix,
            prefix_bias=bias(seen[None]) if case == "padded prefix" else None,
        )
    torch.testing.assert_close(found, eager(query, full_key, full_value, mask))
