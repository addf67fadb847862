"""The numbers of interleaved generation, and the official ones of each task."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from emu_embodied.tokens.templates import check_task


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSettings:
    """How interleaved text and images are drawn.

    Defaults are those of the official default configuration (``configs/config.py`` of baaivision/Emu3.5).

    Raises:
        ValueError: for a number out of its range.
    """

    guidance: float = 3.0
    """Scale of classifier-free guidance on visual tokens; 1 is none, and then no unconditional row is computed."""
    guidance_end: float | None = None
    """Scale of the last image of ``guidance_images``, reached linearly, and of all after it; None keeps ``guidance``.
    Long embodied sequences: 3 to 1 over 15 images (Xiaomi-Robotics-U0)."""
    guidance_images: int = 15
    """Images over which the scale changes, the first and the last included."""
    image_guidance: float | None = None
    """Scale of the images' own guidance, which makes guidance three-way (``decode.guidance``); None is two-way."""
    text_top_k: int = 1024
    """Most likely text tokens that are drawn from; 0 for all."""
    text_top_p: float = 0.9
    """Probability mass of text tokens that are drawn from, in (0, 1]."""
    text_temperature: float = 1.0
    """Divides the logits of text."""
    image_top_k: int = 10_240
    """Most likely visual tokens that are drawn from; 0 for all."""
    image_top_p: float = 1.0
    """Probability mass of visual tokens that are drawn from, in (0, 1]."""
    image_temperature: float = 1.0
    """Divides the logits of visual tokens (and of size digits) after guidance."""
    greedy: bool = False
    """Take the most likely token everywhere; no generator is needed."""
    image_area: int = 518_400
    """Area that given images are resized to, their shape kept [pixels]."""
    size: tuple[int, int] | None = None
    """(rows, columns) of codes of every generated image. None: that of the last given image; without one the model
    chooses the first image's size."""
    same_size: bool = True
    """Without ``size``: whether all images have one size (official). Otherwise the model chooses each one's."""
    max_new_tokens: int = 32_768
    """Generated tokens at most, forced ones included [tokens]."""
    max_images: int | None = None
    """Stop after so many images; None goes on until the model closes its answer."""

    def __post_init__(self) -> None:
        for name in ("guidance", "guidance_end", "image_guidance"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 100:
                raise ValueError(f"{name} {value} is outside [0, 100]: 1 is no guidance, 2 to 5 are usual")
        for name in ("text_top_p", "image_top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is outside (0, 1]: 1 draws from all tokens")
        for name in ("text_top_k", "image_top_k"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} is negative: 0 draws from all tokens")
        for name in ("text_temperature", "image_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be > 0; for the most likely tokens set greedy")
        for name in ("guidance_images", "image_area", "max_new_tokens", "max_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if self.size is not None and not (len(self.size) == 2 and all(1 <= side <= 999 for side in self.size)):
            raise ValueError(
                f"size {self.size} is out of range: two numbers of cells, rows then columns, 1 to 999 each"
            )

    @classmethod
    def for_task(cls, task: str, **changes: Any) -> GenerationSettings:
        """The official numbers of a task, with ``changes``.

        ``t2i`` and ``x2i`` are the numbers of the Emu3.5-Image model; for Emu3.5 itself BAAI recommends guidance 2
        there. No numbers were released for ``vla``: it has those of the official default configuration.

        Raises:
            ValueError: for an unknown task or a number out of its range.
        """
        return replace(cls(**_OFFICIAL.get(check_task(task), {})), **changes)


_IMAGE_MODEL = {"image_top_k": 5120, "image_area": 1_048_576, "max_new_tokens": 5120}
_OFFICIAL: dict[str, dict[str, Any]] = {
    "t2i": {"guidance": 5.0, "size": (55, 73), **_IMAGE_MODEL},
    "x2i": {"guidance": 3.0, **_IMAGE_MODEL},
    "howto": {"text_top_k": 200, "text_top_p": 0.8, "text_temperature": 0.7},
    "explore": {"text_top_k": 200, "text_top_p": 0.5, "text_temperature": 0.7, "image_top_k": 5120},
    # Xiaomi-Robotics-U0, for long sequences of images.
    "subtasks": {"guidance_end": 1.0},
}
