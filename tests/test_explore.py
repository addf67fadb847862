"""Exploring: what the model is shown grows by what was told and shown, and shrinks only when the context is full."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("tiktoken")

from emu_embodied import cli, cli_explore, explore
from emu_embodied.decode.events import Finished, ImageDone, Note
from emu_embodied.decode.interleaved import generate
from emu_embodied.decode.settings import GenerationSettings
from emu_embodied.explore import Explorer
from emu_embodied.interleaved import InterleavedModel
from emu_embodied.tokens.image_block import block_length
from tests import official

FRAME = np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8)
GREEDY = GenerationSettings(greedy=True, guidance=2.0, size=(2, 3), image_area=192, max_new_tokens=200)
GRID = GenerationSettings(greedy=True, guidance=2.0, image_area=192, max_new_tokens=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("official")
    official.write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def model(folder) -> InterleavedModel:
    return InterleavedModel.from_pretrained(folder)


@pytest.fixture
def read(monkeypatch) -> list:
    """The prompt rows of every stream."""
    seen: list = []

    def spy(backbone, grammar, rows, *rest):
        seen.append([list(row.ids) for row in rows])
        return generate(backbone, grammar, rows, *rest)

    monkeypatch.setattr(explore, "generate", spy)
    return seen


def pictures(events) -> list:
    return [event for event in events if isinstance(event, ImageDone)]


def test_the_context_is_what_was_seen_told_and_shown(model, read):
    explorer = Explorer(model, GREEDY)
    explorer.see(FRAME)
    first = list(explorer.step("Go to the door."))
    (shown,) = pictures(first)
    assert shown.pixels.shape == (8, 12, 3) and shown.codes.shape == (2, 3)
    explorer.see(FRAME[:, ::-1])
    second = list(explorer.step("Turn left."))
    given, other = (model.encode_image(frame, 192) for frame in (FRAME, FRAME[:, ::-1]))
    block, ids = model.markup.block, model.text.encode
    start = "<|extra_203|>You are a helpful assistant for explore task. USER: Go to the door."
    opening = [*ids(start), *block(given), *ids(" ASSISTANT: <|extra_100|>")]
    answer = list(first[-1].tokens)
    assert isinstance(first[-1], Finished) and answer[-len(block(shown.codes)) :] == block(shown.codes)
    expected = [
        *opening,
        *answer,
        *ids("<|extra_101|> USER: Turn left."),
        *block(other),
        *ids(" ASSISTANT: <|extra_100|>"),
    ]
    assert read[0][0] == opening and read[1][0] == expected
    bare = [*ids("<|extra_203|>You are a helpful assistant. USER: "), *block(given), *ids(" ASSISTANT: <|extra_100|>")]
    assert read[0][1] == bare and read[1][1] == [*bare, *block(shown.codes), *block(other)]
    assert explorer.steps == 2 and len(pictures(second)) == 1


def test_what_was_said_before_matters(model):
    def walk(*instructions: str) -> torch.Tensor:
        settings = GenerationSettings(guidance=2.0, size=(8, 8), max_images=1)
        explorer = Explorer(model, settings, torch.Generator().manual_seed(0))
        return [pictures(explorer.step(text))[0].codes for text in instructions][-1]

    assert torch.equal(walk("Go north.", "Look up."), walk("Go north.", "Look up."))
    assert not torch.equal(walk("Go north.", "Look up."), walk("Dive deep.", "Look up."))


def test_pictures_keep_the_size_of_the_latest_one(model):
    explorer = Explorer(model, GRID)
    explorer.see(FRAME)
    assert pictures(explorer.step("On."))[0].codes.shape == (3, 4)


def test_a_stream_left_early_leaves_the_walk_as_it_was(model, read):
    explorer = Explorer(model, GREEDY)
    explorer.see(FRAME)
    next(explorer.step("Go."))
    assert explorer.steps == 0
    list(explorer.step("Go."))
    assert read[0] == read[1]


def test_a_stop_button_ends_the_walk(model):
    asked = iter([False] * 5 + [True] * 99)
    events = list(Explorer(model, GREEDY).wander("Explore.", 3, stop=lambda: next(asked)))
    assert events[-1].reason == "stopped" and not pictures(events)


def test_a_broken_picture_is_no_part_of_the_next_context(model, read):
    asked = iter([False] * 8 + [True])
    explorer = Explorer(model, GREEDY)
    list(explorer.step("Go.", stop=lambda: next(asked)))
    list(explorer.step("On."))
    markup = model.markup
    assert read[1][0].count(markup.boi) == read[1][0].count(markup.eoi) == 0


def test_a_full_context_forgets_the_oldest_turns_but_for_a_picture(model, read, monkeypatch):
    monkeypatch.setattr(explore, "TEXT_ROOM", 60)
    monkeypatch.setattr(model.backbone.config, "max_position_embeddings", 330)
    explorer = Explorer(model, GREEDY)
    explorer.see(FRAME)
    notes, shown = [], []
    for i in range(8):
        events = list(explorer.step(f"Step {i}."))
        notes += [event.text for event in events if isinstance(event, Note)]
        shown += pictures(events)
    assert all(len(rows[0]) + block_length((2, 3)) + 60 <= 330 for rows in read) and len(shown) == 8
    assert any("forgotten, but for a picture" in note for note in notes) and explorer.steps < 8
    assert not any("context of" in note for note in notes)
    latest = read[-1][0]
    kept = model.markup.block(shown[7 - explorer.steps].codes)
    assert any(latest[i : i + len(kept)] == kept for i in range(len(latest)))
    with pytest.raises(ValueError, match="ask for fewer or smaller"):
        explorer.step("All at once.", pictures=30)


def test_a_free_walk_shows_so_many_pictures_however_many_turns_it_takes(model, monkeypatch):
    assert len(pictures(Explorer(model, GREEDY).wander("Explore.", 3))) == 3
    monkeypatch.setattr(explore, "TEXT_ROOM", 60)
    monkeypatch.setattr(model.backbone.config, "max_position_embeddings", 200)
    events = list(Explorer(model, GREEDY).wander("Explore.", 9))
    assert len(pictures(events)) == 9 and sum(isinstance(event, Finished) for event in events) > 1


def test_seeds_decide(model):
    def codes(seed: int) -> list:
        sampled = GenerationSettings(guidance=2.0, size=(2, 3), max_new_tokens=60)
        explorer = Explorer(model, sampled, torch.Generator().manual_seed(seed))
        return [event.codes.tolist() for event in pictures(explorer.wander("Explore.", 2))]

    assert codes(1) == codes(1) != codes(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.step(" "), "the prompt is empty"),
        (lambda e: e.step("Go.", pictures=0), "at least 1"),
        (lambda e: list(e.wander("Go.", 0)), "at least 1"),
        (lambda e: e.see(FRAME[:3]), "smaller than one cell"),
    ],
)
def test_what_cannot_be_is_refused(call, message, model):
    with pytest.raises(ValueError, match=message):
        call(Explorer(model, GREEDY))
    with pytest.raises(ValueError, match="seeded"):
        Explorer(model)


# -- the command ------------------------------------------------------------------------------------------------------


def run(folder: Path, out: Path, *flags: object) -> int:
    small = ["--height", 8, "--width", 12, "--image-area", 192, "--greedy", "--device", "cpu"]
    words = ["explore", "--checkpoint", folder, "--out", out, *small, *flags]
    return cli.main([str(word) for word in words])


def kinds(out: Path) -> list[str]:
    return [segment["kind"] for segment in json.loads((out / "result.json").read_text())["segments"]]


def test_instructions_of_a_file(folder, tmp_path):
    (tmp_path / "told.txt").write_text("Go north.\n\nLook <up>.\n")
    Image.fromarray(FRAME).save(tmp_path / "start.png")
    out = tmp_path / "out"
    assert run(folder, out, "--instructions", tmp_path / "told.txt", "--image", tmp_path / "start.png") == 0
    assert [kind for kind in kinds(out) if kind != "text"] == ["user", "image", "user", "image"]
    result = json.loads((out / "result.json").read_text())
    assert result["finished"] and result["given"] == ["given_00.png"] and result["images"] == 2
    assert '<p class="user">Look &lt;up&gt;.</p>' in (out / "story.html").read_text()


def test_instructions_from_the_terminal_and_a_slip(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Go north.\nan <|IMAGE|>\nLook up.\n\nnever read\n"))
    assert run(folder, tmp_path / "out") == 0
    assert [kind for kind in kinds(tmp_path / "out") if kind != "text"] == ["user", "image", "user", "image"]
    assert "the prompt contains <|IMAGE|>" in capsys.readouterr().out


def test_a_free_walk_from_a_camera(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "_camera_shows", lambda *which: asked.append(which) or FRAME)
    flags = ["--free", "--steps", 2, "--env", "PandaReach-v0", "--camera", "wrist"]
    assert run(folder, tmp_path / "out", *flags) == 0
    assert asked == [("PandaReach-v0", "wrist", 0)]
    assert [kind for kind in kinds(tmp_path / "out") if kind != "text"] == ["image", "image"]


def test_ctrl_c_keeps_the_walk_so_far(folder, tmp_path, monkeypatch):
    def interrupted():
        yield "Go north."
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_explore, "typed", interrupted)
    assert run(folder, tmp_path / "out") == 130
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert not result["finished"] and result["images"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "a.png", "--env", "PandaReach-v0"], "not both"),
        (["--free", "--instructions", "f.txt"], "takes no --instructions"),
        (["--free", "--steps", "0"], "at least 1 of --steps"),
        (["--instructions", "nowhere.txt"], "nowhere.txt is missing"),
        (["--image", "nowhere.png"], "nowhere.png is missing"),
        (["--env", "PandaReech-v0"], "did you mean 'PandaReach-v0'?"),
    ],
)
def test_wrong_flags_are_one_line_before_weights_are_read(flags, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli_explore.Walk, "load", lambda self: pytest.fail("weights were read"))
    assert run(folder, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_result_is_not_overwritten(folder, tmp_path, capsys):
    (tmp_path / "result.json").write_text("{}")
    assert run(folder, tmp_path) == 2
    assert "holds a result already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_camera_is_where_a_walk_starts():
    frame = cli._camera_shows("PandaReach-v0", "front", 0)
    assert frame.shape == (512, 512, 3) and frame.std() > 1
    with pytest.raises(ValueError, match="no camera 'frnt'; did you mean front"):
        cli._camera_shows("PandaReach-v0", "frnt", 0)
