"""Calls of a network's parts at the price of their arithmetic, and linear maps of one input as one product.

Decoding one token of a small model is bound by calls: ``nn.Module``'s costs as much as the arithmetic it wraps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

Call = Callable[..., Any]


def cheapest(module: nn.Module) -> Call:
    """The cheapest call that does what ``module(...)`` does at this moment.

    That is the module itself wherever somebody may listen or have changed it: gradients, hooks, tracing, offloading,
    adapters, quantised weights.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return module
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return module
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    if type(module) is nn.Embedding and module.max_norm is None:
        return partial(F.embedding, weight=module.weight)
    return module.bare() if isinstance(module, Bare) else module


class Bare(nn.Module):
    """A module that may be called without ceremony."""

    def bare(self) -> Call:
        """The function behind ``forward``."""
        return self.forward


class Bound(Bare, ABC):
    """A module that calls its parts through functions which it looks up once for many calls.

    Attributes:
        calls: what ``look_up`` found last. Hooks and replaced parts count from the next ``bind`` on.
    """

    calls: tuple[Call, ...] | None = None

    @abstractmethod
    def look_up(self) -> tuple[Call, ...]:
        """How to call the parts; each as ``cheapest`` finds it."""

    def bind(self) -> tuple[Call, ...]:
        """Look up how to call the parts; kept for later calls unless gradients are on."""
        calls = self.look_up()
        self.calls = None if torch.is_grad_enabled() else calls
        return calls

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self.calls = None  # if the weights move, hold no memory that nobody uses
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which look up for themselves."""
        return {**self.__dict__, "calls": None}


class JointLinear(Bound):
    """A module some of whose linear maps read the same input and are computed in one product.

    ``join`` lays their weights one behind another in memory. Each map's own weight is a view of its part, so state
    dicts, optimisers and adapters see what they always saw, and no weight exists twice.
    """

    joint_names: ClassVar[tuple[str, ...]]
    """Names of the linear maps."""

    def joint(self) -> torch.Tensor | None:
        """One view of all weights, where the product with it does what calling the maps would do; else None."""
        calls = [cheapest(module) for module in self._maps()]
        if not all(isinstance(call, partial) and call.func is F.linear for call in calls):
            return None
        return _adjacent(self._weights())

    def join(self) -> None:
        """Lay the weights one behind another, if they can be."""
        with torch.inference_mode(False), torch.no_grad():  # or the weights could never be trained again
            weights = self._weights()
            plain = all(type(module) is nn.Linear for module in self._maps())
            if plain and _alike(weights) and _adjacent(weights) is None:
                parts = torch.cat([weight.detach() for weight in weights]).split([len(weight) for weight in weights])
                for weight, part in zip(weights, parts, strict=True):
                    weight.data = part

    def _maps(self) -> list[nn.Module]:
        return [self.get_submodule(name) for name in self.joint_names]

    def _weights(self) -> list[Any]:
        return [module._parameters.get("weight") for module in self._maps()]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.join()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose weights are copied one by one."""
        super().__setstate__(state)
        self.join()


def _alike(weights: Sequence[Any]) -> bool:
    """Whether these are plain parameters in memory, of one kind and width."""
    return (
        all(type(weight) is nn.Parameter and not (weight.is_meta or weight.is_inference()) for weight in weights)
        and len({(weight.dtype, weight.device, weight.shape[1:]) for weight in weights}) == 1
    )


def _adjacent(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One view of all weights, where they lie one behind another."""
    first, place = weights[0].detach(), weights[0].storage_offset()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and not weight.is_meta
        if not same or weight.storage_offset() != place or not weight.is_contiguous() or weight.dtype != first.dtype:
            return None
        place += weight.numel()
    return first.as_strided((sum(len(weight) for weight in weights), *first.shape[1:]), first.stride())
