from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_embodied.models import transformer
from emu_embodied.models.cache import KVCache
from emu_embodied.models.masks import causal_then_parallel
from emu_embodied.models.transformer import EmuConfig, EmuForCausalLM

CONFIG = EmuConfig(
    vocab_size=31,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


@pytest.fixture(scope="module")
def model() -> EmuForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EmuForCausalLM(CONFIG).eval().requires_grad_(False)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def run(model: EmuForCausalLM, embeds: torch.Tensor, cache: KVCache, **options) -> torch.Tensor:
    start = cache.total_length
    return model.core(embeds, torch.arange(start, start + embeds.shape[1]), cache=cache, **options)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_cached_equals_uncached(model, pieces, batch):
    """Pieces below and above the length from which key counts are rounded up."""
    with torch.no_grad():
        embeds = draw(batch, sum(pieces), 32)
        cache = KVCache(CONFIG, batch, sum(pieces))
        found = torch.cat([run(model, piece, cache) for piece in embeds.split(pieces, dim=1)], 1)
        torch.testing.assert_close(found, model.core(embeds, torch.arange(sum(pieces))), atol=1e-5, rtol=1e-5)
    assert cache.length == sum(pieces)


@pytest.mark.parametrize("prefix_length, pieces", [(5, (3, 1, 20)), (16, (16, 16)), (33, (1, 1)), (17, (50,))])
def test_shared_prefix_equals_separate_copies(model, prefix_length, pieces):
    prefix, embeds = draw(1, prefix_length, 32), draw(4, sum(pieces), 32, seed=1)
    belief = KVCache(CONFIG, 1, prefix_length)
    run(model, prefix, belief)
    before = [tensor.clone() for tensor in belief.keys + belief.values]
    own = KVCache(CONFIG, 4, sum(pieces), prefix=belief)
    found = torch.cat([run(model, piece, own) for piece in embeds.split(pieces, dim=1)], 1)
    whole = torch.cat([prefix.expand(4, -1, -1), embeds], 1)
    expected = model.core(whole, torch.arange(whole.shape[1]))[:, prefix_length:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert own.keys[0].shape[2] < prefix_length + sum(pieces) + 16  # the prefix is not in it
    assert all(torch.equal(one, two) for one, two in zip(before, belief.keys + belief.values, strict=True))


def test_batch_equals_loop(model):
    prefix, embeds = draw(1, 9, 32), draw(5, 21, 32, seed=1)
    belief = KVCache(CONFIG, 1, 9)
    run(model, prefix, belief)
    together = run(model, embeds, KVCache(CONFIG, 5, 21, prefix=belief))
    alone = torch.cat([run(model, row[None], KVCache(CONFIG, 1, 21, prefix=belief)) for row in embeds])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("clean, noisy", [(3, 4), (10, 20)])
def test_forgotten_tokens_leave_no_trace(model, clean, noisy):
    """A noisy block is used in its call and forgotten, also when the call after it has other noise."""
    first, kept, later = draw(2, 6, 32), draw(2, clean, 32, seed=1), draw(2, 5, 32, seed=2)
    mask = causal_then_parallel(clean, noisy)
    after = []
    for seed in (3, 4):
        cache = KVCache(CONFIG, 2, 60)
        run(model, first, cache)
        block = draw(2, noisy, 32, seed=seed)
        run(model, torch.cat([kept, block], 1), cache, mask=mask, keep=clean)
        assert cache.length == 6 + clean
        run(model, block, cache, mask=torch.ones(noisy, noisy, dtype=torch.bool), keep=0)
        after.append(run(model, later, cache))
    assert torch.equal(*after)
    whole = torch.cat([first, kept, later], 1)
    expected = model.core(whole, torch.arange(whole.shape[1]))[:, 6 + clean :]
    torch.testing.assert_close(after[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("clean, noisy", [(3, 4), (10, 20)])
def test_a_block_behind_the_cache_equals_the_same_without_one(model, clean, noisy):
    past, new = draw(2, 6, 32), draw(2, clean + noisy, 32, seed=1)
    cache = KVCache(CONFIG, 2, 60)
    run(model, past, cache)
    found = run(model, new, cache, mask=causal_then_parallel(clean, noisy), keep=clean)
    mask = causal_then_parallel(6 + clean, noisy)
    expected = model.core(torch.cat([past, new], 1), torch.arange(6 + clean + noisy), mask)[:, 6:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_truncate_returns_to_an_earlier_state(model):
    cache = KVCache(CONFIG, 1, 40)
    run(model, draw(1, 10, 32), cache)
    expected = run(model, draw(1, 4, 32, seed=1), cache)
    cache.truncate(10)
    run(model, draw(1, 20, 32, seed=2), cache)
    cache.truncate(10)
    assert torch.equal(run(model, draw(1, 4, 32, seed=1), cache), expected)
    with pytest.raises(ValueError, match="cannot truncate to 15 tokens: 14 are held"):
        cache.truncate(15)


def test_fork_is_independent_and_a_prefix_is_closed(model):
    belief = KVCache(CONFIG, 1, 20)
    run(model, draw(1, 10, 32), belief)
    candidates = KVCache(CONFIG, 3, 40, prefix=belief)
    expected = run(model, draw(3, 5, 32, seed=1), candidates, keep=0)
    with pytest.raises(ValueError, match="shared as a prefix"):
        run(model, draw(1, 2, 32), belief)
    with pytest.raises(ValueError, match="shared as a prefix"):
        belief.truncate(3)
    later = belief.fork(room=10)
    run(model, draw(1, 10, 32, seed=2), later)
    assert (belief.length, later.length) == (10, 20)
    assert torch.equal(run(model, draw(3, 5, 32, seed=1), candidates, keep=0), expected)
    with pytest.raises(ValueError, match="20 tokens held"):
        run(model, draw(1, 1, 32), later)


def test_fork_of_candidates_keeps_their_prefix(model):
    belief = KVCache(CONFIG, 1, 10)
    run(model, draw(1, 10, 32), belief)
    candidates = KVCache(CONFIG, 3, 40, prefix=belief)
    run(model, draw(3, 5, 32, seed=1), candidates)
    fork = candidates.fork(room=4)
    new = draw(3, 4, 32, seed=2)
    assert fork.prefix is belief
    assert torch.equal(run(model, new, fork), run(model, new, candidates))


def test_overflow_is_refused_before_anything_is_written(model):
    cache = KVCache(CONFIG, 1, 12)
    run(model, draw(1, 10, 32), cache)
    before = [tensor.clone() for tensor in cache.keys]
    with pytest.raises(ValueError, match=r"10 tokens held \+ 3 new > capacity 12"):
        run(model, draw(1, 3, 32), cache, keep=0)
    assert cache.length == 10 and all(torch.equal(*pair) for pair in zip(before, cache.keys, strict=True))


def test_a_prefix_is_one_plain_sequence():
    with pytest.raises(ValueError, match="this one holds 2"):
        KVCache(CONFIG, 3, 4, prefix=KVCache(CONFIG, 2, 4))
    chain = KVCache(CONFIG, 1, 4, prefix=KVCache(CONFIG, 1, 4))
    with pytest.raises(ValueError, match="has a prefix"):
        KVCache(CONFIG, 3, 4, prefix=chain)


def test_a_cache_is_for_inference(model):
    with torch.enable_grad(), pytest.raises(ValueError, match="for inference"):
        run(model, draw(1, 3, 32), KVCache(CONFIG, 1, 4))


def test_forward_takes_our_cache(model):
    tokens = torch.arange(12)[None]
    cache = KVCache(CONFIG, 1, 12)
    parts = [model(input_ids=part, past_key_values=cache).logits for part in tokens.split([7, 1, 4], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(input_ids=tokens).logits, atol=1e-5, rtol=1e-5)


def test_sequences_in_portions_equal_all_at_once(model, monkeypatch):
    """On a CPU few sequences at a time go through all layers; cache, prefix and masks of each its own follow."""
    belief = KVCache(CONFIG, 1, 9)
    run(model, draw(1, 9, 32), belief)
    embeds, later = draw(5, 21, 32, seed=1), draw(5, 3, 32, seed=2)
    masks = causal_then_parallel(8, 13).expand(5, -1, -1).clone()
    masks[3, 8:, 2] = False
    found = []
    for budget in (10_000, 2 * 21 * torch.get_num_threads()):
        monkeypatch.setattr(transformer, "CPU_TOKENS", budget)
        cache = KVCache(CONFIG, 5, 60, prefix=belief)
        block = run(model, embeds, cache, mask=masks, keep=8)
        assert cache.length == 8
        found.append((block, run(model, later, cache)))
    for whole, portions in zip(*found, strict=True):
        torch.testing.assert_close(portions, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", [1, 8, 20])
def test_what_is_not_read_out_changes_nothing_else(model, first):
    embeds, later = draw(2, 21, 32), draw(2, 3, 32, seed=1)
    for mask in (None, causal_then_parallel(8, 13)):
        caches = [KVCache(CONFIG, 2, 60) for _ in range(2)]
        for cache in caches:
            run(model, draw(2, 4, 32, seed=2), cache)
        whole = run(model, embeds, caches[0], mask=mask)
        torch.testing.assert_close(run(model, embeds, caches[1], mask=mask, first=first), whole[:, first:])
        torch.testing.assert_close(run(model, later, caches[1]), run(model, later, caches[0]))
    with pytest.raises(ValueError, match="first needs one"):
        model.core(embeds, torch.arange(21), first=first)
