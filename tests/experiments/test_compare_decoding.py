import csv
import json
from dataclasses import replace

import pytest

from emu_embodied.envs.registry import make
from emu_embodied.experiments import compare_decoding
from emu_embodied.experiments.compare_decoding import CompareDecoding, Variant, format_rows, main, variants
from emu_embodied.experiments.two_modes import PRESET
from emu_embodied.experiments.untrained import untrained
from emu_embodied.world_model import WorldModel

ENV = "PandaReach-v0"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model with random weights that reads what the environment shows."""
    simulator = make(ENV, image_size=PRESET.image_size)
    fields, block = simulator.proprio_fields, simulator.block
    simulator.close()
    from emu_embodied.experiments import untrained as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PROPRIO", tuple(fields))
        row = replace(PRESET, block=block, text_length=48, context_states=2, max_states=4)
        world = untrained(row, paths=("uniform", "mask"))
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    world = WorldModel(replace(world.config, env_ids=(ENV,)), world.backbone, world.frames)
    world.save_pretrained(folder)
    return folder


def config(checkpoint, out, **changes) -> CompareDecoding:
    values = {
        "checkpoint": str(checkpoint), "env": ENV, "out": out, "passes": "1,2", "horizon": 2, "recorded": 2,
        "scenes": 2, "plans": 3, "episodes": 1, "success_passes": "1", "samples": 2, "iterations": 1, "device": "cpu",
    }  # fmt: skip
    return CompareDecoding(**(values | changes))


def test_every_way_of_decoding_gets_a_row_and_a_stopped_run_goes_on(checkpoint, tmp_path, monkeypatch, capsys):
    calls = []
    imagine = compare_decoding.imagine

    def stopped(variant, *arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(variant)
        return imagine(variant, *arguments)

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(compare_decoding, "imagine", stopped)
        main(config(checkpoint, out))
    assert len(json.loads((out / "compare_decoding.json").read_text())["rows"]) == 2
    main(config(checkpoint, out))
    printed = capsys.readouterr().out
    content = json.loads((out / "compare_decoding.json").read_text())
    found = [(row["method"], row["passes"]) for row in content["rows"]]
    assert found == [("autoregressive", 0), ("uniform", 1), ("mask", 1), ("uniform", 2), ("mask", 2)]
    assert [row["planning"] is not None for row in content["rows"]] == [True, True, True, False, False]
    for row in content["rows"]:
        assert [one["h"] for one in row["per_horizon"]] == [1, 2] and row["plans"]["frames_per_s"] > 0
        assert row["plans"]["tool_error_cm"] > 0
    assert {"compare_decoding.csv", f"compare_decoding_{ENV}.svg", f"compare_decoding_{ENV}.png"} <= {
        file.name for file in out.iterdir()
    }
    with (out / "compare_decoding.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 5 and table[0]["success_high"] and not table[3]["success"]
    assert float(table[1]["proprio_mae_2"]) == content["rows"][1]["per_horizon"][1]["proprio_mae"]
    assert "mask x2" in printed and "autoregressive" in printed
    # Nothing is measured twice, and nothing is reused that was measured otherwise.
    with monkeypatch.context() as patch:
        for name in ("imagine", "plan"):
            patch.setattr(compare_decoding, name, lambda *_: pytest.fail("measured again"))
        rows = compare_decoding.compare(config(checkpoint, out))
    assert format_rows(rows).count("\n") == 5
    again = []
    monkeypatch.setattr(compare_decoding, "imagine", lambda variant, *a: again.append(variant) or imagine(variant, *a))
    compare_decoding.compare(config(checkpoint, out, seed=1, episodes=0, passes="1", paths="mask"))
    assert [variant.label for variant in again] == ["autoregressive", "mask x1"]


def test_ways_of_decoding(checkpoint, tmp_path):
    chosen = variants(config(checkpoint, tmp_path, passes="1,4", orders="random,entropy"), ("uniform",))
    assert [variant.label for variant in chosen] == ["autoregressive", "uniform x1", "uniform x4", "uniform entropy x4"]
    assert chosen[3] == Variant("uniform", 4, "entropy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passes": "0,1"}, "each has to be at least 1"),
        ({"paths": "metric"}, "were adapted with uniform, mask, not with 'metric'"),
        ({"env": "PandaReech-v0"}, "did you mean 'PandaReach-v0'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_measured(checkpoint, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main(config(checkpoint, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_file_of_something_else_is_not_overwritten(checkpoint, tmp_path):
    (tmp_path / "compare_decoding.json").write_text('{"rows": [{"other": 1}]}')
    with pytest.raises(ValueError, match="holds no comparison"):
        main(config(checkpoint, tmp_path))
