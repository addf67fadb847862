"""Some tokens of a block that lies behind a cache's end, computed anew among the others as they are.

Shape letters: S sequences, K tokens computed, G key-value heads, D head dim.
"""

from __future__ import annotations

from copy import copy

import torch

from emu_embodied.models.cache import KeyValue, KVCache


class BlockCache(KVCache):
    """A cache whose last ``block`` keys were written behind its end and not kept; new ones replace some of these.

    It shares the memory of ``cache`` and is for calls of ``core`` with ``keep=0`` and nothing masked: each new token
    sees what the cache holds and the whole block, where the K new tokens are as this call makes them and the others as
    earlier calls left them.

    Args:
        cache: the cache behind which the block was written.
        block: tokens of the block.
        places_SK: int64 [S, K], the places in the block of the new tokens. A place may occur twice if the token does.
    """

    def __init__(self, cache: KVCache, block: int, places_SK: torch.Tensor) -> None:
        self.config, self.batch, self.capacity = cache.config, cache.batch, cache.capacity
        self.prefix, self.closed = cache.prefix, cache.closed
        self.keys, self.values = cache.keys, cache.values
        self.length = cache.length + block - places_SK.shape[1]
        self._places_SK = places_SK + cache.length
        self._rows_S1 = torch.arange(len(places_SK), device=places_SK.device)[:, None]

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, span: int) -> KeyValue:
        """Put new keys and values [S, G, K, D] in their places; see ``KVCache.write``."""
        keys, values = self.keys[layer], self.values[layer]
        rows_S1, places_SK = self._rows_S1.to(keys.device), self._places_SK.to(keys.device)
        keys[rows_S1, :, places_SK] = key.transpose(1, 2)
        values[rows_S1, :, places_SK] = value.transpose(1, 2)
        return keys.narrow(2, 0, span), values.narrow(2, 0, span)

    def rows(self, start: int, stop: int) -> BlockCache:
        """See ``KVCache.rows``."""
        part = super().rows(start, stop)
        assert isinstance(part, BlockCache)
        part._places_SK = self._places_SK[start:stop]
        part._rows_S1 = self._rows_S1[: stop - start]
        return part


def chosen(cache: KVCache, rows_S: torch.Tensor) -> KVCache:
    """A copy of some sequences of a cache (int64 [S]); its prefix stays shared."""
    part = copy(cache)
    part.batch = len(rows_S)
    part.keys = [keys[rows_S.to(keys.device)] for keys in cache.keys]
    part.values = [values[rows_S.to(values.device)] for values in cache.values]
    return part
