from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from emu_embodied.envs import make
from emu_embodied.planners.cem import CEM
from emu_embodied.planners.mppi import MPPI
from emu_embodied.planners.shooting import RandomShooting
from emu_embodied.policies.episode import run_episode
from emu_embodied.policies.registry import POLICIES, PlanningBudget, PolicySpec, check_fits, make_policy
from emu_embodied.policies.token import ActingSettings
from tests import tiny
from tests.point_mass import PointMass, PointMassModel
from tests.table import Table

BUDGET = PlanningBudget(samples=16, iterations=2, horizon=3, answer="best")


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"scripted"}))
def test_every_policy_acts_and_is_seeded(name):
    acts = name == "token"  # with a transformer, which a point mass has none of
    simulator, world = (Table(), tiny.make_world()) if acts else (PointMass(), PointMassModel())
    spec = PolicySpec(name=name, budget=BUDGET, acting=ActingSettings(temperature=1.0))
    runs = [
        run_episode(simulator, make_policy(spec, simulator, seed=seed, world_model=world), seed=2) for seed in (0, 0, 1)
    ]
    assert runs[0].actions_TKA.shape[1:] == (simulator.block, 2)
    assert runs[0].actions_TKA.tobytes() == runs[1].actions_TKA.tobytes() != runs[2].actions_TKA.tobytes()


def test_controls_spend_what_the_planner_spends():
    simulator = PointMass()
    spent = set()
    for name, planner in (("shooting", RandomShooting), ("imagined", CEM), ("true", CEM)):
        policy = make_policy(PolicySpec(name=name, budget=BUDGET), simulator, world_model=PointMassModel())
        assert isinstance(policy.planner, planner)
        assert policy.planner.space.horizon == 3
        trace = run_episode(simulator, policy, seed=0)
        spent |= {decision.plan.evaluations for decision in trace.decisions}
    assert spent == {BUDGET.evaluations} == {32}


def test_another_planner():
    simulator = PointMass()
    spec = PolicySpec(name="true", planner="mppi")
    assert isinstance(make_policy(spec, simulator).planner, MPPI)


def test_the_mean_as_answer_costs_one_candidate_more():
    simulator = PointMass()
    spent = {}
    for name in ("shooting", "imagined", "true"):
        spec = PolicySpec(name=name, budget=replace(BUDGET, answer="mean"))
        trace = run_episode(simulator, make_policy(spec, simulator, world_model=PointMassModel()), seed=0)
        spent[name] = trace.decisions[0].plan.evaluations
    assert spent == {"shooting": 32, "imagined": 33, "true": 33}


def test_the_likeliest_tokens_need_no_seed():
    world, spec = tiny.make_world(), PolicySpec(name="token")
    assert spec.looks and spec.needs_model and not spec.plans and not spec.imagines
    runs = [run_episode(Table(), make_policy(spec, Table(), seed=seed, world_model=world), seed=2) for seed in (0, 1)]
    assert runs[0].actions_TKA.tobytes() == runs[1].actions_TKA.tobytes()


def test_what_emits_no_tokens_cannot_be_the_token_policy():
    for world, message in (
        (None, "the token policy needs a world model"),
        (PointMassModel(), "PointMassModel emits no action tokens"),
        (tiny.make_world(action_bins=1), "these weights have no action tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            make_policy(PolicySpec(name="token"), Table(), world_model=world)
    with pytest.raises(ValueError, match="has to be at least 0"):
        ActingSettings(temperature=-1.0)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'imagined'"):
        PolicySpec(name="imagine")
    with pytest.raises(ValueError, match="did you mean 'success'"):
        make_policy(PolicySpec(name="true", objective="succes"), PointMass())
    with pytest.raises(ValueError, match="did you mean 'mppi'"):
        make_policy(PolicySpec(name="true", planner="mpi"), PointMass())


def test_a_world_model_is_needed_and_must_fit():
    with pytest.raises(ValueError, match="needs a world model"):
        make_policy(PolicySpec(name="imagined"), PointMass())
    model = PointMassModel()
    model.block = 4
    with pytest.raises(ValueError, match="blocks of 4 env steps, the environment of 5"):
        make_policy(PolicySpec(name="imagined"), PointMass(), world_model=model)


def test_experts_are_for_built_in_tasks():
    with pytest.raises(ValueError, match="no scripted expert for PointMass-v0"):
        make_policy(PolicySpec(name="scripted"), PointMass())


def config(**changes) -> SimpleNamespace:
    fitting = {
        "action_dim": 2,
        "block": 5,
        "proprio": PointMass.proprio_fields,
        "image_size": 32,
        "cameras": ("front",),
        "objects": (),
        "env_ids": ("PointMass-v0",),
    }
    return SimpleNamespace(config=SimpleNamespace(**(fitting | changes)))


def test_checkpoints_of_another_embodiment_are_refused():
    simulator = PointMass()
    check_fits(config(), simulator)
    for changes, message in (
        ({"action_dim": 4}, "action dimensions: 4 against 2"),
        ({"block": 3}, "env steps in a block: 3 against 5"),
        ({"image_size": 64}, "pixels a side: 64 against 32"),
        ({"proprio": PointMass.proprio_fields[:2]}, "proprio fields"),
        ({"cameras": ("front", "wrist")}, "it reads front, wrist, the environment draws front"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fits(config(**changes), simulator)
    with pytest.warns(UserWarning, match="PointMass-v0 is not among"):
        check_fits(config(env_ids=("PandaPush-v0",)), simulator)


def test_policies_on_an_arm():
    env = make("PandaReach-v0")
    try:
        successes = {}
        for name in ("random", "scripted", "true"):
            spec = PolicySpec(name=name, budget=PlanningBudget(samples=24, iterations=2, horizon=2))
            policy = spec.build(env, 0)
            trace = run_episode(env, policy, seed=0, env_id=env.env_id, policy_name=name, render=False)
            successes[name] = trace.success
            assert trace.actions_TKA.shape[1:] == (5, 4) and np.abs(trace.actions_TKA).max() <= 1
            assert trace.episode_return <= env.max_episode_steps
    finally:
        env.close()
    assert successes == {"random": False, "scripted": True, "true": True}
