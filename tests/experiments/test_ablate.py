"""One switch at a time: every variant is what its name says, is trained once and scored alike."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest

from emu_embodied import presets
from emu_embodied.data.collect import CollectConfig, collect
from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.envs.registry import make
from emu_embodied.experiments import ablate as module
from emu_embodied.experiments.ablate import VARIANTS, Ablate, ablate, main
from emu_embodied.metrics import looking
from emu_embodied.policies.behaviours import BEHAVIOURS
from emu_embodied.policies.registry import PlanningBudget
from emu_embodied.tokens.frames import IBQFrameTokenizer
from emu_embodied.train.loop import LoopConfig
from emu_embodied.train.pretrain import WorldTraining
from emu_embodied.world_config import WorldModelConfig
from emu_embodied.world_model import WorldModel
from tests import tiny
from tests.panda_checkpoint import ROW, small_checkpoint

ENV = "PandaReach-v0"
TRAINING = WorldTraining(
    loop=LoopConfig(steps=3, warmup_steps=1, log_every=1, eval_every=10, save_every=10, threads=1, dtype="float32"),
    batch=2, held_out=0.25, subgoal_share=0.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def preset(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", ROW)
    monkeypatch.setattr(looking, "STEPS", looking.EVERY)


def small(env_id: str):
    return make(env_id, image_size=ROW.image_size, cameras=("front",), max_episode_steps=20)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset of four short reaches, a tokenizer and an eye."""
    folder = tmp_path_factory.mktemp("made")
    collect(CollectConfig(env=ENV, episodes=4, out=folder / "data", workers=1), small, BEHAVIOURS)
    small_checkpoint(folder / "model")
    objects = EpisodeStore.open(folder / "data").spec.objects
    tiny.make_eye(objects, cameras=("front",), image_size=ROW.image_size).save_pretrained(folder / "eye")
    return folder


def config(made, out, **changes) -> Ablate:
    values = {
        "data": made / "data", "tokenizer": made / "model" / "tokenizer", "eye": made / "eye", "env": ENV, "out": out,
        "preset": "tiny",
        "variants": "as it is,no objects", "minutes": 1.0, "training": TRAINING, "episodes": 12, "blocks": 2,
        "horizon": 1, "scenes": 2, "plans": 3, "planned": 1, "device": "cpu",
        "budget": PlanningBudget(samples=2, iterations=1, horizon=1),
    }  # fmt: skip
    return Ablate(**(values | changes))


def test_a_variant_changes_one_thing() -> None:
    plain = WorldTraining()
    changed = {name: switch(plain) for name, switch in VARIANTS.items()}
    assert changed["as it is"] == changed["no objects"] == plain
    assert changed["changed tokens weigh 1"].weights == replace(plain.weights, changed=1.0)
    assert changed["no context noise"] == replace(plain, context_noise=0.0)
    assert changed["numbers as places"] == replace(plain, changes=False)
    assert changed["AdamW"].loop.optimizer == "adamw" != plain.loop.optimizer
    assert changed["own steps"] == replace(plain, own_steps=2)
    assert changed["reward weighs 0.5"].weights == replace(plain.weights, reward=0.5)
    assert changed["another seed"].loop == replace(plain.loop, seed=plain.loop.seed + 1)
    others = [training for name, training in changed.items() if name not in ("as it is", "no objects")]
    assert all(training != plain for training in others)
    assert all(others.count(training) == 1 for training in others)


def test_rows_figures_and_going_on(made, tmp_path, monkeypatch, capsys) -> None:
    train = module.train_dida
    calls = []

    def stopped(*arguments, **kwargs):
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments)
        return train(*arguments, **kwargs)

    monkeypatch.setattr(module, "train_dida", stopped)
    with pytest.raises(KeyboardInterrupt):  # in the second variant's second stage
        ablate(config(made, tmp_path))
    firsts = []
    world = module.train_world
    monkeypatch.setattr(module, "train_world", lambda *a, **k: firsts.append(a) or world(*a, **k))
    monkeypatch.setattr(module, "train_dida", train)
    main(config(made, tmp_path))
    assert not firsts  # its first stage was finished
    plain, bare = (
        WorldModelConfig.load(tmp_path / name / "dida" / "world.json") for name in ("as_it_is", "no_objects")
    )
    assert len(plain.objects) == 6 and not bare.objects
    with (tmp_path / "ablate.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["as it is", "no objects"]
    assert rows[0]["object_seen"] and not rows[1]["object_seen"]
    assert all(row["world_steps"] == row["dida_steps"] == "3" for row in rows)
    assert all(row["action_sensitivity_db"] and row["success"] for row in rows)
    text = (tmp_path / "ablate.md").read_text()
    assert text in capsys.readouterr().out and f"| {ENV}, no objects | 3 + 3 |" in text
    with pytest.raises(ValueError, match="as_it_is holds a variant that was trained in another way"):
        main(config(made, tmp_path, minutes=2.0))
    with pytest.raises(ValueError, match="as_it_is holds a variant that was trained in another way"):
        main(config(made, tmp_path, eye=None))
    # Nothing is trained or scored twice.
    for name in ("train_world", "train_dida", "inspect_world", "run_episodes"):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("done again"))
    assert len(ablate(config(made, tmp_path))) == 2
    cells = json.loads((tmp_path / "ablate.json").read_text())["rows"]
    assert len(cells) == 8  # of each variant: trained, inspected, plans told apart, planned


def test_what_cannot_be_ablated_is_refused(made, tmp_path) -> None:
    for changes, message in (
        ({"variants": "as it was"}, "unknown variant 'as it was'"),
        ({"env": "PandaReech-v0"}, "did you mean"),
    ):
        with pytest.raises(ValueError, match=message):
            ablate(config(made, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_the_small_tokenizer_is_the_presets(made) -> None:
    frames = IBQFrameTokenizer.from_pretrained(made / "model" / "tokenizer")
    assert frames.codebook_size == ROW.ibq.n_embed and WorldModel.from_pretrained(made / "model")
