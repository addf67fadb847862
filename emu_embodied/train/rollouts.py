"""Groups of rollouts of the token policy in true simulators, batched in one network.

A rollout is a function of (seed, round, group, member) and of the weights: neither the number of processes nor who
finishes first changes a byte. Env seeds come from the upper 32 bits' worth of numbers, small ones stay free for
evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from emu_embodied.acting import ActionSample, Actor, Situations
from emu_embodied.records import Observation
from emu_embodied.train.rewards import Outcome
from emu_embodied.train.simulators import Crew, Move, Moved, Start

_FREE = 2**20
"""Env seeds below it are never drawn: they are for evaluation."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One episode of the policy, T blocks.

    Attributes:
        start: where it began.
        member: its number in the group.
        situations: T rows, what each decision was made on.
        bins_TA: int64, the action tokens.
        log_probs_TA: float32, at the temperature of the draw.
        actions_TKA: float32, what they did.
        reward_T: float32 [T + 1], of the first state and of every state reached.
        success: whether any env step solved the task; it ends there.
        steps: env steps taken.
        last: the state it ended in; its frames only if the crew was asked for them.
        budget: the longest rollout there could have been [blocks].
        objects_TO: float32 [T + 1, O], where things truly were in these states (``Observation.objects``).
    """

    start: Start
    member: int
    situations: Situations
    bins_TA: torch.Tensor
    log_probs_TA: torch.Tensor
    actions_TKA: torch.Tensor
    reward_T: np.ndarray
    success: bool
    steps: int
    last: Observation
    budget: int
    objects_TO: np.ndarray

    def __len__(self) -> int:
        return len(self.bins_TA)

    def outcome(self) -> Outcome:
        """What reward terms look at."""
        return Outcome(
            label=f"{self.start.env_id}, seed {self.start.seed}, rollout {self.member}",
            group=self.start.group,
            success=self.success,
            reward_T=self.reward_T,
            actions_TKA=self.actions_TKA.numpy(),
            budget=self.budget,
            valid=1.0,  # the grammar leaves nothing else to draw
        )


@dataclass(slots=True)
class Spent:
    """Where the time of some rollouts went.

    Attributes:
        waiting: for simulators [s].
        inference: reading pictures and drawing actions [s].
        steps: env steps.
        tokens: read and drawn by the network.
    """

    waiting: float = 0.0
    inference: float = 0.0
    steps: int = 0
    tokens: int = 0


def draw_starts(env_ids: Sequence[str], groups: int, seed: int, number: int, first: int = 0) -> list[Start]:
    """Starts of the groups ``first .. first + groups - 1`` of round ``number``; environments take turns."""
    starts = []
    for group in range(first, first + groups):
        drawn = int(np.random.SeedSequence([seed, number, group]).generate_state(1)[0])
        starts.append(Start(group, env_ids[group % len(env_ids)], _FREE + drawn % (2**32 - _FREE)))
    return starts


@dataclass(slots=True)
class _Playing:
    """Rollouts that are not over, and what they have done so far."""

    rows: list[int]
    situations: Situations
    moves: torch.Tensor | None = None


@dataclass(slots=True)
class _Diary:
    """What one rollout has done so far."""

    start: Start
    member: int
    generator: torch.Generator
    rewards: list[float]
    budget: int
    objects: list[np.ndarray]
    situations: list[Situations] = field(default_factory=list)
    bins: list[torch.Tensor] = field(default_factory=list)
    log_probs: list[torch.Tensor] = field(default_factory=list)
    actions: list[torch.Tensor] = field(default_factory=list)
    steps: int = 0
    last: Moved | None = None

    def closed(self) -> Rollout:
        assert self.last is not None
        return Rollout(
            self.start,
            self.member,
            Situations.cat(self.situations),
            torch.cat(self.bins),
            torch.cat(self.log_probs),
            torch.cat(self.actions),
            np.asarray(self.rewards, np.float32),
            self.last.success,
            self.steps,
            self.last.observation,
            self.budget,
            np.stack(self.objects).astype(np.float32),
        )


def roll_out(
    crew: Crew,
    actor: Actor,
    starts: Sequence[Start],
    *,
    group: int,
    temperature: float,
    seed: int,
    number: int,
    lanes: int,
    spent: Spent,
) -> list[Rollout]:
    """Play G rollouts from every start until each is solved or out of steps.

    Args:
        crew: where.
        actor: what acts.
        starts: one for each group.
        group: G.
        temperature: of the draw of action tokens.
        seed: of the run.
        number: of the round; with seed, group and member it seeds a rollout's draws.
        lanes: parts of the batch that take turns: while the network reads one, the processes play another.
        spent: is added to.

    Returns:
        The rollouts, group by group.
    """
    clock = time.perf_counter()
    began = crew.begin(starts)
    spent.waiting += time.perf_counter() - clock
    clock = time.perf_counter()
    first = actor.see([b.observation for b in began])
    spent.inference += time.perf_counter() - clock
    diaries = [
        _Diary(
            start,
            member,
            _generator(seed, number, start.group, member),
            [b.reward],
            b.budget,
            [b.observation.objects],
        )
        for start, b in zip(starts, began, strict=True)
        for member in range(group)
    ]
    lane_rows = [rows.tolist() for rows in torch.arange(len(diaries)).chunk(lanes)]
    playing = [_Playing(rows, first.rows([row // group for row in rows])) for rows in lane_rows]
    for lane in playing:
        _act(crew, actor, lane, diaries, temperature, spent)
    while playing:
        going = []
        for lane in playing:
            waited = time.perf_counter()
            moved = crew.receive()
            spent.waiting += time.perf_counter() - waited
            if _follow(actor, lane, moved, diaries, spent):
                _act(crew, actor, lane, diaries, temperature, spent)
                going.append(lane)
        playing = going
    crew.end()
    return [diary.closed() for diary in diaries]


def branch_out(
    crew: Crew,
    actor: Actor,
    starts: Sequence[Start],
    *,
    group: int,
    temperature: float,
    seed: int,
    number: int,
    spent: Spent,
) -> tuple[list[Rollout], list[Rollout]]:
    """Play one episode from every start, with a group of G one-block rollouts at each of its states.

    All members of a group are tried from one restored state, and the episode goes on with one of them drawn at random:
    so it is an episode of the policy, and every block was compared with others from the very same state. G times the
    blocks of an episode are simulated for it, as many as G rollouts have.

    Args:
        crew: where.
        actor: what acts.
        starts: one for each episode.
        group: G.
        temperature: of the draw of action tokens.
        seed: of the run.
        number: of the round.
        spent: is added to.

    Returns:
        The one-block rollouts, group by group (each with a group number of its own), and the episodes.
    """
    clock = time.perf_counter()
    began = crew.begin(starts)
    spent.waiting += time.perf_counter() - clock
    episodes = [
        _Diary(s, 0, _generator(seed, number, s.group, 0), [b.reward], b.budget, [b.observation.objects])
        for s, b in zip(starts, began, strict=True)
    ]
    going, blocks = list(range(len(starts))), list[Rollout]()
    clock = time.perf_counter()
    now = actor.see([b.observation for b in began])
    spent.inference += time.perf_counter() - clock
    layout = actor.world.layout
    while going:
        clock = time.perf_counter()
        generators = [episodes[row].generator for row in going for _ in range(group)]
        every = now.rows([place for place in range(len(going)) for _ in range(group)])
        drawn = actor.act(every, generators, temperature)
        spent.inference += time.perf_counter() - clock
        spent.tokens += len(every) * (layout.length(actor.context_states) + layout.action_tokens - 1)
        clock = time.perf_counter()
        actions_BKA = drawn.actions_BKA.cpu()
        moves = [
            Move(starts[going[i // group]].group, i % group, actions_BKA[i].numpy(), look=False)
            for i in range(len(every))
        ]
        crew.send(moves)
        moved = crew.receive()
        spent.waiting += time.perf_counter() - clock
        on: list[tuple[int, int]] = []
        for place, row in enumerate(going):
            episode, first = episodes[row], place * group
            start = replace(episode.start, group=len(blocks) // group)
            for i in range(first, first + group):
                block = _Diary(
                    start, i - first, episode.generator, episode.rewards[-1:], episode.budget, episode.objects[-1:]
                )
                _note(block, every.rows([i]).to("cpu"), drawn, i, actions_BKA, moved[i])
                spent.steps += moved[i].steps
                blocks.append(block.closed())
            chosen = first + int(torch.randint(group, (), generator=episode.generator))
            _note(episode, every.rows([chosen]).to("cpu"), drawn, chosen, actions_BKA, moved[chosen])
            if not moved[chosen].over:
                on.append((place, chosen))
        if on:
            clock = time.perf_counter()
            seen = crew.fork([moves[chosen] for _, chosen in on])
            spent.waiting += time.perf_counter() - clock
            clock = time.perf_counter()
            now = actor.follow(now.rows([place for place, _ in on]), actions_BKA[[chosen for _, chosen in on]], seen)
            spent.inference += time.perf_counter() - clock
        going = [going[place] for place, _ in on]
    crew.end()
    return blocks, [episode.closed() for episode in episodes]


def _note(
    diary: _Diary, situation: Situations, drawn: ActionSample, row: int, actions_BKA: torch.Tensor, moved: Moved
) -> None:
    one = slice(row, row + 1)
    diary.situations.append(situation)
    diary.bins.append(drawn.bins_BA[one].cpu())
    diary.log_probs.append(drawn.log_probs_BA[one].cpu())
    diary.actions.append(actions_BKA[one])
    diary.rewards.append(moved.reward)
    diary.objects.append(moved.observation.objects)
    diary.steps += moved.steps
    diary.last = moved


def _generator(seed: int, number: int, group: int, member: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, number, group, member + 1]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _act(crew: Crew, actor: Actor, lane: _Playing, diaries: Sequence[_Diary], temperature: float, spent: Spent) -> None:
    """Draw the next block of every rollout of a lane and set it going."""
    began = time.perf_counter()
    drawn = actor.act(lane.situations, [diaries[row].generator for row in lane.rows], temperature)
    lane.moves = drawn.actions_BKA.cpu()
    bins_BA, log_probs_BA, situations = drawn.bins_BA.cpu(), drawn.log_probs_BA.cpu(), lane.situations.to("cpu")
    moves = []
    for i, row in enumerate(lane.rows):
        diary, one = diaries[row], slice(i, i + 1)
        diary.situations.append(situations.rows(one))
        diary.bins.append(bins_BA[one])
        diary.log_probs.append(log_probs_BA[one])
        diary.actions.append(lane.moves[one])
        moves.append(Move(diary.start.group, diary.member, lane.moves[i].numpy()))
    layout, sent = actor.world.layout, time.perf_counter()
    spent.tokens += len(lane.rows) * (layout.length(actor.context_states) + layout.action_tokens - 1)
    crew.send(moves)
    spent.inference += sent - began
    spent.waiting += time.perf_counter() - sent


def _follow(actor: Actor, lane: _Playing, moved: Sequence[Moved], diaries: Sequence[_Diary], spent: Spent) -> bool:
    """Take in what the blocks came to; whether any rollout of the lane goes on."""
    kept = []
    for i, (row, now) in enumerate(zip(lane.rows, moved, strict=True)):
        diary = diaries[row]
        diary.rewards.append(now.reward)
        diary.objects.append(now.observation.objects)
        diary.steps += now.steps
        diary.last = now
        spent.steps += now.steps
        if not now.over:
            kept.append(i)
    if kept:
        assert lane.moves is not None
        actions, observations = lane.moves[kept], [moved[i].observation for i in kept]
        before = lane.situations.rows(kept)
        began = time.perf_counter()
        lane.situations = actor.follow(before, actions, observations)
        spent.inference += time.perf_counter() - began
        lane.rows = [lane.rows[i] for i in kept]
    return bool(kept)
