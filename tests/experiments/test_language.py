"""Whether the instruction decides: cells, their controls, and going on where it was stopped."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from emu_embodied.data.episodes import DatasetSpec, EpisodeStore
from emu_embodied.experiments import language
from emu_embodied.experiments.language import CONDITIONS, Language, ask, main, pairs_in
from emu_embodied.policies.registry import PlanningBudget
from tests import tiny
from tests.panda_checkpoint import small_checkpoint

ENV = "PandaReach-v0"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(small_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model"))


def config(model, out, **changes) -> Language:
    budget = PlanningBudget(samples=2, iterations=1, horizon=1)
    values = {"checkpoint": model, "env": ENV, "out": out, "episodes": 2, "budget": budget, "device": "cpu"}
    return Language(**(values | changes))


def test_who_does_not_listen_is_not_disturbed(checkpoint, tmp_path, capsys) -> None:
    """The scripted expert sees what is meant: all conditions on the same scenes give the same."""
    told = "as trained,new words,another's,the other thing"
    main(config(checkpoint, tmp_path, policy="scripted", conditions=told, episodes=3))
    rows = json.loads((tmp_path / "language.json").read_text())["rows"]
    assert len(rows) == 4 and len({(row["success"], row["return_mean"]) for row in rows}) == 1
    text = (tmp_path / "language.md").read_text()
    assert "| PandaReach-v0, the other thing | 3 | 100 % | 44 to 100 % | +0 (-56 to 56 %) |" in text
    assert "was not looked at" in text and text in capsys.readouterr().out


def test_cells_are_measured_once(checkpoint, tmp_path, monkeypatch) -> None:
    calls = []
    run = language.run_episodes

    def stopped(env_id, build, **kwargs):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(kwargs["label"])
        return run(env_id, build, **kwargs)

    chosen = config(checkpoint, tmp_path, conditions="as trained,another's", episodes=1)
    monkeypatch.setattr(language, "run_episodes", stopped)
    with pytest.raises(KeyboardInterrupt):
        ask(chosen)
    monkeypatch.setattr(language, "run_episodes", lambda *a, **k: calls.append(k["label"]) or run(*a, **k))
    first = ask(chosen)
    assert calls == [f"{ENV}, as trained", f"{ENV}, another's"]
    assert ask(chosen) == first and len(calls) == 2
    # Other settings are other cells.
    ask(replace(chosen, budget=replace(chosen.budget, samples=3)))
    assert len(calls) == 4


def test_every_condition_asks_for_its_own_scenes_and_words() -> None:
    assert CONDITIONS["as trained"] == ("seen", "true") and CONDITIONS["both new"] == ("held_out", "rephrased")
    assert len(set(CONDITIONS.values())) == len(CONDITIONS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "PandaReech-v0"}, "did you mean 'PandaReach-v0'"),
        ({"conditions": "shouted"}, "unknown condition 'shouted'"),
        ({"checkpoint": "nanu"}, "did you mean 'nano'"),
    ],
)
def test_what_cannot_be_asked_is_refused(checkpoint, tmp_path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        ask(config(checkpoint, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_pairs_of_a_dataset_are_counted(tmp_path) -> None:
    spec = DatasetSpec(
        env_ids=("Dot-v0",), block=tiny.BLOCK, action_dim=tiny.ACTIONS, proprio=tiny.FIELDS,
        cameras=dict.fromkeys(tiny.CAMERAS, (tiny.SIZE, tiny.SIZE)),
        objects=(replace(tiny.OBJECTS[0], name="goal_x"), replace(tiny.OBJECTS[1], name="goal_y")),
    )  # fmt: skip
    store = EpisodeStore.create(tmp_path / "data", spec)
    told = ["push the blue cube to the left disc", "push the blue cube to the right disc", "left marker: the blue cube",
            "reach the yellow ball", "reach the yellow ball"]  # fmt: skip
    for seed, (text, y) in enumerate(zip(told, (0.5, 0.5, 0.5, 0.2, -0.2), strict=True)):
        episode = tiny.make_episode(seed)
        places = np.full_like(episode.objects_TO, y)
        store.append(replace(episode, instruction=text, objects_TO=places))
    assert pairs_in(store) == {"held out": 3, "seen": 2}
