"""Pursuing subgoals on a point mass: in order, again from where it is, and no further than makes sense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from emu_embodied.planners.registry import make_planner
from emu_embodied.planners.sampling import PlanSpace
from emu_embodied.planners.subgoals import Keyframe, Pursuit, SubgoalSettings
from emu_embodied.policies.episode import run_episode
from emu_embodied.policies.planning import DynamicsSource, ImaginedSource, TrueSource
from emu_embodied.policies.subgoals import SubgoalPolicy
from emu_embodied.records import Observation, Subgoal
from tests.point_mass import STEP, PointMass, PointMassModel, draw, keyframe, tokenize

SETTINGS = SubgoalSettings(near=0.1, alike=4.0, proprio_weight=20.0)
"""The places alone decide: pictures of a point say little about how far away it is."""
STILL = np.zeros((5, 2), np.float32)
NAMES = ("east", "north", "home")
PLACES = {"east": np.array([0.4, 0.0]), "north": np.array([0.4, 0.4]), "home": np.array([0.0, 0.0])}


class Tells:
    """A model that names what a function of the present place says, and remembers where it was asked."""

    def __init__(self, next_names: Callable[[np.ndarray], list[str]]):
        self.next_names = next_names
        self.asked_at: list[np.ndarray] = []

    def propose(self, observation: Observation, steps: int, generator: torch.Generator | None = None):
        place, goal = observation.proprio[:2], observation.proprio[2:]
        self.asked_at.append(place)
        found = [keyframe(name, PLACES[name], goal) for name in self.next_names(place)]
        return tuple(found[:steps])


class InOrder(Tells):
    """Names places in order, going on behind the furthest of those named that it has got to."""

    def __init__(self, *names: str):
        super().__init__(lambda place: self.left)
        self.left = list(names)
        self.told = 0

    def propose(self, observation: Observation, steps: int, generator: torch.Generator | None = None):
        place = observation.proprio[:2]
        for index in reversed(range(self.told)):
            if np.linalg.norm(PLACES[self.left[index]] - place) <= 0.1:
                self.left = self.left[index + 1 :]
                break
        found = super().propose(observation, steps, generator)
        self.told = len(found)
        return found


def make(model, simulator: PointMass, *, settings=SETTINGS, record=False, seed=0, source: DynamicsSource | None = None):
    # The goal of the environment itself is out of the way, so that no episode ends by chance.
    planner = make_planner("cem", PlanSpace(horizon=2, block=5, action_dim=2), samples=24, iterations=3)
    pursuit = Pursuit(model, PointMassModel(), simulator.proprio_fields, settings, record=record)
    source = source or ImaginedSource(PointMassModel())
    return SubgoalPolicy(planner, pursuit, source, STILL, seed=seed, record=record)


@pytest.fixture
def simulator() -> PointMass:
    return PointMass()


def goal_of(seed: int) -> np.ndarray:
    world = PointMass()
    world.reset(seed=seed)
    return world.state.goal


SEED = next(seed for seed in range(50) if goal_of(seed)[0] < -0.5)
"""Of an episode whose own goal is away from all places, so that none ends by chance."""


@pytest.mark.parametrize("kind", ["imagined", "true"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_reaches_keyframes_in_order_and_stops_at_the_end(simulator, kind, steps):
    model = InOrder("east", "north", "home")
    source = TrueSource(simulator, tokenize) if kind == "true" else None
    settings = replace(SETTINGS, steps=steps)
    policy = make(model, simulator, settings=settings, source=source)
    trace = run_episode(simulator, policy, seed=SEED)
    assert [subgoal.text for subgoal in trace.subgoals] == ["east", "north", "home"]
    assert {subgoal.outcome for subgoal in trace.subgoals} == {"reached"}
    assert trace.ended == "the model says that nothing is left to do"
    assert len(model.asked_at) == {1: 4, 2: 3, 3: 2}[steps]
    done = 0
    for subgoal in trace.subgoals:
        assert subgoal.start == done and 1 <= subgoal.blocks <= 4
        done += subgoal.blocks
        reached = trace.proprio_TP[done, :2]
        assert np.linalg.norm(reached - PLACES[subgoal.text]) == pytest.approx(subgoal.place, abs=1e-6)
        assert subgoal.place <= 0.1 < subgoal.first_place
    assert not trace.actions_TKA[done:].any() and len(trace) > done


def test_gives_up_with_a_reason_what_cannot_be_reached():
    class Insists(Tells):
        """On a place beyond the wall."""

        def propose(self, observation: Observation, steps: int, generator: torch.Generator | None = None):
            self.asked_at.append(observation.proprio[:2])
            corner = keyframe("beyond", np.array([0.9, 0.9]), np.zeros(2))
            return (Subgoal("beyond", corner.tokens_N, torch.tensor([3.0, 3.0, 0.0, 0.0])),)

    model, patient = Insists(lambda place: []), PointMass(max_episode_steps=200)
    policy = make(model, patient, settings=replace(SETTINGS, blocks=3, retries=2, progress=0.1))
    trace = run_episode(patient, policy, seed=SEED)
    assert trace.ended == "gave up: 3 times in a row no nearer to it, last: 'beyond'"
    assert {subgoal.outcome for subgoal in trace.subgoals} == {"missed"}
    assert all(subgoal.blocks == 3 for subgoal in trace.subgoals)
    # At first it came nearer, which is no reason to give up; then it stood at the wall.
    assert len(model.asked_at) == len(trace.subgoals) > 3
    ended = trace.subgoals[-1].start + 3
    assert trace.actions_TKA[:3].any() and not trace.actions_TKA[ended:].any()


def test_asks_again_from_where_it_is(simulator):
    """One block is too little for 40 cm: the next proposal starts from the place it is at."""
    model = Tells(lambda place: ["north"] if place[0] > 0.3 else ["east", "north"])
    policy = make(model, simulator, settings=replace(SETTINGS, blocks=1))
    trace = run_episode(simulator, policy, seed=SEED)
    first = trace.subgoals[0]
    assert (first.text, first.outcome, first.blocks) == ("east", "missed", 1)
    assert np.array_equal(model.asked_at[1], trace.proprio_TP[1, :2]) and first.place < 0.8 * first.first_place
    # Half of the way was progress, so it went on; and what the first proposal said behind "east" was forgotten.
    assert trace.subgoals[1].text == "east"
    assert "north" in [subgoal.text for subgoal in trace.subgoals if subgoal.outcome == "reached"]


def test_what_is_reached_and_said_again_is_not_pursued_for_ever(simulator):
    model = Tells(lambda place: ["east"])
    trace = run_episode(simulator, make(model, simulator), seed=SEED)
    assert trace.ended == "gave up: 'east' was reached 3 times, and the model says it again"
    assert [subgoal.outcome for subgoal in trace.subgoals] == ["reached"] * 3
    # Where it is there already, it still tries for a block to come closer.
    assert [subgoal.blocks for subgoal in trace.subgoals[1:]] == [1, 1]


def test_what_is_reached_already_is_passed_over(simulator):
    model = Tells(lambda place: ["home", "east"] if place[0] < 0.3 else [])
    trace = run_episode(simulator, make(model, simulator), seed=SEED)
    first, second = trace.subgoals
    assert (first.text, first.blocks, first.outcome) == ("home", 0, "reached")
    assert (second.text, second.outcome) == ("east", "reached")


def test_nothing_to_do_from_the_start(simulator):
    trace = run_episode(simulator, make(Tells(lambda place: []), simulator), seed=SEED)
    assert trace.subgoals == () and trace.ended and not trace.actions_TKA.any() and not trace.decisions


def test_an_episode_that_ends_leaves_the_last_one_open(simulator):
    simulator.max_episode_steps = 5
    trace = run_episode(simulator, make(InOrder("east", "north"), simulator), seed=SEED)
    assert [subgoal.outcome for subgoal in trace.subgoals] == ["unfinished"] and trace.ended == ""


def test_the_model_is_that_of_the_goal_and_solves_it(simulator):
    """The built-in model of this world names two places on the way; the episode ends by the environment's verdict."""
    policy = make(PointMassModel(), simulator, settings=SETTINGS)
    trace = run_episode(simulator, policy, seed=3)
    first, *others = trace.subgoals
    assert trace.success and first.text == "move half way"
    assert others and {subgoal.text for subgoal in others} == {"move onto the green square"}
    assert {subgoal.outcome for subgoal in trace.subgoals} == {"reached"}


def test_same_seed_same_bytes_and_recording_changes_nothing(simulator):
    runs = [
        run_episode(simulator, make(InOrder(*NAMES), simulator, seed=seed, record=record), seed=SEED)
        for seed, record in ((0, False), (0, False), (0, True), (1, False))
    ]
    assert runs[0].actions_TKA.tobytes() == runs[1].actions_TKA.tobytes() == runs[2].actions_TKA.tobytes()
    assert runs[0].actions_TKA.tobytes() != runs[3].actions_TKA.tobytes()
    assert not runs[0].subgoals[0].keyframe
    for subgoal in runs[2].subgoals:
        goal = runs[2].proprio_TP[0, 2:]
        assert np.array_equal(subgoal.keyframe["front"], draw(PLACES[subgoal.text].astype(np.float32), goal))
        assert np.array_equal(subgoal.achieved["front"], runs[2].frames["front"][subgoal.start + subgoal.blocks])


def test_a_new_subgoal_starts_a_new_search(simulator):
    policy = make(InOrder(*NAMES), simulator)
    policy.replan_every = 2
    trace = run_episode(simulator, policy, seed=SEED)
    starts = {subgoal.start for subgoal in trace.subgoals}
    assert starts <= {decision.block for decision in trace.decisions}


def test_distances_to_a_keyframe(simulator):
    simulator.reset(seed=SEED)
    seen = simulator.observe()
    goal = seen.proprio[2:]
    model = PointMassModel()
    settings = SubgoalSettings(near=0.1, alike=0.5)
    here = Keyframe(keyframe("here", np.zeros(2), goal), model, simulator.proprio_fields, settings)
    assert here.gap(seen).reached and here.gap(seen).place == 0 and here.gap(seen).picture == 0
    there = Keyframe(keyframe("there", np.array([0.3, 0.4]), goal), model, simulator.proprio_fields, settings)
    gap = there.gap(seen)
    assert gap.place == pytest.approx(0.5) and gap.picture > 0 and not gap.reached
    assert gap.share == pytest.approx(max(5.0, gap.picture / 0.5))
    # A model that makes only pictures gives a keyframe that is only a picture.
    told = keyframe("there", np.array([0.3, 0.4]), goal)
    seen_only = Keyframe(Subgoal("there", told.tokens_N), model, simulator.proprio_fields, settings)
    assert seen_only.gap(seen).place is None and seen_only.gap(seen).share == pytest.approx(gap.picture / 0.5)
    actions = torch.stack([torch.full((1, 5, 2), 0.0), torch.tensor([0.3, 0.4]).div(5 * STEP).expand(1, 5, 2)])
    futures = model.imagine(model.observe([seen]), actions)
    assert bool((there.cost(futures).diff() < 0).all()) and bool((here.cost(futures).diff() > 0).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"blocks": 0}, "blocks is 0"),
        ({"retries": -1}, "retries is -1"),
        ({"near": 0.0}, "near is 0.0"),
        ({"alike": -1.0}, "alike is -1.0"),
        ({"progress": 1.0}, "progress is 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SubgoalSettings(**changes)


def test_without_a_subgoal_there_is_nothing_to_search_for(simulator):
    pursuit = Pursuit(PointMassModel(), PointMassModel(), simulator.proprio_fields)
    simulator.reset(seed=SEED)
    futures = PointMassModel().imagine(PointMassModel().observe([simulator.observe()]), torch.zeros(1, 1, 5, 2))
    with pytest.raises(ValueError, match="show the present observation first"):
        pursuit(futures)
