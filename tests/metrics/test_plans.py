"""Imagined against real rewards between plans of one state."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from emu_embodied.metrics.plans import Scene, _ranks, record_scenes, score_plans
from emu_embodied.records import Field, Imagination
from tests import tiny
from tests.data.fakes import DotSimulator, Seek, Wander

BEHAVIOURS = {"seek": Seek, "wander": Wander}


def scenes(count=6, plans=5, horizon=2) -> list[Scene]:
    return record_scenes(DotSimulator("Dot-v0"), BEHAVIOURS, scenes=count, plans=plans, horizon=horizon, seed=30)


class Foretelling:
    """Foretells rewards made from the real ones."""

    def __init__(self, found, spoil, fields=()):
        self.found, self.spoil = iter(found), spoil
        self.config = SimpleNamespace(proprio=fields)

    def observe(self, history, done):
        assert len(history) == len(done) + 1
        return history

    def imagine(self, belief, actions_SHKA, generator):
        scene = next(self.found)
        assert torch.equal(actions_SHKA, torch.from_numpy(scene.actions_SHKA)) and belief == scene.history
        reward = torch.from_numpy(self.spoil(scene.reward_SH)).float()
        proprio = torch.from_numpy(scene.proprio_SHP) + 0.03
        return Imagination(None, proprio, reward, torch.zeros_like(reward))


def test_every_plan_starts_from_the_same_state_and_is_what_really_happens():
    found = scenes()
    simulator = DotSimulator("Dot-v0")
    for i, scene in enumerate(found):
        assert scene.actions_SHKA.shape == (5, 2, 3, 2) and scene.reward_SH.shape == (5, 2)
        assert len(scene.done) == i % 4 and len(scene.history) == i % 4 + 1
        for s in range(5):
            simulator.reset(seed=30 + i)
            for action_KA in scene.done:
                simulator.step_block(action_KA)
            for h in range(2):
                transition = simulator.step_block(scene.actions_SHKA[s, h])
                assert scene.reward_SH[s, h] == pytest.approx(float(transition.rewards_K[-1]))
                assert scene.proprio_SHP[s, h] == pytest.approx(transition.observation.proprio)
        assert np.array_equal(scene.actions_SHKA[0, 0], scene.actions_SHKA[2, 0])  # both seek
        assert not np.array_equal(scene.actions_SHKA[1], scene.actions_SHKA[3])  # both wander
    again = scenes()
    assert all(np.array_equal(a.actions_SHKA, b.actions_SHKA) for a, b in zip(found, again, strict=True))


def test_perfect_useless_and_contrary_models():
    found = scenes()
    perfect = score_plans(Foretelling(found, lambda r: 0.2 + 0.5 * r), found, seed=0)
    assert perfect.correlation == pytest.approx(1) and perfect.rank_correlation == pytest.approx(1)
    assert perfect.gain == pytest.approx(1) and perfect.scenes == 6 and perfect.frames_per_s > 0
    assert perfect.tool_error_cm is None
    expected = np.mean([np.abs(0.2 - 0.5 * scene.reward_SH).mean() for scene in found])
    assert perfect.reward_mae == pytest.approx(expected, rel=1e-5)
    contrary = score_plans(Foretelling(found, lambda r: 1 - r), found, seed=0)
    assert contrary.correlation == pytest.approx(-1) and contrary.gain < 0
    # The mean of a scene is all that this one knows: right over states, no help between plans.
    blind = score_plans(Foretelling(found, lambda r: np.full_like(r, r.mean())), found, seed=0)
    assert blind.correlation == 0 and blind.rank_correlation == 0


def test_plans_of_one_behaviour_are_also_compared_among_themselves():
    found = scenes(plans=8)
    assert found[0].kinds_S == ("seek", "wander") * 4

    def by_manner(reward_SH):
        """Knows which behaviour is better and nothing else."""
        manner_S = np.arange(8) % 2 == 0
        return np.where(manner_S, reward_SH[::2].mean(), reward_SH[1::2].mean())[:, None] + 0 * reward_SH

    scores = score_plans(Foretelling(found, by_manner), found, seed=0)
    assert scores.correlation > 0.3 and scores.within == {"seek": None, "wander": 0.0}  # to seek is always the same
    assert score_plans(Foretelling(found, lambda r: r), found, seed=0).within["wander"] == pytest.approx(1)


def test_scenes_without_a_choice_do_not_count():
    found = scenes(2)
    flat = replace(found[0], reward_SH=np.full_like(found[0].reward_SH, 0.5))
    mixed = [flat, found[1]]
    assert score_plans(Foretelling(mixed, lambda r: r), mixed, seed=0).scenes == 1
    alone = score_plans(Foretelling([flat], lambda r: r), [flat], seed=0)
    assert alone.scenes == 0 and alone.correlation is None and alone.gain is None
    assert None in alone.to_dict().values()


def test_the_tool_is_measured_in_centimetres():
    found = scenes(1)
    fields = (Field("ee_x", "m", -1, 1), Field("other", "1", -1, 1))
    assert score_plans(Foretelling(found, lambda r: r, fields), found, seed=0).tool_error_cm == pytest.approx(
        3, rel=1e-4
    )


def test_equal_values_share_their_rank():
    assert _ranks(np.array([0.3, 0.1, 0.3, 0.9])).tolist() == [1.5, 0, 1.5, 3]


def test_a_real_model_is_scored_and_the_seed_decides():
    world = tiny.make_world()
    episode = tiny.make_episode(3)
    rng = np.random.default_rng(0)
    actions = tiny.plans(4, 2).numpy()
    scene = Scene(
        (tiny.observation(episode, 0), tiny.observation(episode, 1)),
        (episode.actions_TKA[0],),
        ("random",) * 4,
        actions,
        rng.random((4, 2), np.float32),
        rng.random((4, 2, 3), np.float32),
    )
    first = score_plans(world, [scene], seed=0).to_dict()
    again = score_plans(world, [scene], seed=0).to_dict()
    first.pop("frames_per_s"), again.pop("frames_per_s")
    assert first == again and -1 <= first["correlation"] <= 1
