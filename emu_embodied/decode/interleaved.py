"""Interleaved generation, token by token, as Emu3.5's released code does it.

Each token that the grammar leaves open is drawn from the ids that may stand there: guidance (visual tokens only), then
temperature, top-k, top-p. Tokens without a choice (forced sizes, row and image ends) cost no prediction: they are read
together with the token before them. Greedy decoding gives the official token stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from emu_embodied.decode.events import Event, Finished, ImageDone, Note
from emu_embodied.decode.guidance import Guidance, GuidedRows, RowPrompt
from emu_embodied.decode.sampling import restrict, sample
from emu_embodied.decode.settings import GenerationSettings
from emu_embodied.decode.stream import Step, StreamGrammar
from emu_embodied.models.transformer import EmuForCausalLM


def generate(
    backbone: EmuForCausalLM,
    grammar: StreamGrammar,
    prompts: Sequence[RowPrompt],
    settings: GenerationSettings,
    generator: torch.Generator | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Continue a prompt.

    Args:
        backbone: the transformer.
        grammar: at its start; its size rule holds.
        prompts: the prompt, then as many unconditional ones as ``guidance_of(settings).rows`` asks for.
        settings: how to draw.
        generator: draws; may be None if the settings are greedy.
        stop: asked before every token.

    Yields:
        Events; the last is ``Finished``.

    Raises:
        ValueError: if there are fewer prompts than the guidance needs.
    """
    guidance = guidance_of(settings)
    if len(prompts) < guidance.rows:
        raise ValueError(f"this guidance reads {guidance.rows} prompts side by side, {len(prompts)} were given")
    rows = GuidedRows(backbone, prompts[: guidance.rows])
    context, length = backbone.config.max_position_embeddings, len(prompts[0].ids)
    tokens: list[int] = []
    unread: list[int] = []
    reason: Literal["end", "length", "images", "stopped"]
    while True:
        if stop():
            reason = "stopped"
            break
        step = grammar.step()
        token = step.forced
        if token is None:
            with torch.no_grad():
                # An EOI in the middle of text is read by all rows too, as in the official code.
                image = grammar.in_image or (bool(unread) and unread[-1] == grammar.markup.eoi)
                hidden = rows.read(unread, image) if tokens else rows.read_prompt()
                token = _draw(backbone, hidden, step, guidance, grammar, settings, generator)
            unread = []
        tokens.append(token)
        unread.append(token)
        if token == grammar.markup.boi:
            rows.begin_image()
        yield from (events := grammar.push(token))
        if grammar.ended:
            reason = "end"
            break
        if grammar.images == settings.max_images and any(isinstance(event, ImageDone) for event in events):
            reason = "images"
            break
        if len(tokens) == settings.max_new_tokens:
            reason = "length"
            break
        if length + len(tokens) == context:
            yield Note(f"the context of {context} tokens that the model was made for is full: what follows may degrade")
    yield from grammar.close()
    yield Finished(reason, tuple(tokens))


def guidance_of(settings: GenerationSettings) -> Guidance:
    """The guidance that settings ask for."""
    return Guidance(
        scale=settings.guidance,
        end=settings.guidance_end,
        images=settings.guidance_images,
        image_scale=settings.image_guidance,
    )


def _draw(
    backbone: EmuForCausalLM,
    hidden_RD: torch.Tensor,
    step: Step,
    guidance: Guidance,
    grammar: StreamGrammar,
    settings: GenerationSettings,
    generator: torch.Generator | None,
) -> int:
    """One id for a step; only logits of the ids that may stand there are computed."""
    rows = hidden_RD if step.part == "visual" else hidden_RD[:1]
    logits_RV = backbone.head(rows, slice(step.ids.start, step.ids.stop))
    logits = guidance.mix(logits_RV, grammar.started - 1) if step.part == "visual" else logits_RV[0]
    if not settings.greedy:
        text = step.part == "text"
        logits = logits / (settings.text_temperature if text else settings.image_temperature)
        logits = restrict(
            logits,
            settings.text_top_k if text else settings.image_top_k,
            settings.text_top_p if text else settings.image_top_p,
        )
    return step.ids.start + int(sample(logits, 0.0 if settings.greedy else 1.0, generator))
