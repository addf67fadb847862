"""What a machine can do at best, and how much of it decoding a state needs: the floors beside measured speeds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from emu_embodied.models.config import EmuConfig
from emu_embodied.tokens.sequence import SequenceLayout


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured in the run that the figures are from, with its threads, device and dtype."""

    gflop_per_s: float
    """Product of two square matrices [GFLOP/s]."""
    gb_per_s: float
    """Reading a matrix much larger than the caches, in a product with a vector [GB/s]."""


@dataclass(frozen=True, slots=True)
class Work:
    """What imagining one state for each of a batch of candidates takes at least."""

    gflop: float
    """Products of all candidates [GFLOP]."""
    gigabytes: float
    """Weights once a forward, and every key and value that a forward attends to once [GB]."""

    def seconds(self, machine: Machine) -> tuple[float, float]:
        """The floors of arithmetic and of memory bandwidth [s]; weights that fit into caches may beat the second."""
        return self.gflop / machine.gflop_per_s, self.gigabytes / machine.gb_per_s


def measure_machine(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> Machine:
    """Time both operations; the fastest of ``repeats`` counts.

    Args:
        device: where.
        dtype: of all numbers.
        size: side of the square matrices; those that are read have eight times as many rows and columns.
        repeats: measurements.
    """
    square = torch.ones(size, size, device=device, dtype=dtype)
    large = torch.ones(8 * size, 8 * size, device=device, dtype=dtype)
    product = best_seconds(lambda: square @ square, repeats, device)
    reading = best_seconds(lambda: large @ large[0], repeats, device)
    return Machine(2 * size**3 / product / 1e9, large.numel() * large.element_size() / reading / 1e9)


def clock(device: torch.device) -> float:
    """Now [s]: CPU time of this process where one thread computes, which other work disturbs less; else wall time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def best_seconds(call: Callable[[], object], repeats: int, device: torch.device, limit: float = float("inf")) -> float:
    """The fastest of ``repeats`` calls after one to warm up [s]; no further call once they have taken ``limit`` [s]."""
    fastest, spent = float("inf"), 0.0
    for i in range(repeats + 1):
        start = clock(device)
        call()
        seconds = clock(device) - start
        spent += seconds
        if i > 0 or spent > limit:
            fastest = min(fastest, seconds)
        if spent > limit:
            break
    return fastest


def layer_parameters(config: EmuConfig) -> int:
    """Weights of one layer's matrices."""
    heads = config.num_attention_heads + config.num_key_value_heads
    mlp = 3 * config.hidden_size * config.intermediate_size
    return 2 * config.hidden_size * heads * config.head_dim + mlp


def work_of_state(
    config: EmuConfig, layout: SequenceLayout, *, batch: int, context: int, passes: int, horizon: int, size: int = 4
) -> Work:
    """The work of one state, the mean over ``horizon`` of them.

    Args:
        config: the backbone.
        layout: the token stream.
        batch: candidates.
        context: tokens before the first state's action, shared by all candidates.
        passes: parallel passes, all of them in full; 0 is token by token.
        horizon: states imagined one after another.
        size: of a number [bytes].
    """
    state, action, layers = layout.state_tokens, layout.action_tokens, config.num_hidden_layers
    parallel = max(passes, 1) * state
    written = action + (state * (horizon - 1) / horizon if passes else 0)  # of the last state nothing is written
    tokens = parallel + written
    own = (horizon - 1) / 2 * (state + action) + action + state
    seen = context + own
    head = sum(len(positions) * ids.size for _, positions, ids in layout.readouts()) * config.hidden_size
    head_rows = sum(ids.size for _, _, ids in layout.readouts()) * config.hidden_size if passes else head / state
    weights = layers * layer_parameters(config)
    attention = 4 * layers * config.num_attention_heads * config.head_dim * seen * tokens
    forwards = passes or state
    cached = 2 * layers * config.num_key_value_heads * config.head_dim
    numbers_read = forwards * (weights + head_rows + cached * (context + batch * own))
    gflop = batch * (2 * weights * tokens + attention + 2 * head * max(passes, 1)) / 1e9
    return Work(gflop, numbers_read * size / 1e9)
