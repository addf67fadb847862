"""``emu-embodied inspect`` and ``card``, as people run them."""

from __future__ import annotations

import json

import pytest

from emu_embodied.cli import main
from emu_embodied.metrics import looking
from tests.panda_checkpoint import small_checkpoint

FEW = ["--env", "PandaReach-v0", "--episodes", "12", "--blocks", "2", "--horizon", "1", "--scenes", "2", "--plans", "4",
       "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(small_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model"))


@pytest.fixture(scope="module")
def inspected(checkpoint, tmp_path_factory):
    file = tmp_path_factory.mktemp("found") / "inspect.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looking, "STEPS", looking.EVERY)
        assert main(["inspect", "--checkpoint", checkpoint, *FEW, "--json", str(file)]) == 0
    return file


def test_inspect_writes_the_promised_figures(inspected) -> None:
    content = json.loads(inspected.read_text())
    promised = {"gripper_probe_cm", "object_probe_cm", "codebook_used", "idempotent", "action_sensitivity_db"}
    assert all(isinstance(content[name], float) for name in promised)
    assert 0 < content["codebook_used"] <= 1 and 0 <= content["idempotent"] <= 1
    assert 0 < content["gripper_probe_cm"] < 100 and content["object_guess_cm"] > 0
    assert -1 <= content["plans"]["correlation"] <= 1
    assert [row["h"] for row in content["ahead"]] == [0, 1]
    extra = content["meta"]["extra"]
    assert extra["env"] == "PandaReach-v0" and extra["episodes"] == 12 and extra["blocks"] == 2
    assert inspected.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_a_card_shows_them(inspected, checkpoint, capsys) -> None:
    assert main(["card", "--checkpoint", checkpoint, "--inspect", str(inspected)]) == 0
    path = capsys.readouterr().out.strip()
    content = json.loads(inspected.read_text())
    with open(path) as file:
        card = file.read()
    assert f"| PandaReach-v0 | {content['gripper_probe_cm']:.1f} ({content['gripper_guess_cm']:.1f}) cm |" in card


def test_a_card_of_other_weights_is_refused(inspected, tmp_path, capsys) -> None:
    other = small_checkpoint(tmp_path / "other", "PandaReach-v0")
    (other / "model.safetensors").write_bytes((other / "tokenizer" / "model.safetensors").read_bytes())
    assert main(["card", "--checkpoint", str(other), "--inspect", str(inspected)]) == 2
    assert "measured with other weights" in capsys.readouterr().err
    assert not (other / "MODEL_CARD.md").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--env", "PandaReech-v0"], "did you mean 'PandaReach-v0'"),
        (["--env", "PandaReach-v0", "--horizon", "9"], "from 1 to the 4 of --blocks"),
        (["--env", "PandaReach-v0", "--checkpoint", "nanu"], "did you mean 'nano'"),
        (["--env", "PandaReach-v0", "--episodes", "3", "--blocks", "1", "--horizon", "1"], "give at least 12"),
    ],
)
def test_what_cannot_be_inspected_is_refused_in_a_line(flags, says, checkpoint, tmp_path, capsys) -> None:
    given = [] if "--checkpoint" in flags else ["--checkpoint", checkpoint]
    assert main(["inspect", *given, *flags, "--device", "cpu", "--json", str(tmp_path / "x.json")]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_results_are_not_overwritten(inspected, checkpoint, capsys) -> None:
    assert main(["inspect", "--checkpoint", checkpoint, *FEW, "--json", str(inspected)]) == 2
    assert "exists already" in capsys.readouterr().err
