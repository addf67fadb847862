"""Keys and values of tokens already read, so that nothing is computed twice.

Shapes: layers x [B or S, kv heads, capacity, head dim].
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from emu_embodied.models.transformer import EmuConfig

KeyValue = tuple[torch.Tensor, torch.Tensor]

_STEP = 16
"""Attention on a CPU is up to a third faster over a multiple of this many keys; the surplus is masked [tokens]."""


def _round_up(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP


class KVCache:
    """Preallocated keys and values of up to ``capacity`` tokens for each of ``batch`` sequences.

    A cache may continue a ``prefix``: a cache of one sequence that all ``batch`` sequences share. The prefix is not
    copied; it is only read, and is closed to writing from then on (``fork`` it to append to what it holds), so that no
    cache which continues it can be changed behind its back.

    Args:
        config: the model's shape.
        batch: sequences held.
        capacity: tokens of each sequence, those of the prefix not counted.
        prefix: cache of batch 1 that every sequence continues.
        device: where to keep it, or where each layer computes (``EmuForCausalLM.devices``); the prefix's by default.
        dtype: of keys and values; the prefix's by default, else float32.

    Raises:
        ValueError: if ``prefix`` holds more than one sequence, or has a prefix itself.

    Attributes:
        length: own tokens held.
        closed: whether it serves as a prefix.
        keys: one tensor [batch, kv heads, capacity (rounded up), head dim] for each layer.
        values: likewise.
    """

    batch: int
    prefix: KVCache | None
    closed: bool
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def __init__(
        self,
        config: EmuConfig,
        batch: int,
        capacity: int,
        prefix: KVCache | None = None,
        device: torch.device | str | Sequence[torch.device] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if prefix is not None:
            _close(prefix)
            device = prefix.devices if device is None else device
            dtype = prefix.keys[0].dtype if dtype is None else dtype
        self.config = config
        self.batch = batch
        self.capacity = capacity
        self.prefix = prefix
        self.length = 0
        self.closed = False
        # Zeros, not empty: a masked key counts with weight 0, and 0 x NaN would be NaN.
        shape = (batch, config.num_key_value_heads, _round_up(capacity), config.head_dim)
        layers = config.num_hidden_layers
        places = [device] * layers if device is None or isinstance(device, torch.device | str) else device
        self.keys, self.values = (
            [torch.zeros(shape, device=place, dtype=dtype) for place in places] for _ in ("keys", "values")
        )

    @property
    def devices(self) -> list[torch.device]:
        """Where each layer's part lies."""
        return [keys.device for keys in self.keys]

    @property
    def total_length(self) -> int:
        """Tokens that a new token sees: those of the prefix and the own ones."""
        return self.length + (0 if self.prefix is None else self.prefix.length)

    def reserve(self, tokens: int) -> None:
        """Check that ``tokens`` more can be written.

        Raises:
            ValueError: if they do not fit, or if this cache serves as a prefix.
        """
        if self.closed:
            raise ValueError("this cache is shared as a prefix and may not change: append to a fork() of it")
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"the KV cache is full: {self.length} tokens held + {tokens} new > capacity {self.capacity}; "
                "make it with a larger capacity (tokens that are not kept need room too)"
            )

    def restart(self, prefix: KVCache) -> None:
        """Forget all own tokens and continue another prefix, in the memory that is there.

        Raises:
            ValueError: if ``prefix`` holds more than one sequence, or has a prefix itself, or if this cache is one.
        """
        if self.closed:
            raise ValueError("this cache is shared as a prefix and may not change: make another one")
        _close(prefix)
        self.prefix, self.length = prefix, 0

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` own tokens, one layer after another, so that little is held twice.

        Raises:
            ValueError: if this cache serves as a prefix.
        """
        if self.closed:
            raise ValueError("this cache is shared as a prefix and may not change: grow a fork() of it")
        if capacity > self.capacity:
            more = _round_up(capacity) - self.keys[0].shape[2]
            for tensors in (self.keys, self.values):
                for layer, tensor in enumerate(tensors):
                    tensors[layer] = torch.nn.functional.pad(tensor, (0, 0, 0, more))
            self.capacity = capacity

    def spans(self, tokens: int) -> tuple[int, int]:
        """How many keys attention reads for ``tokens`` new tokens: of the prefix, and own ones.

        For many tokens these are rounded up, and whatever lies beyond ``prefix.length`` and ``length + tokens`` must be
        masked.
        """
        prefix = 0 if self.prefix is None else self.prefix.length
        own = self.length + tokens
        return (_round_up(prefix), _round_up(own)) if tokens >= _STEP else (prefix, own)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, span: int) -> KeyValue:
        """Put new keys and values [batch, kv heads, T, head dim] behind those held, without counting them yet.

        Returns:
            The first ``span`` own keys and values with the new ones, views [batch, kv heads, span, head dim].
        """
        keys, values = self.keys[layer], self.values[layer]
        keys.narrow(2, self.length, key.shape[2]).copy_(key)
        values.narrow(2, self.length, key.shape[2]).copy_(value)
        return keys.narrow(2, 0, span), values.narrow(2, 0, span)

    def shared(self, layer: int, span: int) -> KeyValue | None:
        """The first ``span`` keys and values of the prefix, [1, kv heads, span, head dim], or None if it holds none."""
        if self.prefix is None or span == 0:
            return None
        return self.prefix.keys[layer][:, :, :span], self.prefix.values[layer][:, :, :span]

    def advance(self, tokens: int) -> None:
        """Count the first ``tokens`` of those just written as held; the others will be overwritten."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all own tokens from ``length`` on.

        Raises:
            ValueError: if fewer are held, or if this cache serves as a prefix.
        """
        if self.closed:
            raise ValueError("this cache is shared as a prefix and may not change: truncate a fork() of it")
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate to {length} tokens: {self.length} are held")
        self.length = length

    def rows(self, start: int, stop: int) -> KVCache:
        """The sequences ``start .. stop - 1`` of this cache: the same memory, with its own count of what is held."""
        part = copy(self)
        part.batch = stop - start
        part.keys = [keys[start:stop] for keys in self.keys]
        part.values = [values[start:stop] for values in self.values]
        return part

    def fork(self, room: int = 0) -> KVCache:
        """An independent, writable copy of what is held, with room for ``room`` tokens more. A prefix stays shared.

        The copy costs as much as reading the cache once; decisions are rare and prefixes are short.
        """
        fork = KVCache(
            self.config,
            self.batch,
            self.length + room,
            prefix=self.prefix,
            device=self.devices,
            dtype=self.keys[0].dtype,
        )
        for layer in range(len(self.keys)):
            fork.keys[layer][:, :, : self.length] = self.keys[layer][:, :, : self.length]
            fork.values[layer][:, :, : self.length] = self.values[layer][:, :, : self.length]
        fork.length = self.length
        return fork


def _close(prefix: KVCache) -> None:
    """Let a cache serve as a prefix."""
    if prefix.batch != 1 or prefix.prefix is not None:
        raise ValueError(f"a prefix must be one plain sequence, this one holds {prefix.batch} (or has a prefix)")
    prefix.closed = True


class BorrowedCache:
    """A cache of transformers behind the interface of ``KVCache``, so that its ``generate`` works.

    Args:
        cache: any of transformers' caches with ``update`` and ``get_seq_length``.
    """

    prefix = None

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.length = int(cache.get_seq_length())

    @property
    def total_length(self) -> int:
        """Tokens that a new token sees."""
        return self.length

    def reserve(self, tokens: int) -> None:
        """Nothing to check: it grows, or complains, by itself."""

    def spans(self, tokens: int) -> tuple[int, int]:
        """Keys read for ``tokens`` new tokens: none of a prefix, all own ones."""
        return 0, self.length + tokens

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, span: int) -> KeyValue:
        """See ``KVCache.write``."""
        keys, values = self.cache.update(key, value, layer)
        return keys[:, :, :span], values[:, :, :span]

    def shared(self, layer: int, span: int) -> KeyValue | None:
        """There is no prefix."""
        return None

    def advance(self, tokens: int) -> None:
        """It counts by itself."""
