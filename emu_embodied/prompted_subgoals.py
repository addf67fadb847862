"""Subgoals from Emu3.5 itself, asked as it was tuned: its embodied answers alternate text and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from emu_embodied.interleaved import GenerationRequest, GenerationSettings, ImageDone, InterleavedModel, TextChunk
from emu_embodied.records import Frames, Observation, Subgoal


class PromptedSubgoals:
    """An interleaved model as a ``SubgoalModel``.

    The text before each picture is the subtask; the picture, brought to the size of the observed one, its completion.
    Pictures are encoded again by the world model that plans, in whose code vectors distances are measured. The model
    foretells neither proprio nor reward.

    Args:
        model: generates text and pictures.
        encode: frames of one state -> int64 tokens [N] (``WorldModel.encode_frames``).
        camera: whose picture it is shown and makes.
        task: ``vla``, Emu3.5's embodied prompt, or ``subtasks``, that of Xiaomi-Robotics-U0.
        settings: how to draw; None takes the official numbers of the task.
    """

    def __init__(
        self,
        model: InterleavedModel,
        encode: Callable[[Frames], torch.Tensor],
        camera: str,
        *,
        task: str = "vla",
        settings: GenerationSettings | None = None,
    ) -> None:
        self.model, self.encode, self.camera, self.task = model, encode, camera, task
        self.settings = settings or GenerationSettings.for_task(task)

    def propose(
        self, observation: Observation, steps: int, generator: torch.Generator | None = None
    ) -> tuple[Subgoal, ...]:
        """The next subtasks, at most ``steps``; fewer where the model closes its answer.

        Raises:
            ValueError: if the observation lacks the camera, or ``encode`` needs others beside it.
        """
        if self.camera not in observation.frames:
            raise ValueError(f"there is no camera {self.camera!r} among {tuple(observation.frames)}")
        frame = observation.frames[self.camera]
        request = GenerationRequest(
            task=self.task,
            prompt=observation.instruction,
            images=(frame,),
            settings=replace(self.settings, max_images=steps),
        )
        text, found = "", []
        for event in self.model.stream(request, generator):
            if isinstance(event, TextChunk) and event.kind == "text":
                text += event.text
            elif isinstance(event, ImageDone) and event.pixels is not None:
                picture = _brought_to(event.pixels, frame.shape[:2])
                found.append(self._subgoal(" ".join(text.split()), picture))
                text = ""
        return tuple(found)

    def _subgoal(self, text: str, picture: np.ndarray) -> Subgoal:
        frames = {self.camera: picture}
        return Subgoal(text, self.encode(frames), frames=frames)


def _brought_to(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [height, width, 3] at another size, bicubic."""
    height, width = size
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
