"""Tasks without an engine: what scenes they draw, what they say, what they reward."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu_embodied.envs.tasks import (
    MAX_INSTRUCTION,
    NAMED,
    SIDES,
    TASKS,
    WORKSPACE_HIGH,
    WORKSPACE_LOW,
    Scene,
    WorldState,
)

SEEDS = st.integers(0, 2**32 - 1)


def start_state(scene: Scene) -> WorldState:
    count = len(scene.items)
    xyz = np.array([item.xyz for item in scene.items])
    return WorldState(np.array(scene.ee_xyz), np.zeros(3), scene.opening, xyz, np.zeros((count, 3)))


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_instructions_name_exactly_what_is_meant(name: str, seed: int) -> None:
    task = TASKS[name]
    scene = task.sample(np.random.default_rng(seed))
    text = scene.instruction
    assert text.isascii() and text == text.lower() and 0 < len(text) <= MAX_INSTRUCTION
    named = [colour for colour in NAMED if colour in text.split()]
    meant = scene.items[scene.meant]
    assert named == [meant.colour]
    rivals = [item for item in scene.items if item.shape == meant.shape and item is not meant]
    assert rivals and all(item.colour != meant.colour for item in rivals)
    sides = [side for side in SIDES if side in text.replace(":", "").split()]
    if scene.kind == "lift" or name == "PandaReach":
        assert sides == []
    else:
        assert len(sides) == 1 and np.sign(scene.goal_xyz[1]) == SIDES[sides[0]]
        marker = next(item for item in scene.items if item.name == f"marker_{sides[0]}")
        assert marker.xyz[:2] == scene.goal_xyz[:2]


def test_the_longest_instruction_fits() -> None:
    for task in TASKS.values():
        for templates in (getattr(task, name, ()) for name in ("templates", "place_templates", "lift_templates")):
            for template in templates:
                assert len(template.format(colour="yellow", side="right")) <= MAX_INSTRUCTION


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_scenes_are_apart_in_reach_and_unsolved(name: str, seed: int) -> None:
    task = TASKS[name]
    scene = task.sample(np.random.default_rng(seed))
    assert [(item.name, item.shape, item.size) for item in scene.items] == list(task.slots)
    assert not task.success(scene, start_state(scene))
    cubes = [item for item in scene.items if item.shape == "cube"]
    if cubes:
        assert math.dist(cubes[0].xyz, cubes[1].xyz) >= (0.11 if name == "PandaPush" else 0.10)
    low, high = np.array([*WORKSPACE_LOW, task.tool_floor - 1e-9]), np.array(WORKSPACE_HIGH)
    for place in (scene.ee_xyz, task.solved(scene).ee_xyz):
        assert (np.array(place) >= low).all() and (np.array(place) <= high).all()


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_the_solved_scene_is_solved_and_changes_only_what_is_meant(name: str, seed: int) -> None:
    task = TASKS[name]
    scene = task.sample(np.random.default_rng(seed))
    solved = task.solved(scene)
    assert task.success(solved, start_state(solved))
    assert task.reward(task.terms(solved, start_state(solved))) > 0.95
    others = [i for i in range(len(scene.items)) if i != scene.meant]
    assert [solved.items[i] for i in others] == [scene.items[i] for i in others]
    assert (solved.instruction, solved.goal_xyz) == (scene.instruction, scene.goal_xyz)


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=80, deadline=None)
@given(seed=SEEDS)
def test_rewards_are_in_the_unit_interval_anywhere(name: str, seed: int) -> None:
    task, rng = TASKS[name], np.random.default_rng(seed)
    scene = task.sample(rng)
    state = start_state(scene)
    state = dataclasses.replace(
        state,
        ee_xyz=rng.uniform((*WORKSPACE_LOW, 0.0), WORKSPACE_HIGH),
        opening=rng.uniform(0, 0.08),
        item_xyz=state.item_xyz + rng.normal(0, 0.1, state.item_xyz.shape),
    )
    terms = task.terms(scene, state)
    assert terms.keys() == task.weights.keys()
    assert all(0 <= value <= 1 for value in terms.values())
    assert 0 <= task.reward(terms) <= 1


def test_reach_pays_for_every_centimetre() -> None:
    task = TASKS["PandaReach"]
    scene = task.sample(np.random.default_rng(0))
    state, goal = start_state(scene), np.array(scene.goal_xyz)
    rewards = []
    for share in np.linspace(0, 1, 12):
        ee_xyz = np.array(scene.ee_xyz) * (1 - share) + goal * share
        rewards.append(task.reward(task.terms(scene, dataclasses.replace(state, ee_xyz=ee_xyz))))
    assert np.diff(rewards).min() > 0


def test_push_pays_for_going_behind_and_for_every_centimetre_of_pushing() -> None:
    task = TASKS["PandaPush"]
    scene = task.sample(np.random.default_rng(0))
    state, goal = start_state(scene), np.array(scene.goal_xyz)
    cube = state.item_xyz[scene.meant]
    along = (goal - cube) / np.linalg.norm(goal - cube)
    distance = float(np.linalg.norm(goal - cube))

    def reward(pushed: float, gap: float) -> float:
        """With the cube ``pushed`` [m] along its way and the tool ``gap`` [m] behind its centre."""
        item_xyz = state.item_xyz.copy()
        item_xyz[scene.meant] = cube + pushed * along
        tool = item_xyz[scene.meant] - gap * along
        return task.reward(task.terms(scene, dataclasses.replace(state, item_xyz=item_xyz, ee_xyz=tool)))

    approach = [reward(0.0, gap) for gap in (0.20, 0.17, 0.14, 0.11, 0.09)]
    # From the point behind, to contact, along the whole way: never a step that costs.
    push = [reward(0.0, 0.055), *(reward(pushed, 0.046) for pushed in np.linspace(0, distance, 10))]
    assert np.diff(approach).min() > 0
    assert np.diff(push).min() >= 0
    assert reward(0.0, -0.06) < reward(0.0, 0.06) - 0.1
