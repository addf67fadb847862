import numpy as np
import pytest
import torch

from emu_embodied.envs import make
from emu_embodied.planners.dynamics import ImaginedDynamics, TrueDynamics, evaluator
from emu_embodied.planners.objectives import PredictedReward
from tests.point_mass import PointMass, PointMassModel, tokenize


@pytest.fixture
def simulator():
    simulator = PointMass()
    simulator.reset(seed=1)
    simulator.step_block(np.full((5, 2), 0.3, np.float32))
    return simulator


@pytest.fixture
def actions_SHKA():
    return torch.rand(6, 4, 5, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_true_dynamics_is_the_simulator_and_leaves_it_alone(simulator, actions_SHKA):
    before = simulator.snapshot()
    imagined = TrueDynamics(simulator).imagine(actions_SHKA)
    assert simulator.snapshot() is before
    assert imagined.tokens_SHN is None and simulator.rendered == 1  # the fixture's own step
    for s, actions_HKA in enumerate(actions_SHKA.numpy()):
        simulator.restore(before)
        for h, action_KA in enumerate(actions_HKA):
            step = simulator.step_block(action_KA, render=False)
            assert np.array_equal(imagined.proprio_SHP[s, h], step.observation.proprio)
            assert float(imagined.reward_SH[s, h]) == step.rewards_K[-1]
            assert bool(imagined.success_SH[s, h]) == step.success


def test_tokens_only_where_asked(simulator, actions_SHKA):
    imagined = TrueDynamics(simulator, tokenize).imagine(actions_SHKA)
    assert imagined.tokens_SHN.shape == (6, 4, 64)
    assert (imagined.tokens_SHN.sum(dim=-1) > 0).all()


def test_restored_when_the_simulator_breaks(simulator, actions_SHKA):
    before = simulator.snapshot()
    simulator.fail_at = 12
    with pytest.raises(RuntimeError, match="broke"):
        TrueDynamics(simulator).imagine(actions_SHKA)
    assert simulator.snapshot() is before


def test_both_dynamics_agree_when_the_model_is_exact(simulator, actions_SHKA):
    actions_SHKA = actions_SHKA * 0.5  # stays off the walls, where the model clips per block and the simulator per step
    belief = PointMassModel().observe([simulator.observe()])
    costs = [
        evaluator(dynamics, PredictedReward(discount=0.9))(actions_SHKA)
        for dynamics in (TrueDynamics(simulator), ImaginedDynamics(PointMassModel(), belief))
    ]
    assert torch.allclose(*costs, atol=1e-5)


def test_both_dynamics_foresee_the_same_pictures(simulator, actions_SHKA):
    before = simulator.snapshot()
    model = PointMassModel()
    imagined, drawn = ImaginedDynamics(model, model.observe([simulator.observe()])).foresee(actions_SHKA[0] * 0.5)
    true, real = TrueDynamics(simulator).foresee(actions_SHKA[0] * 0.5)
    assert drawn["front"].shape == real["front"].shape == (4, 32, 32, 3)
    assert np.array_equal(drawn["front"], real["front"])
    assert torch.allclose(imagined.reward_SH, true.reward_SH, atol=1e-5)
    assert simulator.snapshot() is before


@pytest.mark.parametrize("env_id", ["PandaPush-v0", "PandaPickPlaceBullet-v0"])
def test_an_arm_does_not_notice_that_plans_were_tried_on_it(env_id):
    env = make(env_id)
    try:
        env.reset(seed=4)
        actions_TKA = np.random.default_rng(0).uniform(-1, 1, (3, 5, 4)).astype(np.float32)
        start = env.snapshot()
        alone = [env.step_block(action_KA, render=False) for action_KA in actions_TKA]
        env.restore(start)
        tried = []
        for action_KA in actions_TKA:
            imagined = TrueDynamics(env).imagine(torch.rand(2, 2, 5, 4) * 2 - 1)
            assert imagined.proprio_SHP.shape == (2, 2, len(env.proprio_fields))
            tried.append(env.step_block(action_KA, render=False))
    finally:
        env.close()
    for one, other in zip(alone, tried, strict=True):
        assert one.observation.proprio.tobytes() == other.observation.proprio.tobytes()
        assert one.rewards_K.tobytes() == other.rewards_K.tobytes()
