"""The trainer of all reinforcement loops: rounds of experience, each learned from for a few epochs.

A loop hands over what a round brought (``Experience``): tokens that were drawn, how good they turned out, and a
function that scores them anew. All randomness of a round comes from (seed, round), so that a resumed run repeats the
uninterrupted one bit for bit; a run can be resumed with a larger budget (a budget that ends within a round cuts it).

Shape letters: R rows (decisions, or imagined states), T tokens of a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from emu_embodied.hardware import pick_dtype
from emu_embodied.train.grpo import Diagnostics, GRPOConfig, grpo_loss, imitation_loss, token_weights
from emu_embodied.train.loop import TrainingFailed, interruptible, step_generator
from emu_embodied.train.rewards import RewardConfig
from emu_embodied.train.rl_log import METRICS, RLLog, collapse
from emu_embodied.train.rollouts import Spent
from emu_embodied.train.state import Progress, has_state, load_state, save_state


@dataclass(frozen=True, kw_only=True, slots=True)
class RLConfig:
    """How a checkpoint is reinforced."""

    rollouts: int = 1280
    """Budget: rollouts in the real simulator over all calls [rollouts]."""
    groups: int = 8
    """Groups of a round that are learned from [groups]."""
    objective: GRPOConfig = field(default_factory=GRPOConfig)
    """The loss."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What is wanted."""
    branch: Literal["episode", "block"] = "episode"
    """Loop ``policy``: a group is G whole episodes from one restored state, or G single blocks from it, at every state
    of one episode (as many env steps, counted as G rollouts): each block is then compared with others from the same
    state by what it changed at once, which takes rewards that grow on the way."""
    temperature: float = 1.0
    """Of the draw of tokens."""
    epochs: int = 2
    """How often a round's experience is gone through."""
    batch: int = 256
    """Rows of one optimizer step [rows]."""
    learning_rate: float = 1e-4
    """AdamW's rate, constant after ``warmup_steps`` (a budget that may be extended has no end to decay to)."""
    warmup_steps: int = 4
    """Optimizer steps of linear warm-up."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    least_spread: float = 0.02
    """A group whose rewards (on the scale 1 to 10) differ by no more has no signal and is drawn anew ..."""
    resamples: int = 2
    """... at most so often in a round."""
    entropy_floor: float = 0.02
    """The run stops when the mean entropy of a token stays below this [nat] ..."""
    kl_ceiling: float = 3.0
    """... or the KL to the reference above this [nat a token] ..."""
    ratio_ceiling: float = 3.0
    """... or the mean ratio of new to old probability above this, or below its inverse ..."""
    patience: int = 3
    """... for so many rounds in a row."""
    lora_rank: int = 0
    """Rank of adapters that are trained instead of the weights themselves; 0 trains the weights."""
    max_minutes: float | None = None
    """Time budget of this call [min]; a round that has begun is finished."""
    save_every: int = 1
    """Rounds between saves [rounds]."""
    lanes: int = 2
    """Parts of a batch that take turns between network and simulators; the bytes of a run depend on it."""
    workers: int = 0
    """Processes that simulate, 0 for none but this one; what is rolled out does not depend on it."""
    seed: int = 0
    """Seed of everything."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the update's forward pass (autocast; weights stay float32)."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: naming the field and its range.
        """
        for name in ("groups", "epochs", "batch", "patience", "save_every", "lanes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it has to be at least 1")
        if self.rollouts < self.objective.group:
            raise ValueError(f"a budget of {self.rollouts} rollouts holds no group of {self.objective.group}")
        for name in ("resamples", "lora_rank", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, it has to be at least 0")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}: groups of equal rollouts teach nothing, give more than 0"
            )
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"max_minutes is {self.max_minutes}, it has to be positive (or left out)")

    def describe(self) -> dict[str, Any]:
        """What has to be the same when a run is resumed."""
        free = ("rollouts", "max_minutes", "save_every", "workers", "patience")
        return {name: value for name, value in asdict(self).items() if name not in free}


Score = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Rows int64 [M] -> log-probabilities and entropies [M, T] of their tokens under the present weights, with gradient."""


@dataclass(frozen=True, slots=True)
class Experience:
    """What a round brought.

    Attributes:
        score: see ``Score``.
        old_RT: log-probabilities under the weights that drew the tokens; None for tokens to be imitated as they are.
        mask_RT: bool, tokens that count; if none does, the round changes nothing.
        rollout_R: int64, the rollout that a row belongs to, from 0 on.
        advantage_R: float32; not looked at for imitation.
        longest: tokens of the longest rollout there could be.
        real: rollouts that the real simulator ran for it.
        figures: for the log; ``success`` and ``reward`` are among them.
        spent: where the time went.
        done: why nothing is left to learn; empty while something is. There is nothing to update then.
        refresh: loss of something else that is trained beside, before the update; None if there is nothing.
        refresh_steps: optimizer steps on it.
    """

    score: Score
    old_RT: torch.Tensor | None
    mask_RT: torch.Tensor
    rollout_R: torch.Tensor
    advantage_R: torch.Tensor
    longest: int
    real: int
    figures: dict[str, float]
    spent: Spent
    done: str = ""
    refresh: Callable[[torch.Generator], torch.Tensor] | None = None
    refresh_steps: int = 0


class Loop(Protocol):
    """One way of coming by experience."""

    def experience(self, number: int, left: int) -> Experience:
        """Round ``number``, with at most ``left`` real rollouts."""
        ...


@dataclass(frozen=True, slots=True)
class RLResult:
    """How a run ended.

    Attributes:
        rollouts: real rollouts over all calls.
        rounds: rounds over all calls.
        stopped: ``budget``, ``time``, ``signal`` or ``done``.
        why: in words.
        last: the last line of the log.
    """

    rollouts: int
    rounds: int
    stopped: Literal["budget", "time", "signal", "done"]
    why: str
    last: dict[str, float]


class Trained(nn.Module):
    """The parameters that are trained, and no others: what is optimised, saved and compared with the reference.

    Args:
        modules: name -> network; parameters with ``requires_grad`` are meant.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            for path, parameter in module.named_parameters():
                if parameter.requires_grad:
                    self.register_parameter(f"{name}/{path}".replace(".", "/"), parameter)


class Reference:
    """The weights that training began with, held once: exchanged with the present ones, never a second network.

    Args:
        module: whose parameters will change; None of them is copied if ``without`` can do without.
        without: instead, what takes the changes away (adapters that can be switched off).
    """

    def __init__(self, module: nn.Module, without: Callable[[], AbstractContextManager[None]] | None = None) -> None:
        self._without = without
        self._module = module
        self._first = {} if without else {name: p.detach().clone() for name, p in module.named_parameters()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the network is the reference."""
        if self._without is not None:
            with self._without():
                yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._module.named_parameters():
            present = parameter.detach().clone()
            parameter.copy_(self._first[name])
            self._first[name].copy_(present)


def reinforce(
    loop: Loop,
    trained: Trained,
    config: RLConfig,
    out: Path,
    *,
    reference: Reference | None,
    resume: bool,
    describe: Mapping[str, Any],
    save: Callable[[], None],
    on_line: Callable[[dict[str, float]], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> RLResult:
    """Train in place until the budget is spent.

    Files: ``out/metrics.jsonl``, ``out/training/rl/`` (the state to resume from), and what ``save`` writes.

    Args:
        loop: brings experience.
        trained: what is trained.
        config: how.
        out: the run's folder.
        reference: what the KL is measured to; None for none.
        resume: go on with the run in ``out``, if there is one.
        describe: what else has to be the same when resuming.
        save: writes the checkpoint.
        on_line: called with every line of the log.
        clock: seconds, monotonic.

    Raises:
        ValueError: if a state exists and ``resume`` is off, or it does not fit.
        TrainingFailed: on NaN, on a collapse (naming the diagnostic), and where no group has any signal; the last good
            checkpoint stays.
    """
    folder = out / "training" / "rl"
    if has_state(folder) and not resume:
        raise ValueError(f"{out} holds a reinforced run: pass --resume to continue it, or another --out")
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    progress = Progress(describe={**config.describe(), **describe})
    if has_state(folder):
        progress = load_state(folder, trained, optimizer, {}, progress.describe)
    log = RLLog(out / METRICS, progress.step, on_line)
    learner = _Learner(trained, optimizer, config, reference)
    started, seconds_before = clock(), progress.seconds
    stopped: Literal["budget", "time", "signal", "done"] = "budget"
    why = "the budget of rollouts is spent"
    with interruptible() as interrupted:
        while config.rollouts - log.rollouts >= config.objective.group:
            began = clock()
            if config.max_minutes is not None and began - started >= 60 * config.max_minutes:
                stopped, why = "time", "the time is up"
                break
            number = progress.step
            experience = loop.experience(number, config.rollouts - log.rollouts)
            gathered = clock()
            learned = learner.learn(experience, step_generator(config.seed, number))
            now = clock()
            progress = replace(progress, step=number + 1, seconds=seconds_before + now - started)
            figures = _speeds(experience.spent, now - began, now - gathered)
            log.write(
                number,
                {
                    "rollouts": log.rollouts + experience.real,
                    **experience.figures,
                    **learned,
                    **figures,
                    "seconds": progress.seconds,
                },
            )
            if experience.done:
                stopped, why = "done", experience.done
            else:
                _stop_if_collapsed(log.lines, config, folder)
            finished = stopped == "done" or interrupted.is_set()
            if finished or progress.step % config.save_every == 0:
                _save(folder, progress, trained, optimizer, save)
            if finished:
                if stopped != "done":
                    stopped, why = "signal", "interrupted"
                break
    if progress.step % config.save_every and stopped in ("budget", "time"):
        _save(folder, progress, trained, optimizer, save)
    return RLResult(log.rollouts, progress.step, stopped, why, log.lines[-1] if log.lines else {})


def _save(
    folder: Path, progress: Progress, trained: Trained, optimizer: torch.optim.Optimizer, save: Callable[[], None]
) -> None:
    save_state(folder, progress, trained, optimizer, {})
    save()


class _Learner:
    """Updates from one round's experience."""

    def __init__(
        self, trained: Trained, optimizer: torch.optim.Optimizer, config: RLConfig, reference: Reference | None
    ) -> None:
        self.config = config
        self._optimizer = optimizer
        self._parameters = list(trained.parameters())
        self._reference = reference if config.objective.kl_weight else None
        self._device = self._parameters[0].device
        self._dtype = pick_dtype(config.dtype, self._device)

    def learn(self, experience: Experience, generator: torch.Generator) -> dict[str, float]:
        """Go through the experience ``epochs`` times; returns figures for the log."""
        config = self.config
        rows = len(experience.rollout_R)
        weight_RT = token_weights(
            experience.mask_RT, experience.rollout_R, config.objective.variant, experience.longest
        ).to(self._device)
        refreshed = self._refresh(experience, generator)
        if experience.done or not bool(experience.mask_RT.any()):
            return {**refreshed, **self._kl_of(experience)}
        old_RT, reference_RT = self._before(experience)
        advantage_R = experience.advantage_R.to(self._device, torch.float32)
        diagnostics: list[Diagnostics] = []
        losses, norms = [], []
        for _ in range(config.epochs):
            for chosen in torch.randperm(rows, generator=generator).split(config.batch):
                with self._cast():
                    new, entropy = experience.score(chosen)
                if old_RT is None:
                    loss, found = imitation_loss(new, weight_RT[chosen]), None
                else:
                    loss, found = grpo_loss(
                        new,
                        old_RT[chosen],
                        None if reference_RT is None else reference_RT[chosen],
                        advantage_R[chosen],
                        weight_RT[chosen],
                        config.objective,
                        entropy,
                    )
                    diagnostics.append(found)
                norms.append(self._step(loss * (rows / len(chosen))))
                losses.append(float(loss.detach()) * rows / len(chosen))
        figures = {"loss": _mean(losses), "grad_norm": _mean(norms), "updates": float(len(losses)), **refreshed}
        if old_RT is None:
            return {**figures, **self._kl_of(experience)}
        last = diagnostics[-math.ceil(rows / config.batch) :]
        figures |= {name: _mean([getattr(d, name) for d in last]) for name in Diagnostics.__slots__}
        return figures | {"ratio_max": max(d.ratio_max for d in diagnostics)}

    def _refresh(self, experience: Experience, generator: torch.Generator) -> dict[str, float]:
        losses = []
        for _ in range(experience.refresh_steps):
            assert experience.refresh is not None
            with self._cast():
                loss = experience.refresh(generator)
            self._step(loss)
            losses.append(float(loss.detach()))
        return {"world_loss": _mean(losses)} if losses else {}

    def _before(self, experience: Experience) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Log-probabilities of all tokens under the weights that drew them, and under the reference."""
        old, reference = experience.old_RT, None
        if old is None:
            return None, None
        if self._dtype != torch.float32:
            old = self._scored(experience)  # in the arithmetic of the update, or the first ratios would not be 1
        if self._reference is not None:
            with self._reference.in_place():
                reference = self._scored(experience)
        return old.to(self._device), reference

    def _kl_of(self, experience: Experience) -> dict[str, float]:
        """KL to the reference and entropy where no ratio was looked at, for the log."""
        with torch.no_grad():
            scored = [experience.score(rows) for rows in self._chunks(experience)]
        new, entropy = (torch.cat(parts) for parts in zip(*scored, strict=True))
        idle = not bool(experience.mask_RT.any())
        counted, kl = experience.mask_RT.to(new.device) | idle, 0.0
        if self._reference is not None:
            with self._reference.in_place():
                away = self._scored(experience) - new
            kl = float((torch.exp(away) - away - 1)[counted].mean())
        return {"kl": kl, "entropy": float(entropy[counted].mean())}

    @torch.no_grad()
    def _scored(self, experience: Experience) -> torch.Tensor:
        with self._cast():
            return torch.cat([experience.score(rows)[0] for rows in self._chunks(experience)]).float()

    def _chunks(self, experience: Experience) -> tuple[torch.Tensor, ...]:
        return torch.arange(len(experience.rollout_R)).split(self.config.batch)

    def _cast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)

    def _step(self, loss: torch.Tensor) -> float:
        if not math.isfinite(float(loss.detach())):
            raise TrainingFailed(f"the loss became {float(loss.detach())}; the last good checkpoint is kept")
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self.config.clip_norm))
        if not math.isfinite(norm):
            raise TrainingFailed(f"the gradient norm became {norm}; the last good checkpoint is kept")
        done = max((int(state["step"]) for state in self._optimizer.state.values()), default=0)
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * min(1.0, (done + 1) / max(1, self.config.warmup_steps))
        self._optimizer.step()
        return norm


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def _stop_if_collapsed(lines: list[dict[str, float]], config: RLConfig, folder: Path) -> None:
    bounds = {
        "entropy": (config.entropy_floor, math.inf),
        "kl": (-math.inf, config.kl_ceiling),
        "ratio": (1 / config.ratio_ceiling, config.ratio_ceiling),
    }
    if said := collapse(lines, bounds, config.patience):
        kept = "the last good checkpoint is kept" if has_state(folder) else "nothing was saved yet"
        raise TrainingFailed(f"the run collapsed: {said}; {kept}; try a lower --learning-rate or a larger --kl-weight")


def _speeds(spent: Spent, seconds: float, update: float) -> dict[str, float]:
    seconds = max(seconds, 1e-9)
    return {
        "env_steps_per_s": spent.steps / seconds,
        "tokens_per_s": spent.tokens / seconds,
        "share_simulator": spent.waiting / seconds,
        "share_inference": spent.inference / seconds,
        "share_update": update / seconds,
    }
