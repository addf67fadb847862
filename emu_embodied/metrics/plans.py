"""Can a model tell the better of two plans? Imagined against real rewards of several plans from one state.

Over states an imagined reward can look right (most of its variance is between scenes) and yet be no help in choosing:
a planner compares plans of *one* state, so that is where correlation has to be; and as its candidates are drawn alike,
most of all between plans of one behaviour: an expert's plan can be told from a random one by its manner alone.

Shape letters: S candidate plans, H horizon in blocks, K env steps in a block, A action dims, P proprio dims.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from emu_embodied.data.recording import Behaviour, RecordedSimulator
from emu_embodied.metrics.foresight import tool_index
from emu_embodied.records import Imagination, Observation
from emu_embodied.world_model import WorldModel

MIN_SPREAD = 1e-3
"""Standard deviation of the real rewards of a scene's plans below which there is nothing to choose."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One state of an episode, and what several plans really lead to from there.

    Attributes:
        history: what was observed up to the state.
        done: the action blocks between the observations.
        kinds_S: which behaviour each plan is of.
        actions_SHKA: float32, the plans.
        reward_SH: float32, reward at the end of every block.
        proprio_SHP: float32.
    """

    history: tuple[Observation, ...]
    done: tuple[np.ndarray, ...]
    kinds_S: tuple[str, ...]
    actions_SHKA: np.ndarray
    reward_SH: np.ndarray
    proprio_SHP: np.ndarray


@dataclass(frozen=True, slots=True)
class PlanScores:
    """Means over scenes; None where no scene defines a figure."""

    correlation: float | None
    """Pearson correlation, between the plans of a scene, of imagined and real mean reward on the way."""
    rank_correlation: float | None
    """The same of ranks (Spearman)."""
    within: dict[str, float | None]
    """``correlation`` between plans of one behaviour only, by its name."""
    gain: float | None
    """Real reward of the plan that imagination likes best: 0 is a plan taken at random, 1 the best one."""
    reward_mae: float
    """Mean absolute error of the reward."""
    tool_error_cm: float | None
    """Distance of imagined and real tool at the end of a plan [cm]; None without such proprio fields."""
    scenes: int
    """Scenes whose plans differ in reward: those that the correlations are means of."""
    frames_per_s: float
    """Imagined states per second, with all plans of a scene in one batch; the median over scenes [states/s]."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


def record_scenes(
    simulator: RecordedSimulator,
    behaviours: Mapping[str, Callable[..., Behaviour]],
    *,
    scenes: int,
    plans: int,
    horizon: int,
    seed: int,
) -> list[Scene]:
    """Try plans in a simulator: from each of some states, what behaviours do there, each plan from the same state.

    Args:
        simulator: where.
        behaviours: name -> factory; plans take them in turn, so good and useless ones are among them.
        scenes: how many states; scene i is i modulo 4 blocks into an episode of its own.
        plans: plans S of a scene.
        horizon: blocks H of a plan.
        seed: first reset seed, the others follow.
    """
    names = tuple(behaviours)
    found = []
    for i in tqdm(range(scenes), desc="real plans", unit="scene"):
        simulator.reset(seed=seed + i)
        history, done = [simulator.observe()], []
        walk = behaviours[names[i % len(names)]](simulator, np.random.default_rng([seed + i, 1]))
        walk.reset(history[0])
        for _ in range(i % 4):
            done.append(walk.act(history[-1]))
            history.append(simulator.step_block(done[-1]).observation)
        present = simulator.snapshot()
        tried = []
        for s in range(plans):
            simulator.restore(present)
            behaviour = behaviours[names[s % len(names)]](simulator, np.random.default_rng([seed + i, 2, s]))
            tried.append(_try(simulator, behaviour, history[-1], horizon))
        actions, rewards, proprio = (np.stack(part).astype(np.float32) for part in zip(*tried, strict=True))
        kinds = tuple(names[s % len(names)] for s in range(plans))
        found.append(Scene(tuple(history), tuple(done), kinds, actions, rewards, proprio))
    return found


def score_plans(world: WorldModel, scenes: Sequence[Scene], *, seed: int, label: str = "imagined plans") -> PlanScores:
    """Imagine the plans of every scene and compare with what they really led to.

    Args:
        world: the model.
        scenes: at least one.
        seed: of the imagination's noise, anew for each scene.
        label: what the progress bar says.
    """
    tool = tool_index(world.config.proprio)
    pearson, spearman, gains, mistakes, misses, rates = [], [], [], [], [], []
    within: dict[str, list[float]] = {kind: [] for scene in scenes for kind in scene.kinds_S}
    for i, scene in enumerate(tqdm(scenes, desc=label, unit="scene")):
        imagination, seconds = _imagine(world, scene, seed + i)
        rates.append(scene.reward_SH.size / seconds)
        imagined_SH = imagination.reward_SH.float().cpu().numpy()
        mistakes.append(np.abs(imagined_SH - scene.reward_SH).mean())
        if tool:
            offset_SP = imagination.proprio_SHP[:, -1].cpu().numpy() - scene.proprio_SHP[:, -1]
            misses.append(100 * np.linalg.norm(offset_SP[:, tool], axis=-1).mean())
        real_S, liked_S = scene.reward_SH.mean(1), imagined_SH.mean(1)
        for kind, found in within.items():
            own_S = np.array([one == kind for one in scene.kinds_S])
            if own_S.sum() > 2 and real_S[own_S].std() >= MIN_SPREAD:
                found.append(_correlation(liked_S[own_S], real_S[own_S]))
        if real_S.std() < MIN_SPREAD:
            continue
        pearson.append(_correlation(liked_S, real_S))
        spearman.append(_correlation(_ranks(liked_S), _ranks(real_S)))
        gains.append((real_S[liked_S.argmax()] - real_S.mean()) / (real_S.max() - real_S.mean()))
    return PlanScores(
        correlation=_mean(pearson),
        rank_correlation=_mean(spearman),
        within={kind: _mean(found) for kind, found in within.items()},
        gain=_mean(gains),
        reward_mae=float(np.mean(mistakes)),
        tool_error_cm=_mean(misses),
        scenes=len(pearson),
        frames_per_s=float(np.median(rates)),
    )


def _try(
    simulator: RecordedSimulator, behaviour: Behaviour, observation: Observation, horizon: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Actions [H, K, A], rewards [H] and proprio [H, P] of a behaviour from the simulator's present state."""
    behaviour.reset(observation)
    actions, rewards, proprio = [], [], []
    for _ in range(horizon):
        actions.append(behaviour.act(observation))
        transition = simulator.step_block(actions[-1], render=False)
        observation = transition.observation
        rewards.append(float(transition.rewards_K[-1]))
        proprio.append(observation.proprio)
    return np.stack(actions), np.array(rewards), np.stack(proprio)


def _imagine(world: WorldModel, scene: Scene, seed: int) -> tuple[Imagination, float]:
    """The scene's plans imagined, and how long that took [s]."""
    belief = world.observe(scene.history, scene.done)
    actions_SHKA = torch.from_numpy(scene.actions_SHKA)
    generator = torch.Generator().manual_seed(seed)
    began = time.perf_counter()
    imagination = world.imagine(belief, actions_SHKA, generator)
    float(imagination.reward_SH[0, 0])  # waits for a GPU
    return imagination, time.perf_counter() - began


def _correlation(a_S: np.ndarray, b_S: np.ndarray) -> float:
    """Pearson's; 0 if ``a`` is constant: who likes all plans alike tells nothing."""
    if a_S.std() < 1e-9:
        return 0.0
    return float(np.corrcoef(a_S, b_S)[0, 1])


def _ranks(values_S: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    _, place, count = np.unique(values_S, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count + 1) / 2
    return mean_rank[place]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
