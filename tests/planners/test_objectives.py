import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_embodied.planners.objectives import (
    GoalImage,
    GoalObjects,
    GoalProprio,
    PredictedReward,
    PredictedSuccess,
    WeightedSum,
)
from emu_embodied.records import Field, Imagination

FIELDS = (Field("ee_x", "m", -0.5, 0.5), Field("ee_y", "m", -0.5, 0.5), Field("gripper", "m", 0.0, 0.08))


def future(reward=None, success=None, proprio=None, tokens=None) -> Imagination:
    reward = torch.zeros(2, 3) if reward is None else torch.tensor(reward)
    shape = reward.shape
    return Imagination(
        tokens_SHN=tokens,
        proprio_SHP=torch.zeros(*shape, 3) if proprio is None else proprio,
        reward_SH=reward,
        success_SH=torch.zeros(shape) if success is None else torch.tensor(success),
    )


def test_reward_weights():
    imagined = future(reward=[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert PredictedReward()(imagined).tolist() == pytest.approx([-1 / 3, -1 / 3])
    assert PredictedReward(discount=0.5)(imagined).tolist() == pytest.approx([-1 / 1.75, -0.25 / 1.75])
    assert PredictedReward(last_weight=2.0)(imagined).tolist() == pytest.approx([-0.25, -0.5])


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 1.0), st.floats(0.1, 10.0), st.integers(0, 99))
def test_reward_cost_stays_in_its_range_and_a_better_future_is_cheaper(discount, last_weight, seed):
    reward_SH = torch.rand(8, 4, generator=torch.Generator().manual_seed(seed)) * 0.9
    objective = PredictedReward(discount=discount, last_weight=last_weight)
    worse, better = (objective(future(reward=r.tolist())) for r in (reward_SH, reward_SH + 0.1))
    assert (worse >= -1).all() and (worse <= 0).all()
    assert torch.allclose(worse - better, torch.full((8,), 0.1), atol=1e-5)


def test_success_counts_the_best_step_and_prefers_the_sooner():
    cost = PredictedSuccess(discount=0.9)(future(success=[[0.0, 0.8, 0.0], [0.0, 0.0, 0.8]]))
    assert cost.tolist() == pytest.approx([-0.8 * 0.9, -0.8 * 0.81])


def embed(codes: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.9, -1.0, 0.1, 0.0], [-1.0, 1.0, 0.0, 0.0], [5.0, -5.0, 0.0, 0.0]])
    return table[codes]


def test_goal_image_measures_how_near_not_how_equal():
    goal = torch.zeros(4, dtype=torch.int64)
    tokens = torch.stack([torch.full((3, 4), code) for code in (0, 1, 2, 3)])
    imagined = future(reward=[[0.0] * 3] * 4, tokens=tokens)
    same, near, far, scaled = GoalImage(embed, goal)(imagined).tolist()
    assert same == pytest.approx(0, abs=1e-4)
    assert same < near < 0.1 < far == pytest.approx(4 * 1.1, rel=1e-3)
    assert scaled == pytest.approx(0, abs=1e-4)  # the same direction, only longer


def test_goal_image_running_cost_runs_from_closest_to_mean():
    goal = torch.zeros(4, dtype=torch.int64)
    tokens = torch.tensor([0, 2, 2])[None, :, None].expand(1, 3, 4)
    imagined = future(reward=[[0.0] * 3], tokens=tokens)
    last = 4.0
    sharp = float(GoalImage(embed, goal, running_weight=1.0, temperature=1e-3)(imagined)[0])
    flat = float(GoalImage(embed, goal, running_weight=1.0, temperature=1e4)(imagined)[0])
    assert sharp == pytest.approx(last, abs=0.01)
    assert flat == pytest.approx(last + 8 / 3, abs=0.01)


def test_goal_image_refuses_what_it_cannot_measure():
    objective = GoalImage(embed, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="tokenize"):
        objective(future())
    with pytest.raises(ValueError, match="4 tokens, a state 5"):
        objective(future(tokens=torch.zeros(2, 3, 5, dtype=torch.int64)))


def test_goal_proprio_in_units_of_the_range():
    proprio = torch.zeros(2, 3, 3)
    proprio[1, -1, 0] = 0.5
    cost = GoalProprio({"ee_x": 0.5}, FIELDS, running_weight=0.0)(future(proprio=proprio))
    assert cost.tolist() == pytest.approx([0.5, 0.0])
    with pytest.raises(ValueError, match="did you mean 'gripper'"):
        GoalProprio({"griper": 0.0}, FIELDS)


def test_weighted_sum():
    imagined = future(reward=[[0.2] * 3, [0.4] * 3], success=[[0.5] * 3, [0.0] * 3])
    total = WeightedSum(((2.0, PredictedReward()), (10.0, PredictedSuccess(discount=1.0))))(imagined)
    assert total.tolist() == pytest.approx([-0.4 - 5.0, -0.8])


def test_objects_near_their_goal_cost_less_whatever_their_unit():
    fields = (Field("x", "px", 0.0, 512.0), Field("cos", "1", -1.0, 1.0))
    objects = torch.tensor([[[0.0, 0.0], [256.0, 1.0]], [[0.0, 0.0], [256.0, 0.0]], [[256.0, 1.0], [0.0, 1.0]]])
    zeros = torch.zeros(3, 2)
    futures = Imagination(None, torch.zeros(3, 2, 1), zeros, zeros, objects)
    goal = GoalObjects(torch.tensor([256.0, 1.0]), fields, running_weight=0.0)
    torch.testing.assert_close(goal(futures), torch.tensor([0.0, 0.5 / 2**0.5, 0.5 / 2**0.5]))
    running = GoalObjects(torch.tensor([256.0, 1.0]), fields, running_weight=1.0)(futures)
    assert running.argmin() == 0 and running[0] > 0
    with pytest.raises(ValueError, match="knows of no objects"):
        goal(Imagination(None, torch.zeros(3, 2, 1), zeros, zeros))
    with pytest.raises(ValueError, match="names 1 numbers"):
        GoalObjects(torch.zeros(1), fields)
