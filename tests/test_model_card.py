"""A checkpoint's card: everything in it stands in the folder, and no figure is another model's."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from emu_embodied.files import write_json
from emu_embodied.model_card import CARD, MEASURED, render_card, write_card
from emu_embodied.policies.evaluate import weights_hash
from emu_embodied.world_config import WEIGHTS, shipped
from tests import tiny

NAMES = shipped()
WEIGHTS_OF_OTHERS = "0123456789abcdef"


def stage(**changes) -> dict:
    extra = {"steps": 30, "seconds": 120, "episodes": 8, "figures": {"eval/token_accuracy": 0.5, "loss": 3.0}}
    return {
        "command": "emu-embodied train world --data runs/dots", "seed": 7, "data_hash": "0" * 64, "revision": "abc123",
        "versions": {"torch": "2.13.0"}, "hardware": {"cpu": "Abacus 9000", "accelerators": []}, "extra": extra,
    } | changes  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "dots"
    tiny.make_world().save_pretrained(folder)
    write_json(folder / "meta.json", {"world": stage()})
    return folder


def row(policy: str = "imagined", success: float | None = 0.5, weights: str | None = None, **settings) -> dict:
    settings = {"seed": 0, "objective": "goal", **settings} | ({"weights": weights} if weights else {})
    return {
        "env": "Dot-v0", "policy": policy, "episodes": 10, "success": success, "ci95": [0.2, 0.8], "return_mean": 1.0,
        "seconds_per_action": 0.1, "settings": settings,
    }  # fmt: skip


def bench(path: Path, *rows: dict) -> Path:
    write_json(path, {"rows": list(rows), "meta": {"extra": {}}})
    return path


def inspection(path: Path, weights: str, error: float = 9.0, env: str = "Dot-v0") -> Path:
    scores = [{"place": place, "unit": "cm", "error": error, "guess": 10.0} for place in ("ee", "object")]
    content = {
        "gripper_probe_cm": 2.5, "gripper_guess_cm": 11.0, "object_probe_cm": error, "object_guess_cm": 10.0,
        "codebook_used": 0.75, "idempotent": 0.66, "action_sensitivity_db": 4.2,
        "probes": {"codes": scores, "pixels_and_words": [{**score, "error": 8.0} for score in scores]},
        "ahead": [{"h": 0, "errors": {"ee": 0.0, "object": 1.25}}], "plans": {"within": {"random": 0.31}},
        "meta": {"command": "emu-embodied inspect", "revision": "abc123",
                 "extra": {"env": env, "episodes": 12, "weights": weights}},
    }  # fmt: skip
    write_json(path, content)
    return path


def test_a_card_says_where_a_checkpoint_comes_from(folder) -> None:
    card = render_card(folder)
    for fact in ("# dots", "Dot-v0", "0" * 64, "train world --data runs/dots  # seed 7", "Abacus 9000", "abc123",
                 "torch 2.13.0", "8 episodes", "tokens right 0.5", "| world | 30 | 2 |", "Apache-2.0",
                 "Not inspected", "Not measured in closed loop", "Does not say where objects are"):  # fmt: skip
        assert fact in card, fact


def test_a_card_says_whether_the_checkpoint_acts(folder) -> None:
    assert "Acts by itself" not in render_card(folder)
    cloned = stage(extra={"steps": 9, "seconds": 60, "figures": {"eval/action_within_a_bin": 0.414}})
    write_json(folder / "meta.json", {"world": stage(), "policy": cloned})
    card = render_card(folder)
    assert (
        "Acts by itself, cloned from scripted experts" in card
        and "| policy | 9 | 1 | actions within a bin 0.414" in card
    )


def test_a_missing_record_is_said_to_be_missing(folder) -> None:
    (folder / "meta.json").unlink()
    assert "`meta.json` is missing" in render_card(folder)
    with pytest.raises(ValueError, match=r"world\.json"):
        render_card(folder.parent)


def test_measurements_are_kept_and_shown(folder, tmp_path) -> None:
    weights = weights_hash(str(folder))
    found = inspection(tmp_path / "i.json", weights)
    rows = bench(tmp_path / "b.json", row(weights=weights), row("random", success=0.1))
    card = write_card(folder, weights, [found], [rows]).read_text()
    assert "| Dot-v0 | 2.5 (11.0) cm | 9.0 (10.0) cm | - | 1.2 cm | 0.75 | 0.66 | 4.2 dB | 0.31 |" in card
    assert "| Dot-v0 | imagined | goal | 10 | 50 % | 20 to 80 % |" in card and "| random |" in card
    assert "its codes reads off by 9.0 cm, of the pixels themselves by 8.0, a constant guess by 10.0." in card
    assert "Not measured in closed loop" not in card
    # They stay without being given again, and a newer one replaces the older one of the same settings.
    better = inspection(tmp_path / "j.json", weights, error=3.0)
    newer = bench(tmp_path / "c.json", row(weights=weights, success=0.9))
    card = write_card(folder, weights, [better], [newer]).read_text()
    assert "90 %" in card and "50 %" not in card and "| random |" in card and "reads off by" not in card
    assert card == render_card(folder)


def test_a_card_names_the_shorter_stream_where_it_is_known(folder) -> None:
    card = render_card(folder)
    assert "in numbers alone" not in card
    config = json.loads((folder / "world.json").read_text())
    objects = [asdict(field) for field in tiny.OBJECTS]
    write_json(folder / "world.json", config | {"streams": ["pictures", "numbers"], "objects": objects})
    assert "Also imagines in numbers alone, 9 tokens a state" in render_card(folder)


def test_rows_of_a_protocol_and_of_a_guided_planner_are_told_apart(folder, tmp_path) -> None:
    weights = weights_hash(str(folder))
    guided = row(weights=weights, success=0.6, budget={"proposals": 0.5}, acting={"temperature": 0.5})
    asked = {"protocol": "p1", "asked": 20}
    path = bench(
        tmp_path / "b.json", row(weights=weights), guided, row("still", success=0.1) | {"control": "still"} | asked,
        row(success=0.7, weights=weights) | {"control": "imagined-objects"} | asked,
        row(success=None) | {"control": "token", "episodes": 0, "ci95": None} | asked,
    )  # fmt: skip
    card = write_card(folder, weights, benches=[path]).read_text()
    for line in (
        "Dot-v0 | imagined | goal | 10 | 50 %",
        "Dot-v0 | imagined, 50 % proposed | goal | 10 | 60 %",
        "Dot-v0 (P1) | still | goal | 10 | 10 %",
        "Dot-v0 (P1) | imagined-objects | goal | 10 | 70 %",
    ):
        assert f"| {line} |" in card, line
    assert "token" not in card.partition("## Measured")[2]


def test_figures_of_other_weights_are_refused(folder, tmp_path) -> None:
    weights = weights_hash(str(folder))
    for kind, path in (
        ("inspections", inspection(tmp_path / "i.json", WEIGHTS_OF_OTHERS)),
        ("benches", bench(tmp_path / "b.json", row(weights=WEIGHTS_OF_OTHERS), row("random"))),
    ):
        with pytest.raises(ValueError, match="measured with other weights"):
            write_card(folder, weights, **{kind: [path]})
    mixed = bench(tmp_path / "m.json", row(weights=WEIGHTS_OF_OTHERS), row(weights=weights, success=0.7))
    with pytest.warns(UserWarning, match="1 rows .* other weights"):
        card = write_card(folder, weights, benches=[mixed]).read_text()
    assert "70 %" in card and "50 %" not in card


def test_weights_trained_anew_start_with_a_clean_card(folder, tmp_path) -> None:
    weights = weights_hash(str(folder))
    write_card(folder, weights, benches=[bench(tmp_path / "b.json", row(weights=weights))])
    tiny.make_world(seed=1).save_pretrained(folder)
    card = write_card(folder, weights_hash(str(folder))).read_text()
    assert "Not measured in closed loop: `emu-embodied bench`" in card


@pytest.mark.parametrize("network", [".", "tokenizer", "eye"])
def test_every_network_trained_anew_makes_other_weights(network: str, tmp_path) -> None:
    tiny.make_world(objects=tiny.OBJECTS).save_pretrained(tmp_path)
    before = weights_hash(str(tmp_path))
    assert before == weights_hash(str(tmp_path))
    file = tmp_path / network / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert weights_hash(str(tmp_path)) != before


def test_a_file_of_something_else_is_named(folder, tmp_path) -> None:
    (tmp_path / "x.json").write_text('{"per_horizon": []}')
    for kind in ("inspections", "benches"):
        with pytest.raises(ValueError, match=r"x\.json holds no such measurement"):
            write_card(folder, "w", **{kind: [tmp_path / "x.json"]})


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_card_is_what_rendering_gives_now(name: str) -> None:
    folder = WEIGHTS / name
    advice = f"run: emu-embodied card --checkpoint {name}"
    assert (folder / CARD).is_file(), advice
    assert (folder / CARD).read_text(encoding="utf-8") == render_card(folder), advice
    assert json.loads((folder / MEASURED).read_text())["weights"] == weights_hash(name), advice
