import json
import math

import pytest
import torch

from emu_embodied import presets
from emu_embodied.experiments import bench_decode
from emu_embodied.experiments.bench_decode import LAYER, Case, DecodeBench, list_cases, main
from emu_embodied.experiments.decode_floors import Machine, best_seconds, measure_machine, work_of_state
from emu_embodied.experiments.untrained import untrained
from tests import tiny


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "toy", tiny.PRESET)
    monkeypatch.setattr(bench_decode, "measure_machine", lambda *_: Machine(10.0, 5.0))


def bench(tmp_path, **changes) -> DecodeBench:
    values = {"sizes": "toy", "batches": "1,3", "passes": "1,2", "repeats": 1, "device": "cpu"}
    return DecodeBench(**(values | {"json": tmp_path / "decode.json"} | changes))


def test_every_way_is_measured_compared_drawn_and_kept(tmp_path, capsys, monkeypatch):
    config = bench(tmp_path)
    main(config)
    content = json.loads(config.json.read_text())
    rows = content["rows"]
    methods = [("autoregressive", 0), ("transformers", 0), ("dida", 1), ("dida", 2)]
    assert [(row["batch"], row["method"], row["passes"]) for row in rows] == [(b, *m) for b in (1, 3) for m in methods]
    for row in rows:
        assert row["frames_per_s"] > 0 and row["tokens_per_frame"] == 20 and row["changed_token_accuracy"] is None
        assert row["latency_s"] == pytest.approx(row["batch"] / row["frames_per_s"])
        own = [other for other in rows if other["batch"] == row["batch"]]
        assert row["ratio_vs_ar"] == pytest.approx(row["frames_per_s"] / own[0]["frames_per_s"])
        assert row["ratio_vs_hf"] == pytest.approx(row["frames_per_s"] / own[1]["frames_per_s"])
    assert all((tmp_path / f"decode.{kind}").stat().st_size > 1000 for kind in ("svg", "png"))
    assert "dida x2" in capsys.readouterr().out
    # What is there is not measured again.
    monkeypatch.setattr(bench_decode.Subject, "measure", lambda *_: pytest.fail("measured again"))
    main(config)
    assert json.loads(config.json.read_text())["rows"] == rows
    with pytest.raises(ValueError, match="other settings"):
        main(bench(tmp_path, horizon=2))


def test_rows_that_take_too_long_say_so_and_no_row_begins_too_late(tmp_path):
    config = bench(tmp_path, batches="1", row_seconds=1e-9)
    main(config)
    rows = json.loads(config.json.read_text())["rows"]
    assert len(rows) == 4
    assert all(row["frames_per_s"] is None and "foreseen" in row["note"] for row in rows)
    late = bench(tmp_path, minutes=0, json=tmp_path / "late.json")
    main(late)
    assert not late.json.exists()


def test_accuracy_stands_beside_trained_weights(tmp_path, monkeypatch):
    folder = tmp_path / "trained"
    untrained(tiny.PRESET, paths=("uniform",)).save_pretrained(folder)
    monkeypatch.setattr(bench_decode, "accuracies", lambda *_: {("dida", 1): 0.25})
    config = bench(tmp_path, sizes="", checkpoint=str(folder), env="Any-v0", batches="2", passes="1")
    main(config)
    rows = json.loads(config.json.read_text())["rows"]
    assert [row["changed_token_accuracy"] for row in rows] == [None, None, 0.25]


def test_cases_cover_sizes_batches_and_passes():
    cases = list_cases(DecodeBench(sizes=f"small,{LAYER}", checkpoint="nano", batches="1,8", passes="1,4"))
    assert cases[0] == Case("nano", 1, "autoregressive") and cases[-1] == Case("small", 8, "dida", 4)
    assert len(cases) == 2 * 2 * 4


def test_work_counts_what_the_layers_multiply():
    world = untrained(tiny.PRESET, paths=("uniform",))
    layout, shape = world.layout, world.backbone.config
    settings = {"batch": 3, "context": 40, "horizon": 1}
    parameters = sum(p.numel() for p in world.backbone.model.layers.parameters() if p.dim() == 2)
    one = work_of_state(shape, layout, passes=1, **settings)
    two = work_of_state(shape, layout, passes=2, **settings)
    dense = 2 * 3 * parameters * (layout.state_tokens + layout.action_tokens) / 1e9
    assert dense < one.gflop < 2 * dense and one.gflop < two.gflop < 2 * one.gflop
    assert two.gigabytes == pytest.approx(2 * one.gigabytes)
    sequential = work_of_state(shape, layout, passes=0, **settings)
    assert sequential.gflop == pytest.approx(one.gflop) and sequential.gigabytes > 10 * one.gigabytes
    further = work_of_state(shape, layout, passes=1, batch=3, context=40, horizon=4)
    assert further.gflop > one.gflop  # states that others follow are written as well
    assert one.seconds(Machine(1.0, 2.0)) == (one.gflop, one.gigabytes / 2)


def test_the_machine_and_the_clock():
    machine = measure_machine(torch.device("cpu"), torch.float32, size=64, repeats=1)
    assert machine.gflop_per_s > 0 and math.isfinite(machine.gb_per_s)
    calls = []
    best_seconds(lambda: calls.append(1), 4, torch.device("cpu"))
    assert len(calls) == 5
    best_seconds(lambda: calls.append(1), 4, torch.device("cpu"), limit=-1)
    assert len(calls) == 6
