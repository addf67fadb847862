"""Where a checkpoint comes from is carried on when another is made of it."""

from __future__ import annotations

import json

from emu_embodied.train.meta import inherit_meta, inherit_tokenizer


def stages(folder) -> dict:
    return json.loads((folder / "meta.json").read_text())


def write(folder, **entries: str) -> None:
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps(entries))


def test_a_new_folder_takes_all_over_and_renames_the_stage_that_runs(tmp_path):
    write(tmp_path / "a", tokenizer="t", dida="d")
    inherit_meta(tmp_path / "a", tmp_path / "b")
    assert stages(tmp_path / "b") == {"tokenizer": "t", "dida before": "d"}


def test_what_a_folder_has_of_its_own_stays(tmp_path):
    write(tmp_path / "a", tokenizer="t", world="w")
    write(tmp_path / "b", eye="e", tokenizer="own")
    inherit_meta(tmp_path / "a", tmp_path / "b")
    assert stages(tmp_path / "b") == {"tokenizer": "own", "world": "w", "eye": "e"}


def test_a_folder_that_is_gone_on_with_is_left_alone(tmp_path):
    write(tmp_path / "a", tokenizer="t", dida="d")
    write(tmp_path / "b", tokenizer="t", dida="later")
    for source in ("a", "b"):
        inherit_meta(tmp_path / source, tmp_path / "b")
        assert stages(tmp_path / "b") == {"tokenizer": "t", "dida": "later"}


def test_the_same_folder_is_not_its_own_heir(tmp_path):
    write(tmp_path / "a", tokenizer="t", world="w")
    inherit_meta(tmp_path / "a", tmp_path / "a")
    assert stages(tmp_path / "a") == {"tokenizer": "t", "world": "w"}


def test_nothing_known_is_nothing_inherited(tmp_path):
    (tmp_path / "a").mkdir()
    inherit_meta(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_borrowed_tokenizer_keeps_its_record(tmp_path):
    write(tmp_path / "a", tokenizer="t", world="w")
    write(tmp_path / "b", eye="e")
    for out, expected in (("b", {"tokenizer": "t", "eye": "e"}), ("c", {"tokenizer": "t"})):
        inherit_tokenizer(tmp_path / "a", tmp_path / out)
        assert stages(tmp_path / out) == expected
    write(tmp_path / "d", tokenizer="own")
    inherit_tokenizer(tmp_path / "a", tmp_path / "d")
    assert stages(tmp_path / "d") == {"tokenizer": "own"}
    inherit_tokenizer(tmp_path / "nowhere", tmp_path / "d")
    assert stages(tmp_path / "d") == {"tokenizer": "own"}
