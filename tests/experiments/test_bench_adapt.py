import json

from emu_embodied import presets
from emu_embodied.experiments.bench_adapt import AdaptBench, main
from tests import tiny


def test_both_kinds_of_training_are_measured_on_all_their_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(presets.PRESETS, "toy", tiny.PRESET)
    file = tmp_path / "rows.json"
    main(AdaptBench(presets="toy", paths="uniform;metric,mask", batch=2, repeats=1, json=file))
    plain, one, two = json.loads(file.read_text())["rows"]
    assert [row["who"] for row in (plain, one, two)] == ["next token", "dida uniform", "dida metric,mask"]
    assert plain["of_next_token"] == 1.0 and one["tokens"] == two["tokens"] > 1.5 * plain["tokens"]
    assert one["of_next_token"] > 0 and "dida metric,mask" in capsys.readouterr().out
