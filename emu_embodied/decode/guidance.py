"""Classifier-free guidance of visual tokens: a prompt and what remains of it without its words, read side by side.

Shape letters: R rows (the conditional one first), T new tokens, V ids, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from emu_embodied.models.cache import KVCache
from emu_embodied.models.transformer import EmuForCausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """How the rows' predictions become one.

    Two-way, as released: ``u + s (c - u)``, with c of the prompt and u of the prompt without its words. Three-way:
    ``u0 + s_img (u - u0) + s (c - u)``, with u0 of the prompt without words and images, which moreover sees no image
    but the one that is being generated. (The official code has this formula but overwrites u0's cache with u's and
    never hands on s_img.)
    """

    scale: float
    """s of the first image."""
    end: float | None = None
    """s of image ``images - 1`` and later; None keeps ``scale``."""
    images: int = 15
    """Images over which s goes linearly from ``scale`` to ``end``."""
    image_scale: float | None = None
    """s_img; None is two-way."""

    @property
    def rows(self) -> int:
        """Prompts needed: 1 without guidance, 2 or 3."""
        if self.image_scale is not None:
            return 3
        return 1 if self.scale == 1 and self.end in (None, 1) else 2

    def at(self, image: int) -> float:
        """The scale of an image, counted from 0."""
        if self.end is None:
            return self.scale
        progress = min(image / (self.images - 1), 1.0) if self.images > 1 else 1.0
        return self.scale + (self.end - self.scale) * progress

    def mix(self, logits_RV: torch.Tensor, image: int) -> torch.Tensor:
        """One image's guided logits [V].

        The official code mixes log-softmaxes; their normalisers shift all ids alike, so plain logits draw the same.
        """
        if len(logits_RV) == 1:
            return logits_RV[0]
        scale = self.at(image)
        if len(logits_RV) == 2:
            given, without = logits_RV
            return without + scale * (given - without)
        given, without, nothing = logits_RV
        assert self.image_scale is not None
        return nothing + self.image_scale * (without - nothing) + scale * (given - without)


@dataclass(frozen=True, slots=True)
class RowPrompt:
    """One row's prompt.

    Attributes:
        ids: its tokens.
        positions: their places, ascending; None counts them from 0.
    """

    ids: Sequence[int]
    positions: Sequence[int] | None = None


class GuidedRows:
    """A conditional row and its unconditional ones in one cache, though their prompts differ in length.

    Every token takes one slot of the cache in all rows, so that an image's tokens go through the backbone as one batch.
    Unconditional rows read their own prompt and images, never text: the slots of text stay closed to them. Prompts are
    read row by row, those of unconditional rows when the first image begins, since an answer may be text alone.

    Args:
        backbone: the transformer.
        prompts: the conditional one first. Where positions are given, later tokens have the same places in that row as
            in the first one; otherwise they follow its own tokens.
        room: new tokens expected; the cache grows beyond them when needed [tokens].
    """

    def __init__(self, backbone: EmuForCausalLM, prompts: Sequence[RowPrompt], room: int = 2048) -> None:
        self.backbone = backbone
        self.prompts = prompts
        self._start = max(len(prompt.ids) for prompt in prompts)
        self._device = backbone.entry
        self._cache = KVCache(
            backbone.config, len(prompts), self._start + room, device=backbone.devices, dtype=backbone.dtype
        )
        self._seen_RC = torch.zeros(len(prompts), self._cache.capacity, dtype=torch.bool, device=self._device)
        self._next = [len(prompt.ids) for prompt in prompts]
        self._unread = list(range(1, len(prompts)))

    def read_prompt(self) -> torch.Tensor:
        """Read the conditional prompt; hidden state of its last token [1, D]."""
        return self._read_prompt(0)

    def begin_image(self) -> None:
        """Call before BOI is read: the row that knows no images (the third) forgets the one before."""
        if len(self.prompts) == 3:
            length = len(self.prompts[2].ids)
            self._seen_RC[2, length:] = False
            self._next[2] = length

    def read(self, ids: Sequence[int], image: bool) -> torch.Tensor:
        """Read new tokens.

        Args:
            ids: the same for all rows.
            image: whether they belong to an image, which all rows read, or to text, which the first reads alone.

        Returns:
            Hidden states of the last token, [R, D] or [1, D].
        """
        if image:
            for row in self._unread:
                self._read_prompt(row)
            self._unread = []
        rows, tokens, held = len(self.prompts) if image else 1, len(ids), self._cache.length
        self._make_room(held + tokens)
        self._seen_RC[:rows, held : held + tokens] = True
        mask = None
        if rows > 1 or self._start > len(self.prompts[0].ids):
            mask = self._seen_RC[:rows, None, : held + tokens].expand(rows, tokens, -1)
            if tokens > 1:
                mask = mask.clone()
                mask[..., held:].tril_()
        first = [self._next[0 if self.prompts[row].positions is not None else row] for row in range(rows)]
        positions = torch.tensor(first, device=self._device)[:, None] + torch.arange(tokens, device=self._device)
        embeds = self.backbone.embed(torch.tensor([list(ids)], device=self._device)).expand(rows, -1, -1)
        part = self._cache if rows == len(self.prompts) else self._cache.rows(0, rows)
        hidden = self.backbone.core(embeds, positions, mask, part)
        self._cache.length = held + tokens
        self._next[:rows] = [place + tokens for place in self._next[:rows]]
        return hidden[:, -1]

    def _read_prompt(self, row: int) -> torch.Tensor:
        prompt = self.prompts[row]
        part = self._cache.rows(row, row + 1)
        part.length = 0
        places = range(len(prompt.ids)) if prompt.positions is None else prompt.positions
        embeds = self.backbone.embed(torch.tensor([list(prompt.ids)], device=self._device))
        hidden = self.backbone.core(embeds, torch.tensor(list(places), device=self._device), None, part)
        self._seen_RC[row, : len(prompt.ids)] = True
        if row == 0:
            self._cache.length = self._start
        return hidden[:, -1]

    def _make_room(self, tokens: int) -> None:
        if tokens > self._cache.capacity:
            capacity = tokens + tokens // 2
            self._cache.grow(capacity)
            self._seen_RC = torch.nn.functional.pad(self._seen_RC, (0, capacity - self._seen_RC.shape[1]))
