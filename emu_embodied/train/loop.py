"""One training loop for the tokenizer, next-token, DiDA and policy stages.

A stage hands in a module and a function that draws a batch and returns its loss. All randomness of step ``i`` comes
from a generator seeded by ``(seed, i)``, so a resumed run repeats the uninterrupted one bit for bit. Only
``max_minutes`` gives that up: with a time budget the learning rate follows the clock.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from emu_embodied.hardware import pick_device, pick_dtype
from emu_embodied.train.log import TrainingLog
from emu_embodied.train.optimizers import OptimizerName, build_optimizer
from emu_embodied.train.state import Progress, has_state, load_state, save_state

_SMOOTHING = 0.98
"""Memory of the loss that the divergence guard watches (about 50 steps)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How long, how fast and on what to train."""

    steps: int = 1000
    """Optimizer steps after which the run is complete, counted over all calls."""
    max_minutes: float | None = None
    """Time budget of this call [min]; a resumed call gets its own. The learning rate then follows whichever is further
    on, the steps or the clock, so a run that is cut by time still ends decayed."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    min_lr_ratio: float = 0.05
    """Learning rate at the end as a fraction of the peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """``cosine`` decays throughout; ``wsd`` (warm-up, stable, decay) only in the last ``decay_fraction``."""
    decay_fraction: float = 0.2
    """Last part of a ``wsd`` run in which the rate falls linearly [fraction of the run]."""
    optimizer: OptimizerName = "adamw"
    """``muon`` updates hidden matrices by Muon and the rest by AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decays."""
    weight_decay: float = 0.05
    """AdamW's weight decay, applied to matrices and kernels, not to norms, biases or embeddings."""
    clip_norm: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    ema_decay: float = 0.0
    """Decay of the averaged weights that are evaluated and saved; 0 keeps the raw weights."""
    divergence_factor: float = 3.0
    """The run stops when the smoothed loss stays above this many times its best value ..."""
    divergence_patience: int = 200
    """... for this many steps in a row."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 200
    """Steps between evaluations."""
    save_every: int = 200
    """Steps between saves."""
    seed: int = 0
    """Seed of every batch and every noise draw."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's own choice."""
    device: str = "auto"
    """``auto`` (CUDA if there is any), ``cpu``, ``cuda`` or ``cuda:1``."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the forward pass (autocast; weights stay float32). ``auto`` is bfloat16 where hardware multiplies it."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: naming the field and its range.
        """
        for name in ("steps", "log_every", "eval_every", "save_every", "divergence_patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it has to be at least 1")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"max_minutes is {self.max_minutes}, it has to be positive (or left out)")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, it has to lie in [0, 1)")
        if self.schedule not in ("cosine", "wsd"):
            raise ValueError(f"schedule is {self.schedule!r}, choose cosine or wsd")


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What one training step computed.

    Attributes:
        loss: scalar to minimise, still attached to the graph.
        logs: further figures for the log, averaged over ``log_every`` steps (0-dim tensors are read only when logged).
        items: images or tokens in the batch, for the speed shown.
        guarded: whether the divergence guard watches this step; a stage turns it off where its loss jumps by design.
        rewritten: parameter name -> bool mask over its rows that were overwritten by hand before this step; their
            moments restart at zero and their average at the new value.
    """

    loss: torch.Tensor
    logs: Mapping[str, float | torch.Tensor] = field(default_factory=dict)
    items: int = 0
    guarded: bool = True
    rewritten: Mapping[str, torch.Tensor] = field(default_factory=dict)


class LossFunction(Protocol):
    """Draws the batch of a step and computes its loss."""

    def __call__(self, step: int, generator: torch.Generator) -> LossOutput:
        """All randomness has to come from ``generator`` (on the CPU); ``step`` counts from 0."""
        ...


@dataclass(frozen=True, slots=True)
class LoopResult:
    """How a run ended.

    Attributes:
        step: optimizer steps done over all calls.
        seconds: training time over all calls [s].
        stopped: ``steps`` (complete), ``time`` (budget used) or ``signal`` (interrupted; resume it).
        logs: the last log line.
    """

    step: int
    seconds: float
    stopped: Literal["steps", "time", "signal"]
    logs: dict[str, float]


class TrainingFailed(RuntimeError):
    """Training went wrong (NaN, divergence, collapse). The last good state stays on disk."""


def run_loop(
    config: LoopConfig,
    module: nn.Module,
    loss_fn: LossFunction,
    out: Path,
    *,
    stage: str,
    resume: bool,
    describe: dict[str, Any],
    save: Callable[[int], None] | None = None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    on_log: Callable[[dict[str, float]], None] | None = None,
    unit: str = "items",
    tensorboard: bool | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> LoopResult:
    """Train ``module`` in place; on return it holds the averaged weights (the raw ones without averaging).

    Files: ``out/train_<stage>.jsonl`` (one line per log), ``out/training/<stage>/`` (the state to resume from) and,
    where TensorBoard is installed, ``out/tensorboard/<stage>/``.

    Args:
        config: length, rate, device.
        module: what is trained; moved to the device.
        loss_fn: draws a batch and returns its loss; called under autocast.
        out: the run's folder.
        stage: ``tokenizer``, ``world``, ``dida`` ...
        resume: continue from the state in ``out`` if there is one.
        describe: JSON content that has to be the same when resuming (model, data hash, batch size).
        save: called with the step whenever a state is saved, with the averaged weights in ``module``.
        evaluate: figures logged as ``eval/<name>`` every ``eval_every`` steps and at the end, on the averaged weights.
        on_log: called with every log line.
        unit: what ``LossOutput.items`` counts, for the progress bar.
        tensorboard: None writes it if TensorBoard is installed.
        clock: seconds, monotonic.

    Raises:
        ValueError: if a state exists and ``resume`` is off, or the state does not fit.
        TrainingFailed: on a NaN or infinite loss or gradient, or divergence; names the step and the loss. What was good
            stays on disk: nothing is saved while the loss is above the guard's threshold.
    """
    folder = out / "training" / stage
    if has_state(folder) and not resume:
        raise ValueError(f"{folder} holds a training run: pass --resume to continue it, or another --out")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    module.to(device).train()
    optimizer = build_optimizer(config, module)
    average = {name: p.detach().clone() for name, p in module.named_parameters()} if config.ema_decay else {}
    progress = Progress(describe={"seed": config.seed, "optimizer": config.optimizer, **describe})
    if has_state(folder):
        progress = load_state(folder, module, optimizer, average, progress.describe)
    log = TrainingLog(out, stage, progress.step, on_log, tensorboard)
    run = _Run(config, module, optimizer, average, folder, progress, save, evaluate)
    started, seconds_before = clock(), progress.seconds
    stopped: Literal["steps", "time", "signal"] = "steps"
    bar = tqdm(
        total=config.steps,
        initial=progress.step,
        desc=f"train {stage}",
        unit="step",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 30,  # a log file wants a line now and then, not a film
    )
    try:
        with interruptible() as interrupted, bar:
            while run.progress.step < config.steps:
                step, step_started = run.progress.step, clock()
                elapsed = step_started - started
                if config.max_minutes is not None and elapsed >= 60 * config.max_minutes:
                    stopped = "time"
                    break
                done = schedule_progress(config, step, elapsed)
                rate = learning_rate(config, step, done)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    output = loss_fn(step, step_generator(config.seed, step))
                norm, loss = run.update(output, rate)
                step += 1
                now = clock()
                run.progress = replace(run.progress, seconds=seconds_before + now - started)
                log.add({"loss": loss, "grad_norm": norm, **output.logs}, output.items, now - step_started)
                bar.update()
                if step % config.log_every == 0:
                    line = log.write(step, {"lr": rate, "progress": done, "seconds": run.progress.seconds})
                    speed = f"{line['items_per_second']:.0f} {unit}/s"
                    bar.set_postfix_str(f"loss {line['loss']:.4f}, {speed}", refresh=False)
                if evaluate is not None and step % config.eval_every == 0 and step < config.steps:
                    log.write_figures(step, run.evaluate())
                if step % config.save_every == 0 and step < config.steps and not run.diverging:
                    run.save()
                if interrupted.is_set():
                    stopped = "signal"
                    break
            run.progress = replace(run.progress, seconds=seconds_before + clock() - started)
            run.refuse_divergence()
            if evaluate is not None and stopped != "signal":
                log.write_figures(run.progress.step, run.evaluate())
            run.save()
    finally:
        log.close()
    run.swap_average()
    module.eval()
    return LoopResult(run.progress.step, run.progress.seconds, stopped, log.last)


def schedule_progress(config: LoopConfig, step: int, elapsed: float) -> float:
    """How much of the run is over, in [0, 1]: the larger of the step and the time fraction (``elapsed`` in [s])."""
    done = step / config.steps
    if config.max_minutes is not None:
        done = max(done, elapsed / (60 * config.max_minutes))
    return min(done, 1.0)


def learning_rate(config: LoopConfig, step: int, done: float) -> float:
    """Learning rate of a step when the fraction ``done`` of the run is over."""
    low = config.min_lr_ratio
    if config.schedule == "cosine":
        ratio = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
    else:
        left = min(1.0, (1 - done) / config.decay_fraction)
        ratio = low + (1 - low) * left
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.learning_rate * ratio * warm


def step_generator(seed: int, step: int) -> torch.Generator:
    """The CPU generator of one step, a function of seed and step alone."""
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class _Run:
    """One optimizer step, evaluation and saving, with the averaged weights kept beside the raw ones."""

    def __init__(
        self,
        config: LoopConfig,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: dict[str, torch.Tensor],
        folder: Path,
        progress: Progress,
        save: Callable[[int], None] | None,
        evaluate: Callable[[], Mapping[str, float]] | None,
    ) -> None:
        self.config = config
        self.module = module
        self.optimizer = optimizer
        self.average = average
        self.folder = folder
        self.progress = progress
        self._save = save
        self._evaluate = evaluate
        self._parameters = dict(module.named_parameters())

    def update(self, output: LossOutput, rate: float) -> tuple[float, float]:
        """Apply one step; returns the gradient norm and the loss."""
        step, loss = self.progress.step, float(output.loss.detach())
        if not math.isfinite(loss):
            raise TrainingFailed(f"the loss became {loss} at step {step}; {self._advice()}")
        for name, rows in output.rewritten.items():
            self._restart_rows(name, rows)
        self.optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip_norm))
        if not math.isfinite(norm):
            raise TrainingFailed(f"the gradient norm became {norm} at step {step} (loss {loss:.4g}); {self._advice()}")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._update_average(step)
        self.progress = replace(self.progress, step=step + 1)
        if output.guarded and step >= self.config.warmup_steps:
            self._guard(loss)
        return norm, loss

    def evaluate(self) -> Mapping[str, float]:
        assert self._evaluate is not None
        self.swap_average()
        self.module.eval()
        try:
            with torch.no_grad():
                return self._evaluate()
        finally:
            self.swap_average()
            self.module.train()

    def save(self) -> None:
        save_state(self.folder, self.progress, self.module, self.optimizer, self.average)
        if self._save is not None:
            self.swap_average()
            try:
                self._save(self.progress.step)
            finally:
                self.swap_average()

    def swap_average(self) -> None:
        """Exchange raw and averaged weights (nothing without averaging)."""
        with torch.no_grad():
            for name, average in self.average.items():
                raw = self._parameters[name].detach().clone()
                self._parameters[name].copy_(average)
                average.copy_(raw)

    def _update_average(self, step: int) -> None:
        # The average starts short, so that the first, random weights do not linger in it.
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        if self.average:
            raw = [self._parameters[name].detach() for name in self.average]
            torch._foreach_lerp_(list(self.average.values()), raw, 1 - decay)

    def _restart_rows(self, name: str, rows: torch.Tensor) -> None:
        parameter = self._parameters[name]
        state = self.optimizer.state.get(parameter, {})
        for moment in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if moment in state:
                state[moment][rows] = 0
        if name in self.average:
            self.average[name][rows] = parameter.detach()[rows]

    def _guard(self, loss: float) -> None:
        p = self.progress
        smoothed = loss if p.smoothed is None else _SMOOTHING * p.smoothed + (1 - _SMOOTHING) * loss
        best = smoothed if p.best is None else min(p.best, smoothed)
        diverged = best > 0 and smoothed > self.config.divergence_factor * best
        bad_steps = p.bad_steps + 1 if diverged else 0
        self.progress = replace(p, smoothed=smoothed, best=best, bad_steps=bad_steps)
        if bad_steps >= self.config.divergence_patience:
            self.refuse_divergence()

    @property
    def diverging(self) -> bool:
        """Whether the loss is above the guard's threshold now."""
        return self.progress.bad_steps > 0

    def refuse_divergence(self) -> None:
        """Fail if the loss is above the guard's threshold: weights in that state are worth nothing."""
        p = self.progress
        if p.bad_steps:
            raise TrainingFailed(
                f"the loss diverged: {p.smoothed:.4g} at step {p.step}, {p.bad_steps} steps in a row above "
                f"{self.config.divergence_factor:g} x its best ({p.best:.4g}); {self._advice()}"
            )

    def _advice(self) -> str:
        kept = f"the last good state is kept in {self.folder}" if has_state(self.folder) else "nothing was saved yet"
        return f"{kept}; try a lower --learning-rate or a longer warm-up"


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal acts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask_to_stop(number: int, frame: object) -> None:
        event.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, ask_to_stop)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
