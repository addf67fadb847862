"""A folder in the official format, written here, is loaded and generated from."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from emu_embodied.interleaved import (
    Finished,
    GenerationRequest,
    GenerationSettings,
    ImageDone,
    ImageStarted,
    InterleavedModel,
)
from emu_embodied.models.folders import find_folders
from emu_embodied.tokens.templates import TASKS
from tests import official
from tests.decode.test_interleaved import official as released
from tests.interleaved_models import favour, make_backbone, make_model

REFERENCE = Path(__file__).parents[1] / ".." / "shared" / "emu35_reference"
IMAGE = np.random.default_rng(0).integers(0, 256, (12, 17, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "Emu3.5"
    official.write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def model(folder) -> InterleavedModel:
    return InterleavedModel.from_pretrained(folder)


def ask(task="vla", prompt="Lift the red cube.", images=(IMAGE,), **changes) -> GenerationRequest:
    settings = replace(GenerationSettings.for_task(task), greedy=True, image_area=128, max_new_tokens=60, **changes)
    return GenerationRequest(task=task, prompt=prompt, images=images, settings=settings)


def test_an_official_folder_answers_with_text_and_pictures(model):
    events = list(model.stream(ask()))
    done = [event for event in events if isinstance(event, ImageDone)]
    started = [event for event in events if isinstance(event, ImageStarted)]
    assert done and started[0].size == (2, 3) and isinstance(events[-1], Finished) and len(events[-1].tokens) == 60
    for event in done:
        assert event.codes.shape == (2, 3) and event.codes.dtype == torch.int64
        assert event.pixels.shape == (8, 12, 3) and event.pixels.dtype == np.uint8
        assert np.array_equal(event.pixels, model.decode_image(event.codes))
    answer = model.read(events[-1].tokens)
    assert [segment.codes.tolist() for segment in answer.segments if segment.kind == "image"] == [
        event.codes.tolist() for event in done
    ]


@pytest.mark.parametrize("task", ["vla", "x2i"])
def test_official_folder_gives_the_official_stream(model, task):
    request = ask(task, size=None)
    codes = model.encode_image(IMAGE, 128)
    rows = ["".join(f"<|visual token {code:06d}|>" for code in row) for row in codes.tolist()]
    block = f"<|image start|>2*3<|image token|>{'<|extra_200|>'.join(rows)}<|image end|>"
    user = f"{block}Lift the red cube." if task == "x2i" else f"Lift the red cube.{block}"
    full = f"<|extra_203|>You are a helpful assistant for {task} task. USER: {user} ASSISTANT: <|extra_100|>"
    without = f"<|extra_203|>You are a helpful assistant. USER: {block} ASSISTANT: <|extra_100|>"
    prompts = [model.text.encode(full), model.text.encode(without), []]
    want = released(model, prompts, 3.0, 60)
    assert list(list(model.stream(request))[-1].tokens) == want and model.markup.eoi in want


def test_prompts_hold_the_images_where_they_belong(model):
    request = ask("subtasks", images=(IMAGE, IMAGE))
    codes = [torch.zeros(1, 2, dtype=torch.long), torch.ones(2, 1, dtype=torch.long)]
    full, without, nothing = model.prompt_rows(request, codes)
    blocks = [model.markup.block(part) for part in codes]
    assert full.positions is None and [full.ids[place] for place in without.positions] == list(without.ids)
    assert [full.ids[place] for place in nothing.positions] == list(nothing.ids)
    assert model.text.decode(without.ids).endswith(model.text.decode([*blocks[0], *blocks[1], model.markup.bss]))
    assert "cube" in model.text.decode(full.ids) and "cube" not in model.text.decode(without.ids)
    assert without.positions[-1] == len(full.ids) - 1 and sorted(set(without.positions)) == list(without.positions)
    plain = model.prompt_rows(ask(images=()), [])
    assert all(row.positions is None for row in plain) and plain[1].ids == plain[2].ids


def test_size_of_given_images_holds_unless_another_is_asked_for(model):
    wide, tall = IMAGE[:8], IMAGE[:, :8]

    def size(images, **changes):
        events = model.stream(ask(images=images, **changes))
        return next(event.size for event in events if isinstance(event, ImageStarted))

    assert size((wide, tall)) == model.encode_image(tall, 128).shape
    assert size((wide,), size=(1, 4)) == (1, 4)


def test_stop_from_another_thread_and_streaming(model):
    pressed = threading.Event()
    events = []
    for event in model.stream(ask(max_images=9), stop=pressed):
        events.append(event)
        if isinstance(event, ImageDone):
            pressed.set()
    assert events[-1].reason == "stopped" and isinstance(events[-2], ImageDone)
    assert list(model.stream(ask(), stop=lambda: True)) == [Finished("stopped", ())]


def test_a_seed_repeats_and_greedy_needs_none(model):
    request = GenerationRequest(
        task="story", prompt="A robot.", settings=GenerationSettings(max_new_tokens=30, size=(2, 2))
    )
    first, second, other = (
        list(model.stream(request, torch.Generator().manual_seed(seed)))[-1].tokens for seed in (0, 0, 1)
    )
    assert first == second != other
    with pytest.raises(ValueError, match="needs a seeded"):
        model.stream(request)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_official_numbers(task):
    settings = GenerationSettings.for_task(task)
    assert GenerationRequest(task=task, prompt="x").resolved == settings
    table = {
        "t2i": (5.0, 1024, 0.9, 1.0, 5120, 1_048_576, 5120), "x2i": (3.0, 1024, 0.9, 1.0, 5120, 1_048_576, 5120),
        "howto": (3.0, 200, 0.8, 0.7, 10_240, 518_400, 32_768), "story": (3.0, 1024, 0.9, 1.0, 10_240, 518_400, 32_768),
        "explore": (3.0, 200, 0.5, 0.7, 5120, 518_400, 32_768),
    }  # fmt: skip
    s = settings
    row = (s.guidance, s.text_top_k, s.text_top_p, s.text_temperature, s.image_top_k, s.image_area, s.max_new_tokens)
    assert row == table.get(task, table["story"]) and (s.image_top_p, s.image_temperature) == (1.0, 1.0)


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"guidance": -1.0}, "guidance -1.0 is outside"),
        ({"text_top_p": 0.0}, "text_top_p 0.0 is outside"),
        ({"image_top_k": -1}, "image_top_k -1 is negative"),
        ({"text_temperature": 0.0}, "set greedy"),
        ({"max_images": 0}, "max_images 0 must be at least 1"),
        ({"size": (0, 4)}, "out of range"),
        ({"size": (4, 1000)}, "out of range"),
    ],
)
def test_numbers_out_of_range(change, fault):
    with pytest.raises(ValueError, match=fault):
        GenerationSettings(**change)


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"task": "vlaa"}, "did you mean vla"),
        ({"images": (IMAGE.astype(np.float32),)}, "expected uint8"),
        ({"images": (IMAGE[..., 0],)}, "expected uint8"),
    ],
)
def test_bad_requests(change, fault):
    with pytest.raises(ValueError, match=fault):
        GenerationRequest(**({"task": "vla", "prompt": "go"} | change))


def test_requests_that_cannot_be_met_are_refused_on_the_call(model):
    with pytest.raises(ValueError, match="3 x 17 pixels is smaller than one cell"):
        model.stream(ask(images=(IMAGE[:3],)))
    with pytest.raises(ValueError, match="is 105 tokens, but max_new_tokens is 60"):
        model.stream(ask(size=(9, 10)))


def test_pieces_are_found_by_what_they_hold(tmp_path, folder):
    found = find_folders(folder)
    assert (found.backbone, found.text, found.vision) == (folder, folder, folder / "vision")
    apart = tmp_path / "apart"
    for name, source in (("lm", folder), ("words", folder), ("eyes", folder / "vision")):
        (apart / name).mkdir(parents=True)
        for file in source.iterdir():
            if file.is_file() and (name != "lm") == (file.suffix in (".tiktoken", ".yaml", ".ckpt")):
                (apart / name / file.name).symlink_to(file)
    for start in (apart, apart / "lm"):
        found = find_folders(start)
        assert [path.name for path in (found.backbone, found.text, found.vision)] == ["lm", "words", "eyes"]
    (apart / "more").symlink_to(apart / "eyes")
    with pytest.raises(ValueError, match=r"not clear: beside .* there are eyes, more; name the one to use"):
        find_folders(apart)
    assert find_folders(apart, vision=apart / "more").vision.name == "more"


def lacking(folder: Path, tmp_path: Path, *names: str) -> Path:
    """A copy of a folder, by links, without some files."""
    (tmp_path / "c" / "model").mkdir(parents=True)
    for file in folder.iterdir():
        if file.name not in names:
            (tmp_path / "c" / "model" / file.name).symlink_to(file)
    return tmp_path / "c" / "model"


def test_each_missing_piece_is_one_clear_error(folder, tmp_path, monkeypatch):
    def unread(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(torch, "load", unread)
    monkeypatch.setattr("emu_embodied.models.ibq.load_file", unread)
    shard = sorted(path.name for path in folder.glob("model-*.safetensors"))[0]
    cases = {
        "config.json": "backbone .* was not found; looked in .*, in the subfolders of",
        "emu3.tiktoken": "text tokenizer .* was not found; looked in .* beside",
        "vision": "vision tokenizer .* was not found; looked in",
        shard: f"lacks 1 of its shards, first {shard}",
    }
    for number, (name, fault) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=fault):
            InterleavedModel.from_pretrained(lacking(folder, tmp_path / str(number), name))
    with pytest.raises(ValueError, match="is not a folder"):
        InterleavedModel.from_pretrained(tmp_path / "nowhere")


def test_another_model_is_named(folder, tmp_path):
    copy = lacking(folder, tmp_path, "config.json")
    config = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))
    with pytest.raises(ValueError, match="describes a 'qwen3' model"):
        InterleavedModel.from_pretrained(copy)


def test_vocabulary_too_small_for_the_codebook(folder, tmp_path):
    copy = lacking(folder, tmp_path, "config.json")
    config = json.loads((folder / "config.json").read_text())
    small = official.VOCABULARY - 1
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": small}))
    with pytest.raises(ValueError, match=f"know {small} token ids, .* 151854 .* {official.CODES} codes"):
        InterleavedModel.from_pretrained(copy)


def test_ids_beyond_the_codebook_are_never_drawn():
    """A vocabulary may be larger than needed (padded)."""
    model = make_model(0, {"image start": 6.0})
    backbone = make_backbone(model.markup.vision.stop + 50, 0)
    favour(backbone, model.text, {"image start": 6.0})
    wide = InterleavedModel(backbone, model.text, model.vision)
    request = GenerationRequest(
        task="vla", prompt="go", settings=GenerationSettings(greedy=True, size=(2, 3), max_new_tokens=80)
    )
    events = list(wide.stream(request))
    assert any(isinstance(event, ImageDone) for event in events)
    assert max(events[-1].tokens) < model.markup.vision.stop


@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"{REFERENCE} holds the official files; absent")
def test_the_official_text_tokenizer_and_pieces_beside_each_other(tmp_path):
    for name in ("vq", "tokenizer"):
        (tmp_path / name).symlink_to((REFERENCE / name).resolve())
    official.write_backbone(tmp_path / "lm", vocab_size=151_854 + 256)
    model = InterleavedModel.from_pretrained(tmp_path / "lm")
    assert model.markup.digits.start == 15 and model.markup.times == 9 and model.markup.vision.size == 256
    request = ask("story", "Put the cube in the bowl.", (np.full((40, 40, 3), 90, np.uint8),))
    events = list(model.stream(replace(request, settings=replace(request.settings, image_area=1024))))
    assert next(event.pixels.shape for event in events if isinstance(event, ImageDone)) == (32, 32, 3)
    with pytest.raises(ValueError, match="the weights know 640 token ids"):
        InterleavedModel.from_pretrained(REFERENCE)
