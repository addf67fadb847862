"""``generate``: what is refused before memory is spent, what is left on disk, what is skipped."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emu_embodied import cli_generate
from emu_embodied.cli import main
from emu_embodied.decode.events import Finished, ImageDone, ImageStarted, Note, TextChunk
from emu_embodied.prompt_file import Prompt, read_prompts, share_of
from tests import official

PIXELS = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)


def image_events(index: int) -> list:
    return [ImageStarted(index, (2, 3)), ImageDone(index, torch.arange(6).view(2, 3), PIXELS + np.uint8(index))]


class FakeModel:
    """Answers every request alike; ``breaks_at`` presses Ctrl-C before that event."""

    def __init__(self) -> None:
        self.requests: list = []
        self.draws: list[int] = []
        self.breaks_at: int | None = None
        self.events: list = [
            TextChunk("the whole ", "global_cot"),
            TextChunk("plan", "global_cot", ends=True),
            TextChunk("Step 1: "),
            TextChunk("<b>grasp</b> \x1b[31m![](http://evil)"),
            TextChunk("a red cup", "image_cot", ends=True),
            *image_events(0),
            TextChunk("Step 2."),
            *image_events(1),
            Note("a row was too short"),
            Finished("end", tuple(range(20))),
        ]

    def stream(self, request, generator=None, stop=None) -> Iterator:
        self.requests.append(request)
        self.draws.append(generator.initial_seed())
        for i, event in enumerate(self.events):
            if i == self.breaks_at:
                raise KeyboardInterrupt
            yield event


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    official.write_checkpoint(folder)
    return folder


@pytest.fixture
def model(monkeypatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setattr(cli_generate.Generate, "load", lambda self: fake)
    return fake


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "given.png"
    Image.fromarray(PIXELS).save(path)
    return path


def generate(checkpoint: Path, out: Path, *flags: object, task: str = "howto") -> int:
    words = ["generate", "--checkpoint", checkpoint, "--task", task, "--out", out, *flags]
    return main([str(word) for word in words])


def refusal(capsys, *arguments, **more) -> str:
    assert generate(*arguments, **more) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("emu-embodied: error: ")
    return lines[0]


# -- one prompt -------------------------------------------------------------------------------------------------------


def test_a_story_becomes_files(checkpoint, model, picture, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--prompt", "Tidy up", "--image", picture, "--steps", 2, "--seed", 7, "--cfg", 2, "--aspect", "1:1"]
    assert generate(checkpoint, out, *flags) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "given_00.png", "image_00.png", "image_01.png", "result.json", "story.html", "story.md",
    ]  # fmt: skip
    (request,) = model.requests
    assert (request.task, request.prompt, request.steps, model.draws) == ("howto", "Tidy up", 2, [7])
    assert np.array_equal(request.images[0], PIXELS)
    assert (request.settings.guidance, request.settings.size, request.settings.text_top_k) == (2, (64, 64), 200)
    assert np.array_equal(np.array(Image.open(out / "image_01.png")), PIXELS + np.uint8(1))
    result = json.loads((out / "result.json").read_text())
    assert result["finished"] and result["reason"] == "end" and result["notes"] == ["a row was too short"]
    assert [segment["kind"] for segment in result["segments"]] == [
        "global_cot", "text", "image_cot", "image", "text", "image",
    ]  # fmt: skip
    assert result["segments"][0]["text"] == "the whole plan"
    assert result["segments"][3] == {"kind": "image", "file": "image_00.png", "width": 12, "height": 8}
    assert result["tokens"] == {"generated": 20, "visual": 12} and result["seconds"] >= 0
    assert result["request"]["settings"]["size"] == [64, 64] and result["request"]["seed"] == 7
    assert result["meta"]["versions"]["torch"] == torch.__version__ and result["meta"]["seed"] == 7
    printed = capsys.readouterr().out
    assert "Step 1: <b>grasp</b>" in printed and "\x1b" not in printed  # a terminal is not the model's to control
    assert printed.index("Step 1") < printed.index(str(out / "image_00.png")) < printed.index("Step 2")


def test_a_story_is_whole_without_the_weights_of_others(checkpoint, model, picture, tmp_path):
    out = tmp_path / "out"
    generate(checkpoint, out, "--prompt", "A <script>alert(1)</script> & *more*", "--image", picture)
    page, text = (out / "story.html").read_text(), (out / "story.md").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>" not in page
    assert page.count("data:image/png;base64,") == 3 and 'src="http' not in page
    assert "<details><summary>plan of the whole</summary><p>the whole plan</p></details>" in page
    assert r"\<b\>grasp" in text and "![](http" not in text and text.count("\n![") == 3
    assert "> plan of the whole: the whole plan" in text


def test_pictures_are_given_in_either_way(checkpoint, model, picture, tmp_path):
    generate(checkpoint, tmp_path / "a", "--prompt", "P", "--image", picture, picture, task="x2i")
    generate(checkpoint, tmp_path / "b", "--prompt", "P", "--image", picture, "--image", picture, task="x2i")
    assert [len(request.images) for request in model.requests] == [2, 2]


def test_ctrl_c_keeps_what_is_complete_and_the_prompt_is_not_done(checkpoint, model, tmp_path, capsys):
    out = tmp_path / "out"
    model.breaks_at = 6  # inside the first picture
    assert generate(checkpoint, out, "--prompt", "P") == 130
    result = json.loads((out / "result.json").read_text())
    assert not result["finished"] and result["reason"] == "interrupted" and result["images"] == 0
    text = (out / "story.md").read_text()
    assert "the whole plan" in text and "stopped before the end" in text
    model.breaks_at = 9
    assert generate(checkpoint, out, "--prompt", "P") == 130
    assert json.loads((out / "result.json").read_text())["images"] == 1
    model.breaks_at, model.events = None, [TextChunk("no picture"), Finished("end")]
    assert generate(checkpoint, out, "--prompt", "P") == 0
    assert not (out / "image_00.png").exists() and json.loads((out / "result.json").read_text())["finished"]
    capsys.readouterr()
    assert "holds a result already" in refusal(capsys, checkpoint, out, "--prompt", "P")


def test_a_stopped_stream_is_not_finished_and_a_full_one_says_so(checkpoint, model, tmp_path):
    model.events = [TextChunk("half"), Finished("stopped")]
    generate(checkpoint, tmp_path / "a", "--prompt", "P")
    assert json.loads((tmp_path / "a" / "result.json").read_text())["finished"] is False
    model.events = [TextChunk("half"), Finished("length", (1, 2))]
    generate(checkpoint, tmp_path / "b", "--prompt", "P")
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    assert result["finished"] and "cut off" in result["notes"][0]


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


@needs("tiktoken")
@pytest.mark.parametrize(
    "flags",
    [
        [],
        pytest.param(["--quantize", "4bit"], marks=needs("accelerate", "bitsandbytes")),
        pytest.param(["--offload", "FOLDER"], marks=needs("accelerate")),
    ],
    ids=["plain", "4bit", "offload"],
)
def test_with_real_weights_from_the_command_to_the_files(flags, checkpoint, picture, tmp_path, capsys):
    flags = [tmp_path / flag if flag == "FOLDER" else flag for flag in flags]
    small = ["--image-area", 192, "--max-images", 2, "--greedy", "--device", "cpu"]
    assert generate(checkpoint, tmp_path / "out", "--prompt", "P", "--image", picture, *small, *flags, task="vla") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["reason"] == "images" and result["images"] == 2 and result["request"]["seed"] is None
    assert {segment["width"] for segment in result["segments"] if segment["kind"] == "image"} == {16}
    if flags == []:
        again = tmp_path / "again"
        generate(checkpoint, again, "--prompt", "P", "--image", picture, *small, task="vla")
        assert (again / "image_01.png").read_bytes() == (tmp_path / "out" / "image_01.png").read_bytes()


def test_a_full_device_is_advice(checkpoint, model, tmp_path, capsys):
    def full(*_: object, **__: object) -> Iterator:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    model.stream = full
    line = refusal(capsys, checkpoint, tmp_path / "out", "--prompt", "P")
    assert "memory is full" in line and f"doctor --checkpoint {checkpoint}" in line


# -- files of prompts -------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path, picture) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [
        "Stack the cups",
        "",
        json.dumps({"prompt": "Öffne die Tür", "image": "given.png", "task": "vla", "seed": 3}),
        json.dumps("a JSON string"),
        json.dumps({"prompt": "Four", "reference_image": ["given.png", "given.png"]}),
    ]
    path.write_text("\n".join(lines))
    return path


def test_a_file_of_prompts_is_shared_and_resumed(checkpoint, model, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--prompts", prompts, "--seed", 10]
    assert generate(checkpoint, out, *flags, "--num-workers", 2, "--worker-id", 1) == 0
    assert sorted(path.name for path in out.iterdir()) == ["0001-öffne-die-tür", "0003-four"]
    assert [(request.task, len(request.images)) for request in model.requests] == [("vla", 1), ("howto", 2)]
    assert model.draws == [3, 13]
    model.breaks_at = 4
    assert generate(checkpoint, out, *flags) == 130
    model.breaks_at = None
    assert generate(checkpoint, out, *flags) == 0
    assert [request.prompt for request in model.requests[2:]] == ["Stack the cups", "Stack the cups", "a JSON string"]
    assert all(json.loads(path.read_text())["finished"] for path in out.glob("*/result.json"))
    assert generate(checkpoint, out, *flags) == 0
    assert "nothing to do: all 4 prompts are finished" in capsys.readouterr().out
    assert "result of other settings" in refusal(capsys, checkpoint, out, *flags, "--cfg", 4)


def test_lines_are_prompts(prompts, tmp_path):
    found = read_prompts(prompts)
    assert [prompt.index for prompt in found] == [0, 1, 2, 3]
    assert found[1] == Prompt(index=1, text="Öffne die Tür", images=(tmp_path / "given.png",), task="vla", seed=3)
    assert found[2].text == "a JSON string" and found[3].images == (tmp_path / "given.png",) * 2
    shares = [share_of(found, 3, worker) for worker in range(3)]
    assert sorted(prompt.index for share in shares for prompt in share) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n \n", "holds no prompts"),
        ('ok\n{"prompt": "a"', "line 2: not JSON"),
        ('{"promt": "a"}', "line 1: unknown key 'promt'; did you mean 'prompt'?"),
        ('{"prompt": " "}', "line 1: the prompt is empty"),
        ('{"prompt": "a", "image": 3}', "line 1: an image is 3"),
        ('{"prompt": "a", "seed": "x"}', "line 1: seed is 'x', not int"),
    ],
)
def test_files_that_cannot_be_read_are_named(content, message, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        read_prompts(path)


# -- refusals, all before weights are read ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "task", "message"),
    [
        (["--prompt", "  "], "t2i", "the prompt is empty"),
        ([], "t2i", "give --prompt TEXT or --prompts FILE"),
        (["--prompt", "P", "--prompts", "F"], "t2i", "one of the two"),
        (["--prompt", "P"], "storry", "unknown task 'storry': did you mean story?"),
        (["--prompt", "P", "--image", "nowhere.png"], "vla", "nowhere.png is missing"),
        (["--prompt", "P", "--image", "SMALL"], "vla", "3 x 2 pixels: smaller than one cell of 4 x 4"),
        (["--prompt", "P", "--image", "TEXT"], "vla", "cannot be read as a picture"),
        (["--prompt", "P", "--height", "64"], "t2i", "--height and --width belong together"),
        (["--prompt", "P", "--height", "64", "--width", "64", "--aspect", "1:1"], "t2i", "not both"),
        (["--prompt", "P", "--height", "64", "--width", "9999999"], "t2i", "1 to 999 are possible"),
        (["--prompt", "P", "--aspect", "wide"], "t2i", "image size 'wide'"),
        (["--prompt", "P", "--cfg", "-1"], "t2i", "guidance -1.0 is outside"),
        (["--prompt", "P", "--text-top-p", "0"], "t2i", "text_top_p 0.0 is outside"),
        (["--prompt", "P", "--cfg-decay-images", "3"], "t2i", "--cfg-decay-images is for --cfg-decay"),
        (["--prompt", "P", "--max-new-tokens", "0"], "t2i", "max_new_tokens 0 must be at least 1"),
        (["--prompt", "P", "--steps", "0"], "howto", "0 steps: ask for at least 1"),
        (["--prompt", "P", "--worker-id", "1"], "t2i", "share out the prompts of --prompts FILE"),
        (["--prompts", "nowhere.txt"], "t2i", "nowhere.txt is missing"),
    ],
)
def test_what_cannot_be_is_one_line_before_weights_are_read(
    flags, task, message, checkpoint, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(cli_generate.Generate, "load", lambda self: pytest.fail("weights were read"))
    Image.fromarray(PIXELS[:2, :3]).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no picture")
    files = {"SMALL": tmp_path / "small.png", "TEXT": tmp_path / "text.png"}
    out = tmp_path / "out"
    assert message in refusal(capsys, checkpoint, out, *[files.get(flag, flag) for flag in flags], task=task)
    assert not out.exists()


def test_a_wrong_folder_is_named(tmp_path, capsys):
    assert "is not a folder" in refusal(capsys, tmp_path / "nowhere", tmp_path / "out", "--prompt", "P")
    (tmp_path / "empty").mkdir()
    line = refusal(capsys, tmp_path / "empty", tmp_path / "out", "--prompt", "P")
    assert "the backbone" in line and "was not found" in line


def test_turned_and_transparent_pictures_are_read_as_they_look(tmp_path):
    turned, exif = Image.fromarray(PIXELS), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "turned.png", exif=exif)
    assert cli_generate.read_image(tmp_path / "turned.png", 4).shape == (12, 8, 3)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert cli_generate.read_image(tmp_path / "clear.png", 4).min() == 255
