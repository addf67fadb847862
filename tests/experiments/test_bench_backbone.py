import json

from emu_embodied.experiments.bench_backbone import BackboneBench, main


def test_all_ways_of_decoding_agree_and_are_measured(tmp_path, capsys):
    file = tmp_path / "rows.json"
    main(BackboneBench(presets="nano", batches="2", prompt=12, new=6, repeats=1, json=file))
    content = json.loads(file.read_text())
    assert [row["who"] for row in content["rows"]] == ["ours", "transformers", "transformers static"]
    assert content["rows"][0]["ours_is_faster"] == 1.0
    assert "transformers static" in capsys.readouterr().out
