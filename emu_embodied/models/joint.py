"""Several linear maps of one input as one product, without a second copy of their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn


class Direct(nn.Module):
    """A module whose call costs no more than its ``forward`` as long as no hook is to see it.

    ``nn.Module``'s own call and its attribute look-ups cost as much as the arithmetic on one token.
    """

    def __call__(self, *args: Any) -> Any:
        """``forward``."""
        state = self.__dict__
        if torch.is_grad_enabled() or state["_forward_hooks"] or state["_forward_pre_hooks"]:
            return super().__call__(*args)
        return self.forward(*args)


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``module(x)``, without the cost of the call where it does nothing but multiply by its weight."""
    weight = None if torch.is_grad_enabled() else _plain_weight(module)
    return module(x) if weight is None else F.linear(x, weight)


def _plain_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight, if calling the module does nothing but multiply by it."""
    state = module.__dict__
    if type(module) is not nn.Linear or "forward" in state or state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return None
    weight = state["_parameters"]["weight"]
    return weight if type(weight) is nn.Parameter else None


class JointLinear(Direct):
    """A module some of whose linear maps read the same input and are computed in one product.

    Decoding one token is bound by calls and by reading weights, so fewer and longer products count. At the first call
    without gradients the weights are laid one behind another in memory, and each map's own weight becomes a view of its
    part: state dicts, optimisers and adapters see what they always saw. Maps that are no plain ones (any more: adapted,
    quantised, offloaded) are called one by one.
    """

    joint_names: ClassVar[tuple[str, ...]]
    """Names of the linear maps."""

    _joint: torch.Tensor | None = None
    _addresses: list[int] | None = None
    _widths: list[int]

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[..., D] -> the output of each map, [..., width]."""
        modules = self._modules
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if [_address(modules[name]) for name in self.joint_names] != self._addresses:
                self._join()
            if self._joint is not None:
                return F.linear(x, self._joint).split_with_sizes(self._widths, -1)
        return tuple(modules[name](x) for name in self.joint_names)

    def _join(self) -> None:
        """Lay the weights one behind another, if they can be."""
        maps = [self._modules[name] for name in self.joint_names]
        self._joint, self._addresses = None, [_address(linear) for linear in maps]
        weights = [linear.weight for linear in maps]
        kinds = {(weight.dtype, weight.device) for weight in weights}
        if 0 in self._addresses or len(kinds) > 1 or weights[0].is_inference():
            return
        # Outside of inference mode, or the weights could never be trained again.
        with torch.inference_mode(False), torch.no_grad():
            self._widths = [len(weight) for weight in weights]
            self._joint = torch.cat([weight.detach() for weight in weights])
            for weight, part in zip(weights, self._joint.split(self._widths), strict=True):
                weight.data = part
        self._addresses = [_address(linear) for linear in maps]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self._joint = self._addresses = None  # the weights may move: hold no memory that nobody uses
        return super()._apply(fn, recurse)


def _address(module: nn.Module) -> int:
    """Where the weight lies; 0 if a call of the module may do more than multiply by it."""
    weight = _plain_weight(module)
    return 0 if weight is None else weight.data_ptr()
