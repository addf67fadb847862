"""Emu3.5's own generation: a question and images in, text and images out, streamed as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event as Signal
from typing import Any

import numpy as np
import torch
from PIL import Image

from emu_embodied.decode.events import Event, Finished, ImageDone, ImageStarted, Note, TextChunk
from emu_embodied.decode.guidance import RowPrompt
from emu_embodied.decode.interleaved import generate
from emu_embodied.decode.settings import GenerationSettings
from emu_embodied.decode.stream import Answer, StreamGrammar, read_stream
from emu_embodied.models.checkpoints import read_config
from emu_embodied.models.config import EmuConfig
from emu_embodied.models.folders import find_folders
from emu_embodied.models.ibq import IBQ, read_ibq_config, to_frames, to_pixels
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.tokens.image_block import Markup, block_length, resized
from emu_embodied.tokens.templates import IMAGE, prompts
from emu_embodied.tokens.text import TextTokenizer

__all__ = [
    "Event",
    "Finished",
    "GenerationRequest",
    "GenerationSettings",
    "ImageDone",
    "ImageStarted",
    "InterleavedModel",
    "Note",
    "TextChunk",
]

Stop = Callable[[], bool] | Signal
"""A stop button: asked before every token."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GenerationRequest:
    """One question to the model.

    Raises:
        ValueError: for an unknown task, an empty prompt, or an image that is not uint8 [height, width, 3].
    """

    task: str
    """One of ``emu_embodied.tokens.templates.TASKS``."""
    prompt: str
    """What to generate."""
    images: tuple[np.ndarray, ...] = ()
    """Given images, uint8 [height, width, 3]; the official model knows up to three."""
    steps: int | None = None
    """Steps that the answer should have; None lets the model choose."""
    arm: str = "Franka Emika Panda"
    """The robot's name, for the ``subtasks`` task only."""
    settings: GenerationSettings | None = field(default=None)
    """How to draw; None takes the official numbers of the task."""

    def __post_init__(self) -> None:
        prompts(self.task, self.prompt, images=len(self.images), steps=self.steps, arm=self.arm)
        for image in self.images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(
                    f"an image of {image.dtype} {image.shape}: expected uint8 [height, width, 3], red green blue"
                )

    @property
    def resolved(self) -> GenerationSettings:
        """The settings, or those of the task."""
        return self.settings or GenerationSettings.for_task(self.task)


class InterleavedModel:
    """A backbone with its text and vision tokenizers.

    Args:
        backbone: the transformer; put into evaluation mode.
        text: the text tokenizer.
        vision: the vision tokenizer; put into evaluation mode.

    Raises:
        ValueError: if the backbone's vocabulary does not hold all ids of the tokenizers.
    """

    def __init__(self, backbone: EmuForCausalLM, text: TextTokenizer, vision: IBQ) -> None:
        check_fit(backbone.config.vocab_size, text, vision.config.n_embed)
        self.backbone = backbone.eval()
        self.text = text
        self.vision = vision.eval().requires_grad_(False)
        self.markup = Markup.of(text, vision.config.n_embed)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        vision: str | Path | None = None,
        text: str | Path | None = None,
        device: torch.device | str = "cpu",
        **backbone: Any,
    ) -> InterleavedModel:
        """Read an official folder (``config.json``, safetensors, ``emu3.tiktoken``) and its vision tokenizer.

        Args:
            folder: of the backbone; or one whose subfolders hold the backbone and the tokenizers.
            vision: folder of the vision tokenizer; None searches ``folder``, its subfolders and the folders beside it.
            text: folder of ``emu3.tiktoken``; None searches likewise.
            device: where to compute; with ``device_map`` only the vision tokenizer goes there.
            **backbone: to ``EmuForCausalLM.from_pretrained`` (``dtype``, ``device_map``, ``quantization_config`` ...).

        Raises:
            ValueError: naming what is missing, damaged or does not fit, before any weights are read.
        """
        found = find_folders(folder, vision=vision, text=text)
        tokenizer = TextTokenizer.from_pretrained(found.text)
        vocabulary = EmuConfig(**read_config(found.backbone)).vocab_size
        check_fit(vocabulary, tokenizer, read_ibq_config(found.vision).n_embed)
        loaded = EmuForCausalLM.from_pretrained(found.backbone, **{"dtype": "auto", **backbone})
        if not {"device_map", "quantization_config"} & backbone.keys():
            loaded = loaded.to(device)
        return cls(loaded, tokenizer, IBQ.from_pretrained(found.vision, device))

    @property
    def cell(self) -> int:
        """Side of one code's cell [pixels]."""
        return self.vision.config.cell

    def encode_image(self, image: np.ndarray, area: int) -> torch.Tensor:
        """uint8 [height, width, 3] -> codes int64 [h, w] on the CPU, brought to about ``area`` pixels, bicubic.

        Raises:
            ValueError: if the image is smaller than a cell.
        """
        rows, columns = resized(image.shape[0], image.shape[1], area, self.cell)
        brought = Image.fromarray(image).resize((columns * self.cell, rows * self.cell), Image.Resampling.BICUBIC)
        frame = torch.from_numpy(np.array(brought)).to(self.vision.codebook.device)
        return self.vision.encode(to_pixels(frame[None]))[0].cpu()

    def decode_image(self, codes: torch.Tensor) -> np.ndarray:
        """Codes int64 [h, w] -> uint8 [height, width, 3]."""
        return to_frames(self.vision.decode(codes[None].to(self.vision.codebook.device)))[0].cpu().numpy()

    def stream(
        self, request: GenerationRequest, generator: torch.Generator | None = None, stop: Stop | None = None
    ) -> Iterator[Event]:
        """Answer a request, event by event; the last event is ``Finished``.

        Args:
            request: the question.
            generator: draws the tokens; needed unless the settings are greedy.
            stop: asked before every token; when it says so the stream ends with what is complete.

        Raises:
            ValueError: on the call, before anything is computed: an image smaller than a cell, a size that
                ``max_new_tokens`` has no room for, or a missing generator.
        """
        settings = request.resolved
        if generator is None and not settings.greedy:
            raise ValueError("sampling needs a seeded torch.Generator: give one, or set greedy in the settings")
        for image in request.images:
            resized(image.shape[0], image.shape[1], settings.image_area, self.cell)
        if settings.size is not None and block_length(settings.size) > settings.max_new_tokens:
            raise ValueError(
                f"an image of {settings.size[0]} x {settings.size[1]} cells is {block_length(settings.size)} tokens, "
                f"but max_new_tokens is {settings.max_new_tokens}: raise it or choose a smaller size"
            )
        return self._stream(request, settings, generator, stop)

    def _stream(
        self,
        request: GenerationRequest,
        settings: GenerationSettings,
        generator: torch.Generator | None,
        stop: Stop | None,
    ) -> Iterator[Event]:
        blocks = [self.encode_image(image, settings.image_area) for image in request.images]
        size = settings.size
        if size is None and blocks and settings.same_size:
            # With several given images the official code means to leave the size open; in fact it takes the last one's.
            size = (blocks[-1].shape[0], blocks[-1].shape[1])
        grammar = StreamGrammar(self.markup, self.text.decode_bytes, size, settings.same_size)
        asked = stop.is_set if isinstance(stop, Signal) else stop or (lambda: False)
        rows = self.prompt_rows(request, blocks)
        for event in generate(self.backbone, grammar, rows, settings, generator, asked):
            yield replace(event, pixels=self.decode_image(event.codes)) if isinstance(event, ImageDone) else event

    def prompt_rows(self, request: GenerationRequest, blocks: Sequence[torch.Tensor]) -> list[RowPrompt]:
        """The request's prompt, without its words, and without words and images.

        Args:
            request: the question.
            blocks: codes int64 [h, w] of each of its images.
        """
        made = prompts(request.task, request.prompt, images=len(blocks), steps=request.steps, arm=request.arm)
        images = [self.markup.block(codes) for codes in blocks]
        rows = [self._ids(part, images) for part in (made.full, made.no_text, made.nothing)]
        if not made.sparse:
            return [RowPrompt(ids) for ids in rows]
        return [RowPrompt(rows[0]), *(RowPrompt(ids, _places(ids, rows[0], self.markup)) for ids in rows[1:])]

    def read(self, ids: Sequence[int]) -> Answer:
        """What a finished or broken stream of ids says."""
        return read_stream(ids, self.markup, self.text.decode_bytes)

    def _ids(self, prompt: str, images: Sequence[list[int]]) -> list[int]:
        """Ids of a prompt, its ``IMAGE`` places filled."""
        parts = prompt.split(IMAGE)
        ids = self.text.encode(parts[0])
        for image, part in zip(images, parts[1:], strict=False):
            ids += [*image, *self.text.encode(part)]
        return ids


def _places(kept: Sequence[int], full: Sequence[int], markup: Markup) -> list[int]:
    """Where the tokens of a prompt without words stand in the full one: its beginning, its images, its last token."""
    same = next((i for i, (a, b) in enumerate(zip(kept, full, strict=False)) if a != b), len(kept))
    places = list(range(same))
    start = same
    while len(places) < len(kept) - 1:
        first = full.index(markup.boi, start)
        start = full.index(markup.eoi, first) + 1
        places += range(first, start)
    return [*places, len(full) - 1][: len(kept)]


def check_fit(vocabulary: int, text: TextTokenizer, codebook: int) -> None:
    """Check that a backbone of ``vocabulary`` ids knows all tokens.

    Raises:
        ValueError: if it does not.
    """
    needed = text.first_visual + codebook
    if vocabulary < needed:
        raise ValueError(
            f"the weights know {vocabulary} token ids, but the text tokenizer has {text.first_visual} and the vision "
            f"tokenizer {codebook} codes, {needed} together: these are not of one model"
        )
