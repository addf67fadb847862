"""Generation equals the official algorithm, written out here without a cache and with one forward for each row."""

from __future__ import annotations

import math
import threading

import pytest
import torch
import torch.nn.functional as F

from emu_embodied.decode.events import Finished, ImageDone, Note, TextChunk
from emu_embodied.decode.guidance import Guidance, GuidedRows, RowPrompt
from emu_embodied.decode.interleaved import generate
from emu_embodied.decode.sampling import restrict
from emu_embodied.decode.settings import GenerationSettings
from emu_embodied.decode.stream import StreamGrammar
from tests.interleaved_models import CODES, make_model

MODELS = {
    "images": {"image start": 6.0},
    "thoughts": {"image start": 7.0, "extra_50": 4.0, "extra_51": 4.0, "extra_60": 4.0, "extra_61": 4.0},
    "stray": {"image start": 6.0, "image end": 6.0, "image token": 5.0, "extra_200": 5.0},
    "short": {"image start": 5.0, "extra_204": 5.0},
}


@torch.no_grad()
def official(model, prompts, scale, tokens, image_scale=None, target=None):
    """The released logits processors (section 1.4 of the released code's description), greedily, literally.

    ``prompts``: ids of the prompt, of the one without text and of the one without anything.
    """
    text, logits_of = model.text, lambda ids: model.backbone(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
    first_visual = text.first_visual
    ids_of = {
        name: text.special_id(token)
        for name, token in {
            "BOI": "<|image start|>", "IMG": "<|image token|>", "EOI": "<|image end|>", "EOL": "<|extra_200|>",
            "EOS": "<|extra_204|>",
        }.items()
    }  # fmt: skip
    boi, img, eoi, eol = (ids_of[name] for name in ("BOI", "IMG", "EOI", "EOL"))
    ids, without, nothing = list(prompts[0]), list(prompts[1]), list(prompts[2])
    height, width = target or (None, None)
    if img in without and height is None:
        last = len(without) - 1 - without[::-1].index(img)
        begin = len(without) - 1 - without[::-1].index(boi)
        height, width = (int(side) for side in text.decode(without[begin + 1 : last]).split("*"))
    in_image = in_visual = False
    new = []
    for _ in range(tokens):
        scores = logits_of(ids)
        allowed = None
        if ids[-1] == boi:
            in_image = True
            nothing = list(prompts[2])
        if ids[-1] == eoi:
            in_image = in_visual = False
            without.append(eoi)
            nothing.append(eoi)
        if not in_image:
            allowed = range(first_visual)
        else:
            without.append(ids[-1])
            nothing.append(ids[-1])
            if ids[-1] == img:
                in_visual = True
                if height is None:
                    begin = len(ids) - 1 - ids[::-1].index(boi)
                    height, width = (int(side) for side in text.decode(ids[begin + 1 : -1]).split("*"))
            if in_visual:
                place = len(ids) - (len(ids) - 1 - ids[::-1].index(img))
                if place == height * (width + 1):
                    allowed = [eoi]
                elif place % (width + 1) == 0:
                    allowed = [eol]
                else:
                    allowed = range(first_visual, len(scores))
                    given, unc = F.log_softmax(scores, -1), F.log_softmax(logits_of(without), -1)
                    if image_scale is None:
                        scores = scale * (given - unc) + unc
                    else:
                        none = F.log_softmax(logits_of(nothing), -1)
                        scores = none + image_scale * (unc - none) + scale * (given - unc)
            else:
                place = len(ids) - (len(ids) - 1 - ids[::-1].index(boi))
                if height is not None:
                    wanted = text.encode(f"{height}*{width}")
                    allowed = [wanted[place - 1]] if place <= len(wanted) else [img]
                else:
                    zero = text.encode("0")[0]
                    digits = range(zero, zero + 10)
                    rule = {1: digits[1:], 2: digits, 3: text.encode("*"), 4: digits[1:], 5: digits}
                    allowed = rule.get(place, [img])
        mask = torch.full_like(scores, -math.inf)
        mask[list(allowed)] = 0
        new.append(int((scores + mask).argmax()))
        ids.append(new[-1])
        if new[-1] == ids_of["EOS"]:
            break
    return new


def rows_of(model, images=0, longer_without=False):
    """Three prompts of different lengths, the first two with ``images`` given images of 2 x 3 codes."""
    block = []
    for seed in range(images):
        codes = torch.randint(CODES, (2, 3), generator=torch.Generator().manual_seed(seed))
        block += model.markup.block(codes)
    full, without, nothing = (model.text.encode(part) for part in ("go to the red cube ", "go ", "-"))
    end = [model.markup.bss]
    if longer_without:
        without = model.text.encode("a prompt without words that is longer than the one with them ")
    return [[*full, *block, *end], [*without, *block, *end], [*nothing, *end]]


def run(model, prompts, tokens, size=None, **settings):
    chosen = GenerationSettings(max_new_tokens=tokens, greedy=True, **settings)
    grammar = StreamGrammar(model.markup, model.text.decode_bytes, size)
    events = list(generate(model.backbone, grammar, [RowPrompt(ids) for ids in prompts], chosen))
    assert isinstance(events[-1], Finished) and sum(isinstance(event, Finished) for event in events) == 1
    return events


@pytest.mark.parametrize("bias", MODELS)
@pytest.mark.parametrize("size", [(2, 3), (1, 1), (3, 12)])
@pytest.mark.parametrize("image_scale", [None, 1.7], ids=["two-way", "three-way"])
def test_greedy_stream_is_the_official_one(bias, size, image_scale):
    model = make_model(len(bias) + size[1], MODELS[bias])
    prompts = rows_of(model)
    want = official(model, prompts, 3.0, 80, image_scale, size)
    events = run(model, prompts, 80, size, image_guidance=image_scale)
    assert list(events[-1].tokens) == want and (bias == "short" or model.markup.boi in want)


@pytest.mark.parametrize("images", [1, 2])
def test_given_images_are_in_both_prompts_and_fix_the_size(images):
    model = make_model(3, MODELS["thoughts"])
    prompts = rows_of(model, images)
    events = run(model, prompts, 120, (2, 3))
    assert list(events[-1].tokens) == official(model, prompts, 3.0, 120)
    assert any(isinstance(event, ImageDone) for event in events)


def test_free_sizes_follow_the_official_rule():
    model = make_model(1, {"image start": 9.0})
    prompts = rows_of(model)
    want = official(model, prompts, 3.0, 60)
    assert list(run(model, prompts, 60)[-1].tokens) == want
    begin = want.index(model.markup.boi)
    assert model.markup.img == want[begin + 6]


def test_an_unconditional_prompt_may_be_the_longer_one():
    model = make_model(2, MODELS["images"])
    prompts = rows_of(model, longer_without=True)
    want = official(model, prompts, 3.0, 100, target=(2, 3))
    assert list(run(model, prompts, 100, (2, 3))[-1].tokens) == want


def test_without_guidance_one_row_is_enough():
    model = make_model(2, MODELS["images"])
    prompts = rows_of(model)
    want = official(model, prompts, 1.0, 100, target=(2, 3))
    assert Guidance(scale=1.0).rows == 1
    assert list(run(model, prompts[:1], 100, (2, 3), guidance=1.0)[-1].tokens) == want


def test_guidance_needs_its_prompts():
    model = make_model()
    with pytest.raises(ValueError, match="reads 3 prompts side by side, 2 were given"):
        run(model, rows_of(model)[:2], 5, image_guidance=1.5)


@torch.no_grad()
@pytest.mark.parametrize("rows", [2, 3])
def test_rows_in_one_batch_equal_rows_apart(rows):
    """Unconditional rows see their prompt and image spans only; the third only the image at hand."""
    model = make_model(5)
    backbone, prompts = model.backbone, rows_of(model, 1)[:rows]
    batch = GuidedRows(backbone, [RowPrompt(ids) for ids in prompts], room=4)
    words = model.text.encode("now the cube is held ")
    images = [model.markup.block(torch.full((2, 3), code)) for code in (3, 8)]
    seen = [list(ids) for ids in prompts]

    def check(hidden, count):
        for row in range(count):
            apart = backbone(torch.tensor([seen[row]])).logits[0, -1]
            torch.testing.assert_close(backbone.head(hidden[row]), apart, rtol=1e-4, atol=1e-4)

    check(batch.read_prompt(), 1)
    for image in images:
        for token in words:
            hidden = batch.read([token], image=False)
        seen[0] += words
        check(hidden, 1)
        batch.begin_image()
        if rows == 3:
            seen[2] = list(prompts[2])
        for part in (image[:5], image[5:6], image[6:9], image[9:]):
            hidden = batch.read(part, image=True)
        for ids in seen:
            ids += image
        check(hidden, rows)


@torch.no_grad()
def test_sparse_positions_are_those_of_the_full_prompt():
    model = make_model(6)
    backbone, text = model.backbone, model.text
    full, image = text.encode("arm. Instruction: lift."), model.markup.block(torch.zeros(1, 2, dtype=torch.long))
    kept, places = [*full[:4], full[-1]], [0, 1, 2, 3, len(full) - 1]
    rows = GuidedRows(backbone, [RowPrompt(full), RowPrompt(kept, places)])
    rows.read_prompt()
    words = text.encode("go")
    rows.read(words, image=False)
    rows.begin_image()
    hidden = rows.read(image, image=True)
    start = len(full) + len(words)
    positions = torch.tensor([*places, *range(start, start + len(image))])
    apart = backbone(torch.tensor([[*kept, *image]]), position_ids=positions).logits[0, -1]
    torch.testing.assert_close(backbone.head(hidden[1]), apart, rtol=1e-4, atol=1e-4)


def test_guidance_formulas():
    given, without, nothing = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    two = Guidance(scale=3.0)
    torch.testing.assert_close(two.mix(torch.stack([given, without]), 0), without + 3 * (given - without))
    three = Guidance(scale=3.0, image_scale=1.5)
    want = nothing + 1.5 * (without - nothing) + 3 * (given - without)
    torch.testing.assert_close(three.mix(torch.stack([given, without, nothing]), 4), want)
    # The released code normalises first; the draw is the same.
    apart = [F.log_softmax(row, -1) for row in (given, without)]
    released = apart[1] + 3 * (apart[0] - apart[1])
    torch.testing.assert_close(
        two.mix(torch.stack([given, without]), 0).softmax(-1), released.softmax(-1), rtol=1e-5, atol=1e-6
    )


def test_guidance_decays_over_images():
    fading = Guidance(scale=3.0, end=1.0, images=15)
    assert [fading.at(image) for image in (0, 7, 14, 30)] == [3.0, 2.0, 1.0, 1.0]
    assert Guidance(scale=3.0).at(99) == 3.0 and Guidance(scale=3.0, end=2.0, images=1).at(0) == 2.0
    assert fading.rows == 2 and Guidance(scale=1.0, end=3.0).rows == 2


def test_decay_reaches_the_tokens():
    model = make_model(1, MODELS["images"])
    prompts = rows_of(model)
    constant = run(model, prompts, 120, (2, 3), guidance=3.0)
    fading = run(model, prompts, 120, (2, 3), guidance=3.0, guidance_end=1.0, guidance_images=2)
    first, second = ([event.codes for event in events if isinstance(event, ImageDone)] for events in (constant, fading))
    assert torch.equal(first[0], second[0])
    assert not all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=False))


def released_filter(scores, top_k, top_p):
    scores = scores.clone()
    if 0 < top_k < scores.size(-1):
        scores[scores < torch.topk(scores, top_k)[0][..., -1, None]] = -math.inf
    if top_p < 1.0:
        ordered, order = torch.sort(scores, descending=True)
        remove = torch.cumsum(torch.softmax(ordered, -1), -1) > top_p
        remove[..., 1:] = remove[..., :-1].clone()
        remove[..., 0] = False
        scores[remove.scatter(-1, order, remove)] = -math.inf
    return scores


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.8), (9, 0.5), (3, 0.999), (100, 0.01)])
def test_restricting_is_the_released_way(top_k, top_p):
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(1)) * 2
    assert torch.equal(restrict(logits, top_k, top_p), released_filter(logits, top_k, top_p))


def test_same_seed_same_stream_and_parts_have_their_own_sampling():
    model = make_model(4, MODELS["images"])
    prompts = [RowPrompt(ids) for ids in rows_of(model)]

    def draw(seed, **changes):
        settings = GenerationSettings(max_new_tokens=80, **changes)
        grammar = StreamGrammar(model.markup, model.text.decode_bytes, (2, 3))
        return list(
            generate(model.backbone, grammar, prompts, settings, torch.Generator().manual_seed(seed))
        )[-1].tokens  # fmt: skip

    assert draw(0) == draw(0) != draw(1)
    greedy = run(model, rows_of(model), 80, (2, 3))[-1].tokens
    assert draw(0, text_top_k=1, image_top_k=1) == greedy
    assert draw(0, text_top_p=1e-6, image_temperature=1e-6) == greedy
    first = greedy.index(model.markup.boi)
    text_free = draw(0, image_top_k=1)
    text_greedy = draw(0, text_top_k=1)
    assert text_greedy[: first + 1] == greedy[: first + 1] and text_greedy != greedy != text_free


def test_stop_and_limits():
    model = make_model(4, MODELS["images"])
    prompts = rows_of(model)
    full = run(model, prompts, 100, (2, 3))
    assert full[-1].reason == "length" and len(full[-1].tokens) == 100
    one = run(model, prompts, 100, (2, 3), max_images=1)
    assert one[-1].reason == "images" and one[-1].tokens[-1] == model.markup.eoi
    assert sum(isinstance(event, ImageDone) for event in one) == 1
    calls = iter(range(1000))
    grammar = StreamGrammar(model.markup, model.text.decode_bytes, (2, 3))
    settings = GenerationSettings(greedy=True)
    rows = [RowPrompt(ids) for ids in prompts]
    stopped = list(generate(model.backbone, grammar, rows, settings, stop=lambda: next(calls) == 7))
    assert stopped[-1].reason == "stopped" and stopped[-1].tokens == full[-1].tokens[:7]
    pressed = threading.Event()
    pressed.set()
    grammar = StreamGrammar(model.markup, model.text.decode_bytes, (2, 3))
    assert list(generate(model.backbone, grammar, rows, settings, stop=pressed.is_set)) == [Finished("stopped", ())]


def test_a_full_context_is_noted_and_goes_on():
    model = make_model(4, MODELS["images"], max_position_embeddings=50)
    events = run(model, rows_of(model), 60, (2, 3))
    assert len(events[-1].tokens) == 60
    assert sum("context of 50 tokens" in event.text for event in events if isinstance(event, Note)) == 1


def test_events_say_what_the_tokens_say():
    model = make_model(0, MODELS["thoughts"])
    events = run(model, rows_of(model), 200, (2, 3))
    answer = model.read(events[-1].tokens)
    codes = [event.codes.tolist() for event in events if isinstance(event, ImageDone)]
    assert codes and codes == [segment.codes.tolist() for segment in answer.segments if segment.codes is not None]
    spoken = "".join(event.text for event in events if isinstance(event, TextChunk))
    assert spoken.split() == "".join(segment.text for segment in answer.segments).split()
