from types import SimpleNamespace

import numpy as np
import pytest
import torch

from emu_embodied.planners.objectives import PredictedReward
from emu_embodied.planners.registry import make_planner
from emu_embodied.planners.sampling import PlanSpace, shift
from emu_embodied.policies.episode import run_episode
from emu_embodied.policies.planning import GoalOfEpisode, ImaginedSource, PlanningPolicy, TrueSource
from emu_embodied.records import Field, Imagination, Observation, Plan
from tests.point_mass import PointMass, PointMassModel

SPACE = PlanSpace(horizon=4, block=5, action_dim=2)


def planning(source, **settings) -> PlanningPolicy:
    planner = make_planner("cem", SPACE, samples=24, iterations=3)
    return PlanningPolicy(planner, PredictedReward(last_weight=2.0), source, **settings)


def both(simulator, **settings):
    return {
        "imagined": planning(ImaginedSource(PointMassModel()), **settings),
        "true": planning(TrueSource(simulator), **settings),
    }


@pytest.mark.parametrize("kind", ["imagined", "true"])
def test_reaches_the_goal(kind):
    simulator = PointMass()
    policy = both(simulator)[kind]
    traces = [run_episode(simulator, policy, seed=seed) for seed in range(4)]
    assert all(trace.success for trace in traces)
    assert all(len(trace.decisions) == len(trace) for trace in traces)


@pytest.mark.parametrize("kind", ["imagined", "true"])
def test_same_seed_same_episode_and_recording_changes_nothing(kind):
    simulator = PointMass()
    quiet = run_episode(simulator, both(simulator, seed=3)[kind], seed=5)
    again = run_episode(simulator, both(simulator, seed=3)[kind], seed=5)
    recorded = run_episode(simulator, both(simulator, seed=3, record=True)[kind], seed=5)
    other = run_episode(simulator, both(simulator, seed=4)[kind], seed=5)
    assert quiet.actions_TKA.tobytes() == again.actions_TKA.tobytes() == recorded.actions_TKA.tobytes()
    assert quiet.actions_TKA.tobytes() != other.actions_TKA.tobytes()
    assert all(decision.future is None for decision in quiet.decisions) and not quiet.hindsight


def test_one_policy_object_starts_every_episode_alike():
    simulator = PointMass()
    policy = both(simulator)["imagined"]
    first, second = (run_episode(simulator, policy, seed=5) for _ in range(2))
    assert first.actions_TKA.tobytes() == second.actions_TKA.tobytes()


def test_belief_is_extended_with_what_was_executed():
    simulator = PointMass()
    model = PointMassModel()
    trace = run_episode(simulator, planning(ImaginedSource(model)), seed=0)
    assert model.calls == ["observe"] + ["extend"] * (len(trace) - 1)
    assert set(model.imagined) == {24}


def test_belief_holds_the_executed_blocks_in_order():
    simulator = PointMass()
    source = ImaginedSource(PointMassModel())
    trace = run_episode(simulator, planning(source), seed=0)
    belief = source.dynamics().belief
    assert np.array_equal(np.stack(belief.actions), trace.actions_TKA[:-1])
    assert np.array_equal(np.stack([seen.proprio for seen in belief.history]), trace.proprio_TP[:-1])


class Spy:
    """A planner that returns numbered plans and remembers what it was started from."""

    def __init__(self):
        self.warm_starts: list[torch.Tensor | None] = []

    def plan(self, evaluate, warm_start, generator, proposals=None):
        self.warm_starts.append(warm_start)
        ramp = torch.arange(4.0)[:, None, None].expand(4, 5, 2) / 10 - 0.1 * len(self.warm_starts)
        return Plan(actions_HKA=ramp, cost=0.0)


@pytest.mark.parametrize(("replan_every", "searches"), [(1, 12), (3, 4), (9, 3)])
def test_replanning_and_warm_starts(replan_every, searches):
    simulator = PointMass()
    spy = Spy()
    policy = PlanningPolicy(spy, PredictedReward(), TrueSource(simulator), replan_every=replan_every)
    trace = run_episode(simulator, policy, seed=0)
    executed = min(replan_every, 4)
    assert len(spy.warm_starts) == len(trace.decisions) == searches
    assert [decision.block for decision in trace.decisions] == list(range(0, 12, executed))
    assert spy.warm_starts[0] is None
    for decision, warm_start in zip(trace.decisions, spy.warm_starts[1:], strict=False):
        assert torch.equal(warm_start, shift(decision.plan.actions_HKA, executed))
    for decision in trace.decisions:
        blocks = slice(decision.block, decision.block + executed)
        assert np.array_equal(trace.actions_TKA[blocks], decision.plan.actions_HKA[:executed].numpy())


def test_what_was_expected_and_what_hindsight_says():
    simulator = PointMass()
    trace = run_episode(simulator, both(simulator, record=True)["imagined"], seed=1)
    for decision in trace.decisions:
        future = decision.future
        assert len(future) == 4 and future.start == decision.block
        assert future.frames["front"].shape == (4, 32, 32, 3)
        # The model is exact and the first block is executed, so the next state is as expected.
        assert np.allclose(future.proprio_HP[0], trace.proprio_TP[decision.block + 1], atol=1e-5)
        assert np.array_equal(future.frames["front"][0], trace.frames["front"][decision.block + 1])
    covered = [block for future in trace.hindsight for block in range(future.start, future.start + len(future))]
    assert covered == list(range(len(trace)))
    for future in trace.hindsight:
        reached = slice(future.start + 1, future.start + 1 + len(future))
        assert np.array_equal(future.actions_HKA, trace.actions_TKA[future.start : future.start + len(future)])
        assert np.allclose(future.proprio_HP, trace.proprio_TP[reached], atol=1e-5)


def test_hindsight_shows_a_models_error_growing_until_it_looks_again():
    simulator = PointMass()
    policy = planning(ImaginedSource(PointMassModel(drift=0.03)), record=True)
    trace = run_episode(simulator, policy, seed=1)
    future = trace.hindsight[0]
    error = np.abs(future.proprio_HP[:, 0] - trace.proprio_TP[1 : 1 + len(future), 0])
    assert np.allclose(error, 0.03 * np.arange(1, 1 + len(future)), atol=1e-4)


def test_true_futures_are_recorded_and_leave_the_simulator_alone():
    simulator = PointMass()
    trace = run_episode(simulator, both(simulator, record=True)["true"], seed=1)
    assert trace.decisions[0].future.frames["front"].shape == (4, 32, 32, 3)
    assert not trace.hindsight


def test_acting_before_a_reset_is_refused():
    with pytest.raises(ValueError, match="reset the policy"):
        planning(ImaginedSource(PointMassModel())).act(PointMass().observe())
    with pytest.raises(ValueError, match="replan_every"):
        planning(ImaginedSource(PointMassModel()), replan_every=0)


def test_goal_objective_prefers_the_future_that_looks_like_the_goal() -> None:
    class Frames:
        def embed(self, codes: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(codes, 4).float()

    class Model:
        frames = Frames()

        def encode_frames(self, frames: dict[str, np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(frames["front"][0, :, 0]).long()

    class Shows:
        proprio_fields = (Field("x", "m", 0.0, 1.0), Field("v", "m/s", 0.0, 1.0))

        def __init__(self) -> None:
            self.goal = 3

        def goal_observation(self) -> Observation:
            return Observation({"front": np.full((1, 5, 3), self.goal, np.uint8)}, np.array([0.5, 0.9], np.float32), "")

    simulator = Shows()
    objective = GoalOfEpisode(simulator, Model())  # type: ignore[arg-type]
    tokens = torch.stack([torch.full((2, 5), code) for code in (1, 2, 3)])
    zeros = torch.zeros(3, 2)
    imagination = Imagination(tokens, torch.full((3, 2, 2), 0.5), zeros, zeros)
    with pytest.raises(ValueError, match="reset"):
        objective(imagination)
    objective.reset()
    assert objective(imagination).argmin() == 2
    simulator.goal = 1
    objective.reset()
    assert objective(imagination).argmin() == 0
    # Same pictures, other places: the position counts, the velocity at the goal does not.
    proprio = torch.tensor([[0.1, 0.9], [0.5, 0.0], [0.9, 0.9]])[:, None].expand(-1, 2, -1)
    alike = Imagination(torch.ones(3, 2, 5, dtype=torch.long), proprio, zeros, zeros)
    assert objective(alike).argmin() == 1


def test_goal_objects_are_read_by_the_model_and_told_by_a_simulator() -> None:
    class Model:
        seen = torch.tensor([0.8])

        def observe(self, history: list[Observation]) -> SimpleNamespace:
            assert len(history) == 1 and not history[0].proprio.any()
            return SimpleNamespace(objects_O=self.seen)

    class Shows:
        proprio_fields = (Field("x", "px", 0.0, 512.0), Field("v", "px/s", 0.0, 1.0))
        object_fields = (Field("thing", "m", 0.0, 1.0),)

        def goal_observation(self) -> Observation:
            return Observation({}, np.zeros(2, np.float32), "", np.array([0.2], np.float32))

    settings = {"picture_weight": 0.0, "objects_weight": 1.0}
    nothing = torch.zeros(3, 2)
    objects = torch.tensor([0.2, 0.5, 0.8])[:, None, None].expand(-1, 2, 1)
    futures = Imagination(None, torch.zeros(3, 2, 2), nothing, nothing, objects)
    for model, best in ((Model(), 2), (None, 0)):
        objective = GoalOfEpisode(Shows(), model, **settings)  # type: ignore[arg-type]
        objective.reset()
        assert objective(futures).argmin() == best
    # Places in pixels count as those in metres do; a velocity does not.
    proprio = torch.tensor([[400.0, 0.0], [0.0, 0.9], [90.0, 0.0]])[:, None].expand(-1, 2, -1)
    alike = Imagination(None, proprio, nothing, nothing, torch.full((3, 2, 1), 0.2))
    assert objective(alike).argmin() == 1 and torch.isfinite(objective(alike)).all()
    objective.aim(Observation({}, np.array([90.0, 0.0], np.float32), "", np.array([0.2], np.float32)))
    assert objective(alike).argmin() == 2

    blind = Model()
    blind.seen = torch.zeros(0)
    with pytest.raises(ValueError, match="the checkpoint knows of no objects"):
        GoalOfEpisode(Shows(), blind, **settings).reset()  # type: ignore[arg-type]
    mute = Shows()
    mute.object_fields = ()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="tells of no objects"):
        GoalOfEpisode(mute, blind, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give a checkpoint"):
        GoalOfEpisode(mute, None)
