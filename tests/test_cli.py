"""The command line: what every flag means, and one line and exit code 2 for what is wrong."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from emu_embodied import cli, cli_generate, cli_train, doctor, world_config
from emu_embodied.cli import main
from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.hardware import GLProbe
from emu_embodied.presets import PRESETS
from emu_embodied.train.loop import LoopResult
from emu_embodied.world_config import WorldModelConfig
from tests import tiny

ROOT = Path(__file__).parents[1]
COMMANDS = {
    ("doctor",): cli.Doctor,
    ("collect",): cli.Collect,
    ("train", "tokenizer"): cli_train.TrainTokenizer,
    ("train", "world"): cli_train.TrainWorld,
    ("train", "dida"): cli_train.TrainDida,
    ("train", "policy"): cli_train.TrainPolicy,
    ("plan",): cli.Plan,
    ("bench",): cli.Bench,
    ("imagine",): cli.Imagine,
    ("generate",): cli_generate.Generate,
    ("explore",): cli.Explore,
}
CALLS = {
    ("doctor",): "doctor --json",
    ("collect",): "collect --env PandaPush-v0 --episodes 8 --out DIR --workers 2 --seed 0",
    ("train", "tokenizer"): "train tokenizer --preset nano --data DIR --out DIR --steps 5 --max-minutes 1.5 --resume",
    ("train", "world"): "train world --preset nano --data DIR --out DIR --steps 5 --max-minutes 1.5 --resume",
    ("train", "dida"): "train dida --preset nano --data DIR --out DIR --steps 5 --max-minutes 1.5 --resume",
    ("train", "policy"): "train policy --data DIR --init nano --out DIR --episodes 50 --max-minutes 1.5 --resume",
    ("plan",): "plan --env PandaPush-v0 --checkpoint nano --seed 0 --out DIR --subgoals",
    ("bench",): "bench --env PandaPush-v0,PandaReach-v0 --policy imagined --checkpoint DIR --episodes 3 --json FILE",
    ("imagine",): "imagine --checkpoint nano --env PandaPush-v0 --episodes 2 --horizon 10 --json FILE --out DIR",
    ("generate",): "generate --checkpoint DIR --task vla --prompt TEXT --out DIR --greedy",
    ("explore",): "explore --checkpoint DIR --image FILE --out DIR --free --steps 3 --greedy",
}


def refusal(capsys, *arguments: object) -> str:
    """The one line that a command which is wrong prints."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("emu-embodied: error: "), captured.err
    return lines[0]


# -- words and flags --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_explains_every_flag(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(COMMANDS[words]):
        assert f"--{field.name.replace('_', '-')}" in text


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_lists_subcommands(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    here = {words[len(arguments) - 1] for words in COMMANDS if words[: len(arguments) - 1] == tuple(arguments[:-1])}
    assert all(word in text for word in here)


@pytest.mark.parametrize("words", CALLS, ids=" ".join)
def test_documented_calls_are_understood(words, monkeypatch):
    seen = []
    monkeypatch.setattr(COMMANDS[words], "run", lambda self: seen.append(self) or 0)
    if words[0] == "train":
        monkeypatch.setattr(cli_train.Train, "run", lambda self: self.stage.run())
    assert main(CALLS[words].split()) == 0
    (command,) = seen
    given = CALLS[words].split()[len(words) :]
    for flag, value in zip(given, [*given[1:], "--"], strict=True):
        if flag.startswith("--"):
            found = getattr(command, flag[2:].replace("-", "_"))
            assert found is True if value.startswith("--") else str(found) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["docter"], "unknown subcommand 'docter'; did you mean doctor?"),
        (["train", "wrold"], "unknown subcommand 'wrold'; did you mean world?"),
        (["fly"], "known: bench, card, collect, doctor, explore, generate, imagine, inspect, plan, rl, train"),
        (["plan", "--env", "PandaPush-v0", "--sed", "3"], "unknown flag --sed; did you mean --seed?"),
        (["train", "world", "--max_minuts=3"], "unknown flag --max_minuts; did you mean --max-minutes?"),
        (["doctor", "--jsn"], "unknown flag --jsn; did you mean --json?"),
    ],
)
def test_unknown_words_name_the_nearest(arguments, message, capsys):
    assert message in refusal(capsys, *arguments)


@pytest.mark.parametrize("arguments", [[], ["train"], ["plan"], ["collect", "--env", "E", "--episodes", "many"]])
def test_what_cannot_be_parsed_ends_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [words for words in CALLS if "--env" in CALLS[words]], ids=" ".join)
def test_an_unknown_environment_names_the_nearest(words, tmp_path, capsys):
    call = CALLS[words].replace("PandaPush-v0", "PandaPus-v0")
    call = " ".join(str(tmp_path / part) if part in ("DIR", "FILE") else part for part in call.split())
    assert "unknown environment 'PandaPus-v0'; did you mean 'PandaPush-v0'?" in refusal(capsys, *call.split())
    assert not list(tmp_path.iterdir())


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    """A package that ships one toy model called nano."""
    weights = tmp_path / "weights"
    tiny.make_world().save_pretrained(weights / "nano")
    monkeypatch.setattr(world_config, "WEIGHTS", weights)
    monkeypatch.setattr(doctor, "WEIGHTS", weights, raising=False)
    return weights


@pytest.mark.parametrize("words", [("plan",), ("bench",), ("imagine",)], ids=" ".join)
def test_an_unknown_checkpoint_names_the_nearest(words, shipped, tmp_path, capsys):
    out = {"DIR": tmp_path / "out", "FILE": tmp_path / "f.json", "nano": "naon"}
    call = [out.get(part, part) for part in CALLS[words].split()]
    if words == ("bench",):
        call[call.index("--checkpoint") + 1] = "naon"
    assert "no checkpoint 'naon'" in (line := refusal(capsys, *call)) and "did you mean 'nano'?" in line


def test_a_checkpoint_for_another_robot_is_refused(shipped, tmp_path, capsys):
    files = ["--json", tmp_path / "f.json", "--out", tmp_path / "out"]
    line = refusal(capsys, "imagine", "--env", "PandaReach-v0", "--episodes", 1, "--horizon", 1, *files)
    assert "the checkpoint does not fit PandaReach-v0, action dimensions: 2 against 4" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--passes", "0"], "passes is 0, it has to be a whole number of at least 1"),
        (["--decoding", "autoregressive", "--passes", "2"], "--passes is for parallel decoding"),
        (["--horizon", "0"], "have to be at least 1"),
    ],
)
def test_imagination_that_cannot_be_is_refused_before_anything_is_recorded(flags, message, shipped, tmp_path, capsys):
    files = ["--json", tmp_path / "f.json", "--out", tmp_path / "out"]
    assert message in refusal(capsys, "imagine", "--env", "PandaReach-v0", *files, *flags)


def test_an_unknown_policy_names_the_nearest(tmp_path, capsys):
    line = refusal(capsys, "bench", "--env", "PandaPush-v0", "--policy", "radom", "--json", tmp_path / "f.json")
    assert "unknown policy 'radom': did you mean 'random'?" in line


@pytest.mark.parametrize("stage", ["tokenizer", "eye", "world", "dida", "policy"])
def test_an_unknown_preset_names_the_nearest(stage, tmp_path, capsys):
    line = refusal(capsys, "train", stage, "--preset", "nanno", "--data", tmp_path, "--out", tmp_path / "out")
    assert "unknown preset 'nanno'; did you mean 'nano'?" in line


def test_every_preset_is_named_by_the_help_of_the_flag(capsys):
    with pytest.raises(SystemExit):
        main(["train", "world", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in PRESETS)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("expert", "'expert' is not behaviour=share"),
        ("expert=lots", "'expert=lots' is not behaviour=share"),
        ("exprt=1", "did you mean 'expert'"),
        ("expert=0", "at least one behaviour"),
    ],
)
def test_a_mixture_that_cannot_be_recorded_is_named(mixture, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert message in refusal(capsys, "collect", "--env", "PandaReach-v0", "--out", out, "--mixture", mixture)
    assert not out.exists()


def test_a_mixture_is_shares_of_behaviours(monkeypatch):
    seen = []

    def collect(config, *rest, **more):
        seen.append(config.mixture)
        raise ValueError("enough")

    monkeypatch.setattr("emu_embodied.data.collect.collect", collect)
    for more in ([], ["--mixture", "expert=1, play=3"]):
        assert main(["collect", "--env", "PandaReach-v0", "--out", "nowhere", *more]) == 2
    assert seen == [{"expert": 0.25, "noisy": 0.35, "random": 0.2, "play": 0.2}, {"expert": 1.0, "play": 3.0}]


# -- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_reports_as_json_and_as_text(shipped, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "probe_gl", lambda: GLProbe(backend="egl", renderer="llvmpipe", errors={}))
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True and report["gl"]["backend"] == "egl"
    assert {"cpu", "cores", "torch_threads", "accelerators"} <= report["hardware"].keys()
    assert {"torch", "mujoco"} <= report["versions"].keys() and report["dtype"] in ("float32", "bfloat16")
    (weights,) = report["weights"]
    assert weights["name"] == "nano" and weights["env_ids"] == ["Dot-v0"] and weights["megabytes"] > 0
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "egl (llvmpipe)" in text and "nano (" in text


def test_doctor_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(world_config, "WEIGHTS", tmp_path)
    monkeypatch.setattr(doctor, "probe_gl", lambda: GLProbe(backend=None, renderer="", errors={"egl": "no library"}))
    monkeypatch.setattr(doctor, "EXTRAS", {"no_such_module": "track"})
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["healthy"] and report["missing_extras"] == {"no_such_module": "track"}
    first, second, third = report["advice"]
    assert "apt-get install" in first and "no shipped weights" in second and "emu-embodied[track]" in third
    assert main(["doctor"]) == 1
    assert "NOT WORKING" in capsys.readouterr().out


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """A dataset and a tokenizer for the preset ``toy``."""
    monkeypatch.setitem(PRESETS, "toy", tiny.PRESET)
    tiny.make_store(tmp_path / "data")
    tiny.make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def stage(toy: Path, name: str, *more: object) -> list[str]:
    folders = ["--data", toy / "data", "--out", toy / "out"]
    flags = ["--steps", 2, "--batch", 2, "--threads", 1, "--device", "cpu"]
    return [str(part) for part in ("train", name, *folders, *flags, *more)]


def test_stages_follow_each_other_in_one_folder(toy, capsys):
    world = stage(toy, "world", "--preset", "toy", "--tokenizer", toy / "tokenizer")
    assert "no tokenizer in" in refusal(capsys, *stage(toy, "world", "--preset", "toy"))
    assert main(world) == 0
    assert f"world model in {toy / 'out'}" in capsys.readouterr().out
    assert main(stage(toy, "dida")) == 0
    assert f"adapting: {toy / 'out'}" in capsys.readouterr().out
    assert WorldModelConfig.load(toy / "out" / "world.json").paths == ("uniform",)
    meta = json.loads((toy / "out" / "meta.json").read_text())
    assert meta["dida"]["command"] and meta["dida"]["extra"]["steps"] == 2
    further = stage(toy, "dida", "--init", toy / "out", "--path", "mask,uniform")
    further[further.index("--out") + 1] = str(toy / "further")
    assert main(further) == 0
    assert WorldModelConfig.load(toy / "further" / "world.json").paths == ("mask", "uniform")
    assert {"world", "dida before", "dida"} <= json.loads((toy / "further" / "meta.json").read_text()).keys()
    assert main([*further[:-4], "--resume"]) == 0  # goes on with its own paths
    # What is there is neither overwritten nor mixed with something else.
    capsys.readouterr()
    assert "did you mean 'metric'" in refusal(capsys, *stage(toy, "dida", "--path", "metrics"))
    for arguments, message in (
        (stage(toy, "world", "--preset", "toy"), "pass --resume"),
        (stage(toy, "dida"), "pass --resume"),
        (stage(toy, "dida", "--init", toy / "other"), "--init names another"),
        ([*world, "--resume"], "--tokenizer names another"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert main(stage(toy, "dida", "--resume")) == 0


def test_a_missing_dataset_and_an_impossible_setting_are_named(toy, capsys):
    assert "dataset.json is missing" in refusal(capsys, "train", "world", "--data", toy, "--out", toy / "out")
    bad = stage(toy, "world", "--preset", "toy", "--tokenizer", toy / "tokenizer", "--max-minutes", "-1")
    assert "max_minutes is -1.0" in refusal(capsys, *bad)
    bad = stage(toy, "world", "--preset", "toy", "--tokenizer", toy / "tokenizer", "--device", "gpu")
    assert "unknown device 'gpu': did you mean 'cuda'?" in refusal(capsys, *bad)


def test_an_interrupted_stage_says_so(toy, monkeypatch, capsys):
    from emu_embodied.train import pretrain

    monkeypatch.setattr(pretrain, "train_world", lambda *a, **k: LoopResult(7, 1.0, "signal", {}))
    assert main(stage(toy, "world", "--preset", "toy", "--tokenizer", toy / "tokenizer")) == 130
    assert "interrupted at step 7" in capsys.readouterr().out


# -- main -------------------------------------------------------------------------------------------------------------


def run_as(monkeypatch, action) -> int:
    monkeypatch.setattr(cli.Doctor, "run", lambda self: action())
    return main(["doctor"])


def fail(error: BaseException):
    raise error


def test_errors_of_users_end_in_one_line_and_others_are_not_hidden(monkeypatch, capsys):
    assert run_as(monkeypatch, lambda: fail(ValueError("first\n  second"))) == 2
    assert capsys.readouterr().err == "emu-embodied: error: first second\n"
    assert run_as(monkeypatch, lambda: fail(PermissionError(13, "Permission denied", "/root/x"))) == 2
    assert "/root/x" in capsys.readouterr().err
    assert run_as(monkeypatch, lambda: fail(KeyboardInterrupt())) == 130
    with pytest.raises(RuntimeError, match="a bug"):
        run_as(monkeypatch, lambda: fail(RuntimeError("a bug")))


def test_warnings_are_one_line_and_the_hook_is_put_back(monkeypatch, capsys):
    before = warnings.showwarning
    assert run_as(monkeypatch, lambda: warnings.warn("mind the gap", stacklevel=1) or 0) == 0
    assert capsys.readouterr().err == "warning: mind the gap\n"
    assert warnings.showwarning is before


def test_results_are_not_overwritten(shipped, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_text("{}")
    assert "holds a result already" in refusal(capsys, "plan", "--env", "PandaReach-v0", "--out", tmp_path / "out")
    (tmp_path / "f.json").write_text("{}")
    files = ["--json", tmp_path / "f.json", "--out", tmp_path / "out"]
    assert "f.json exists already" in refusal(capsys, "imagine", "--env", "PandaReach-v0", *files)
    line = refusal(capsys, "bench", "--env", "PandaReach-v0", "--policy", "random", "--json", tmp_path / "f.json")
    assert "holds no benchmark results" in line


def test_the_program_returns_its_exit_code(tmp_path):
    command = [sys.executable, "-m", "emu_embodied.cli", "plan", "--env", "PandaPus-v0", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "PandaPush-v0" in done.stderr


def test_subgoals_are_for_policies_that_plan_to_them(shipped, tmp_path, capsys):
    plan = ["plan", "--env", "PandaReach-v0", "--out", tmp_path / "out"]
    assert "imagined and true policies" in refusal(capsys, *plan, "--subgoals", "--policy", "shooting")
    assert "is for --subgoals" in refusal(capsys, *plan, "--subgoal-model", tmp_path)
    assert not (tmp_path / "out").exists()


def test_collect_records_the_cameras_asked_for(tmp_path: Path) -> None:
    main(["collect", "--env", "PandaReach-v0", "--episodes", "2", "--workers", "1", "--cameras", "front",
          "--out", str(tmp_path / "data")])  # fmt: skip
    assert set(EpisodeStore.open(tmp_path / "data")[0].frames) == {"front"}
