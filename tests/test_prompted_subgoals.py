"""A folder in the official format names and pictures subtasks for a planner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from emu_embodied.interleaved import GenerationSettings, InterleavedModel
from emu_embodied.planners.subgoals import SubgoalSettings
from emu_embodied.policies.episode import run_episode
from emu_embodied.policies.registry import PlanningBudget, PolicySpec, make_policy
from emu_embodied.prompted_subgoals import PromptedSubgoals
from emu_embodied.protocols import SubgoalModel
from emu_embodied.records import Observation
from tests import official
from tests.point_mass import PIXELS, PointMass, PointMassModel, tokenize

SEEN = Observation({"front": PointMass().observe().frames["front"]}, np.zeros(4, np.float32), "lift the red cube")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> InterleavedModel:
    folder = tmp_path_factory.mktemp("checkpoints") / "Emu3.5"
    official.write_checkpoint(folder)
    return InterleavedModel.from_pretrained(folder)


def prompted(model: InterleavedModel, task: str = "vla", **changes) -> PromptedSubgoals:
    settings = replace(GenerationSettings.for_task(task), greedy=True, image_area=64, max_new_tokens=400, **changes)
    return PromptedSubgoals(model, tokenize, "front", task=task, settings=settings)


@pytest.mark.parametrize("task", ["vla", "subtasks"])
def test_text_and_picture_are_a_subgoal(model, task):
    asker = prompted(model, task)
    assert isinstance(asker, SubgoalModel)
    found = asker.propose(SEEN, 2)
    assert len(found) == 2
    for subgoal in found:
        assert subgoal.frames["front"].shape == (PIXELS, PIXELS, 3) and subgoal.frames["front"].dtype == np.uint8
        assert torch.equal(subgoal.tokens_N, tokenize(subgoal.frames))
        assert subgoal.proprio_P is None and subgoal.reward is None and subgoal.success is None
    assert len(asker.propose(SEEN, 1)) == 1


def test_the_text_before_a_picture_is_its_sentence(model, monkeypatch):
    from emu_embodied.interleaved import ImageDone, TextChunk

    picture = np.full((4, 4, 3), 7, np.uint8)
    asked = []

    def stream(request, generator=None):
        asked.append(request)
        yield TextChunk("a plan of it all", "global_cot", ends=True)
        yield TextChunk("1. Move to\n")
        yield TextChunk(" the cube.")
        yield ImageDone(0, torch.zeros(2, 2, dtype=torch.long), picture)
        yield TextChunk("2. Grasp it.")
        yield ImageDone(1, torch.zeros(2, 2, dtype=torch.long), picture)
        yield TextChunk("Done.")

    monkeypatch.setattr(model, "stream", stream)
    found = prompted(model).propose(SEEN, 5)
    assert [subgoal.text for subgoal in found] == ["1. Move to the cube.", "2. Grasp it."]
    assert np.array_equal(found[0].frames["front"], np.full((PIXELS, PIXELS, 3), 7))
    (request,) = asked
    assert (request.task, request.prompt, request.settings.max_images) == ("vla", "lift the red cube", 5)
    assert np.array_equal(request.images[0], SEEN.frames["front"])


def test_a_camera_that_is_not_there_is_named(model):
    with pytest.raises(ValueError, match="no camera 'wrist' among"):
        PromptedSubgoals(model, tokenize, "wrist").propose(SEEN, 1)


def test_a_policy_pursues_what_it_says(model):
    """Untrained weights say nothing that could be reached: it gives up, with the model's pictures on record."""
    simulator = PointMass(max_episode_steps=30)
    spec = PolicySpec(
        name="subgoals",
        budget=PlanningBudget(samples=8, iterations=1, horizon=1),
        subgoals=SubgoalSettings(steps=1, blocks=1, retries=1, alike=1e-6),
    )
    policy = make_policy(spec, simulator, world_model=PointMassModel(), subgoal_model=prompted(model), record=True)
    trace = run_episode(simulator, policy, seed=1)
    assert trace.ended.startswith("gave up") and trace.subgoals
    assert all(s.place is None and s.keyframe["front"].shape == (PIXELS, PIXELS, 3) for s in trace.subgoals)
