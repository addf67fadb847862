"""The comparison of streams runs and writes what it says."""

from __future__ import annotations

import json

import pytest

from emu_embodied.experiments.bench_streams import StreamBench, main
from tests import tiny


def test_rows_name_both_costs_and_their_ratio(tmp_path, capsys):
    tiny.make_world(objects=tiny.OBJECTS, streams=("pictures", "numbers")).save_pretrained(tmp_path / "world")
    main(StreamBench(checkpoint=str(tmp_path / "world"), plans="3x2,2x1", repeats=1, json=tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["candidates"], row["blocks"]) for row in rows] == [(3, 2), (2, 1)]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["pictures_s"] / row["numbers_s"])
        assert row["state_tokens"] == [17, 9]
    assert "3 x 2" in capsys.readouterr().out


def test_weights_that_know_pictures_alone_are_refused(tmp_path):
    tiny.make_world(objects=tiny.OBJECTS).save_pretrained(tmp_path / "world")
    with pytest.raises(ValueError, match="not of numbers"):
        main(StreamBench(checkpoint=str(tmp_path / "world")))
