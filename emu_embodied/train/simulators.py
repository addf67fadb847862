"""Many episodes at once, in worker processes: each starts from a restored state and waits for its next block.

A process needs one simulator for each environment id, however many episodes it plays: an episode that is not moving is
a snapshot. The G rollouts of a group begin at one snapshot and live in one process.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from emu_embodied.data.recording import RecordedSimulator, SimulatorFactory
from emu_embodied.records import Observation

_THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Start:
    """Where a group begins.

    Attributes:
        group: its number, not that of any other group that is being played.
        env_id: environment.
        seed: reset seed.
    """

    group: int
    env_id: str
    seed: int


@dataclass(frozen=True, slots=True)
class Began:
    """The state that all rollouts of a group start from.

    Attributes:
        observation: what is seen there.
        reward: in [0, 1].
        budget: the longest rollout there can be [blocks].
    """

    observation: Observation
    reward: float
    budget: int


@dataclass(frozen=True, slots=True)
class Move:
    """The next block of one rollout.

    Attributes:
        group: of the rollout.
        member: its number in the group.
        actions_KA: float32.
        look: whether the state reached is drawn, if the rollout is not over there.
    """

    group: int
    member: int
    actions_KA: np.ndarray
    look: bool = True


@dataclass(frozen=True, slots=True)
class Moved:
    """What the block came to.

    Attributes:
        observation: the state reached; without pictures where nobody will look.
        reward: of that state.
        success: whether any state passed through solves the task; the rollout is over then.
        truncated: whether the step budget is used up; over, too.
        steps: env steps taken.
    """

    observation: Observation
    reward: float
    success: bool
    truncated: bool
    steps: int

    @property
    def over(self) -> bool:
        """Whether the rollout ends here."""
        return self.success or self.truncated


class Stage:
    """Plays episodes in this process.

    Args:
        simulators: makes the simulator of an id; one is made for each.
        last_frames: whether the last state of an episode is drawn, too.
    """

    def __init__(self, simulators: SimulatorFactory, *, last_frames: bool = False) -> None:
        self._factory = simulators
        self._last_frames = last_frames
        self._made: dict[str, RecordedSimulator] = {}
        self._env: dict[int, str] = {}
        self._first: dict[int, Any] = {}
        self._now: dict[tuple[int, int], Any] = {}

    def begin(self, starts: Sequence[Start]) -> list[Began]:
        """Reset to every start and keep its state.

        Raises:
            ValueError: if an environment is unknown, or its state cannot be restored.
        """
        found = []
        for start in starts:
            simulator = self._simulator(start.env_id)
            simulator.reset(seed=start.seed)
            self._env[start.group] = start.env_id
            self._first[start.group] = simulator.snapshot()
            found.append(Began(simulator.observe(), simulator.reward(), _budget(simulator)))
        return found

    def play(self, moves: Sequence[Move]) -> list[Moved]:
        """Apply a block to every rollout named; one that was never moved begins at its group's start."""
        found = []
        for move in moves:
            key = (move.group, move.member)
            simulator = self._made[self._env[move.group]]
            simulator.restore(self._now.pop(key, self._first[move.group]))
            transition = simulator.step_block(move.actions_KA, render=False)
            over = transition.success_any or transition.truncated
            wanted = self._last_frames if over else move.look
            seen = simulator.observe() if wanted else transition.observation
            if not over:
                self._now[key] = simulator.snapshot()
            steps = len(transition.rewards_K)
            reward = float(transition.rewards_K[-1])
            found.append(Moved(seen, reward, transition.success_any, transition.truncated, steps))
        return found

    def fork(self, moves: Sequence[Move]) -> list[Observation]:
        """Let the groups of these rollouts go on from where these have come to; the other members are forgotten."""
        found = []
        for move in moves:
            simulator = self._made[self._env[move.group]]
            self._first[move.group] = self._now[move.group, move.member]
            for key in [key for key in self._now if key[0] == move.group]:
                del self._now[key]
            simulator.restore(self._first[move.group])
            found.append(simulator.observe())
        return found

    def end(self) -> None:
        """Forget all groups."""
        for kept in (self._env, self._first, self._now):
            kept.clear()

    def close(self) -> None:
        """Free the simulators."""
        for simulator in self._made.values():
            simulator.close()
        self._made.clear()

    def _simulator(self, env_id: str) -> RecordedSimulator:
        if env_id not in self._made:
            made = self._factory(env_id)
            if not all(callable(getattr(made, name, None)) for name in ("snapshot", "restore")):
                raise ValueError(
                    f"{env_id} cannot be snapshotted: a group is rollouts from one restored state, so it needs "
                    "snapshot() and restore()"
                )
            self._made[env_id] = made
        return self._made[env_id]


class Crew(Protocol):
    """Plays episodes somewhere. Answers come in the order of what was asked."""

    busy_seconds: float
    """What its simulators have worked, over all processes [s]."""

    def begin(self, starts: Sequence[Start]) -> list[Began]:
        """See ``Stage.begin``."""
        ...

    def fork(self, moves: Sequence[Move]) -> list[Observation]:
        """See ``Stage.fork``."""
        ...

    def send(self, moves: Sequence[Move]) -> None:
        """Set blocks going."""
        ...

    def receive(self) -> list[Moved]:
        """What the oldest ``send`` came to."""
        ...

    def end(self) -> None:
        """Forget all groups."""
        ...


@contextmanager
def open_crew(simulators: SimulatorFactory, workers: int, *, last_frames: bool = False) -> Iterator[Crew]:
    """Processes that play episodes; 0 plays them in this one.

    Args:
        simulators: called in the processes only; picklable if there are any.
        workers: how many; what is played does not depend on it.
        last_frames: see ``Stage``.
    """
    if workers < 0:
        raise ValueError(f"--workers is {workers}: give 0 (this process) or more")
    if workers == 0:
        stage = Stage(simulators, last_frames=last_frames)
        try:
            yield _Here(stage)
        finally:
            stage.close()
        return
    pipes, processes = _start(simulators, workers, last_frames)
    try:
        yield _Processes(pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


class _Here:
    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._waiting: list[list[Moved]] = []
        self.busy_seconds = 0.0

    def begin(self, starts: Sequence[Start]) -> list[Began]:
        began = time.perf_counter()
        found = self._stage.begin(starts)
        self.busy_seconds += time.perf_counter() - began
        return found

    def fork(self, moves: Sequence[Move]) -> list[Observation]:
        return self._stage.fork(moves)

    def send(self, moves: Sequence[Move]) -> None:
        began = time.perf_counter()
        self._waiting.append(self._stage.play(moves))
        self.busy_seconds += time.perf_counter() - began

    def receive(self) -> list[Moved]:
        return self._waiting.pop(0)

    def end(self) -> None:
        self._stage.end()


class _Processes:
    def __init__(self, pipes: Sequence[Connection]) -> None:
        self._pipes = pipes
        self._waiting: list[list[int]] = []
        self.busy_seconds = 0.0

    def begin(self, starts: Sequence[Start]) -> list[Began]:
        return self._collect(self._hand_out("begin", starts))

    def fork(self, moves: Sequence[Move]) -> list[Observation]:
        return self._collect(self._hand_out("fork", moves))

    def send(self, moves: Sequence[Move]) -> None:
        self._waiting.append(self._hand_out("play", moves))

    def receive(self) -> list[Moved]:
        return self._collect(self._waiting.pop(0))

    def end(self) -> None:
        for pipe in self._pipes:
            self._send(pipe, ("end", []))
            self._receive(pipe)

    def _hand_out(self, what: str, asked: Sequence[Start] | Sequence[Move]) -> list[int]:
        """Send every process its groups; the process of each item is returned."""
        places = [item.group % len(self._pipes) for item in asked]
        for place in sorted(set(places)):
            own = [item for item, at in zip(asked, places, strict=True) if at == place]
            self._send(self._pipes[place], (what, own))
        return places

    def _collect(self, places: list[int]) -> list[Any]:
        answers = {place: iter(self._receive(self._pipes[place])) for place in sorted(set(places))}
        return [next(answers[place]) for place in places]

    def _send(self, pipe: Connection, message: tuple[str, Any]) -> None:
        with suppress(BrokenPipeError):  # ``_receive`` says what happened
            pipe.send(message)

    def _receive(self, pipe: Connection) -> Any:
        try:
            answer, seconds, failure = pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise RuntimeError("a simulator's process died, perhaps for memory: try fewer --workers") from error
        if failure is not None:
            trace, refusal = failure
            raise ValueError(refusal) if refusal else RuntimeError(f"a simulator failed:\n{trace}")
        self.busy_seconds += seconds
        return answer


def _budget(simulator: Any) -> int:
    return math.ceil(simulator.max_episode_steps / simulator.block)


def _start(
    simulators: SimulatorFactory, workers: int, last_frames: bool
) -> tuple[list[Connection], list[multiprocessing.process.BaseProcess]]:
    context = multiprocessing.get_context("spawn")
    before = {name: os.environ.get(name) for name in _THREAD_LIMITS}
    os.environ.update(dict.fromkeys(_THREAD_LIMITS, "1"))  # read once, when a worker first imports its libraries
    pipes: list[Connection] = []
    processes: list[multiprocessing.process.BaseProcess] = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, simulators, last_frames), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
    return pipes, processes


def _work(pipe: Connection, simulators: SimulatorFactory, last_frames: bool) -> None:
    """A worker's life: until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and closes the pipe
    stage = Stage(simulators, last_frames=last_frames)
    with ExitStack() as closing, suppress(EOFError, BrokenPipeError):
        closing.callback(stage.close)
        while True:
            what, items = pipe.recv()
            began = time.perf_counter()
            answer: Any = None
            failure = None
            try:
                if what == "end":
                    stage.end()
                else:
                    does: dict[str, Callable[[Any], Any]] = {
                        "begin": stage.begin,
                        "play": stage.play,
                        "fork": stage.fork,
                    }
                    answer = does[what](items)
            except Exception as error:
                refused = isinstance(error, ValueError | ImportError) and what == "begin"
                failure = traceback.format_exc(), str(error) if refused else None
            pipe.send((answer, time.perf_counter() - began, failure))
