"""The sentences of subtasks: for every instruction, about the objects it names, short enough to be tokens."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest

from emu_embodied.envs.subtasks import subtasks
from emu_embodied.envs.tasks import COLOURS, MAX_INSTRUCTION, NAMED, TASKS
from emu_embodied.policies import scripted

LABELS = set(re.findall(r'Waypoint\("(\w+)"|"(\w+)" (?:if|else)', inspect.getsource(scripted)))


@pytest.mark.parametrize("name", TASKS)
def test_every_instruction_has_subtasks_about_its_objects(name: str) -> None:
    task, rng = TASKS[name], np.random.default_rng(0)
    for _ in range(200):
        scene = task.sample(rng)
        sentences = subtasks(scene.instruction)
        assert sentences
        colour, side = scene.items[scene.meant].colour, "left" if scene.goal_xyz[1] < 0 else "right"
        for phase, sentence in sentences.items():
            assert len(sentence.encode()) <= MAX_INSTRUCTION and "{" not in sentence
            assert [word for word in sentence.split() if word in COLOURS] == [colour]
            sides = [word for word in sentence.split() if word in ("left", "right")]
            # One gets to the other side of a thing to push it.
            behind = name == "PandaPush" and phase == "approach"
            assert sides == [] or (sides == [side]) != behind
        assert len(set(sentences.values())) == len(sentences)


@pytest.mark.parametrize("name", ["PandaReach", "PandaPush", "PandaPickPlace"])
def test_every_phase_of_an_expert_is_a_subtask(name: str) -> None:
    labels = {first or second for first, second in LABELS} - {"start", "done"}
    scene = TASKS[name].sample(np.random.default_rng(3))
    known = set(subtasks(scene.instruction))
    source = inspect.getsource(scripted._EXPERTS[name])
    used = {label for label in labels if f'"{label}"' in source.replace("phase in", "")} & labels
    # A lift has no carrying, lowering or letting go.
    assert used - known <= ({"carry", "lower", "release"} if scene.kind == "lift" else set())


def test_other_instructions_have_none() -> None:
    assert subtasks("make coffee") == {} and subtasks("reach the violet ball") == {}
    assert all(subtasks(f"reach the {colour} ball") for colour in NAMED)
