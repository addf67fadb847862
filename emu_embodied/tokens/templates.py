"""The prompts that Emu3.5 was trained on (baaivision/Emu3.5, configs/), word by word."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

IMAGE = "<|IMAGE|>"
"""Where given images stand; replaced by their tokens, one block after another."""
TASKS = ("t2i", "x2i", "howto", "story", "explore", "vla", "subtasks")
"""Text to image, editing and composing of given images, visual guidance, visual narrative, world exploration, embodied
manipulation; and ``subtasks``, the embodied planning prompt of Xiaomi-Robotics-U0, a model tuned from Emu3.5."""

_BOS, _BSS = "<|extra_203|>", "<|extra_100|>"
_INTERLEAVE = " Please generate a response with interleaved text and images."
_SUBTASKS = (
    f"{_BOS}You are a helpful assistant for embodied subtask planning. You are given a task instruction and the "
    "initial observation. Your task is to predict the interleaved subtask and observation to finish the task."
)


def check_task(task: str) -> str:
    """The task's name in lower case.

    Raises:
        ValueError: if there is no such task; names the nearest.
    """
    name = task.lower()
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1, 0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown task {task!r}: {hint}the tasks are {', '.join(TASKS)}")
    return name


@dataclass(frozen=True, slots=True)
class Prompts:
    """One question as the model reads it, and what remains of it for guidance; ``IMAGE`` stands for each given image.

    Attributes:
        full: the prompt.
        no_text: the question's words removed, its images kept.
        nothing: the images removed too. The official code names no such prompt; this is ``no_text`` of no images.
        sparse: whether what remains keeps the positions that it has in ``full`` (Xiaomi-Robotics-U0), instead of being
            counted anew (Emu3.5).
    """

    full: str
    no_text: str
    nothing: str
    sparse: bool = False


def prompts(
    task: str, question: str, *, images: int = 0, steps: int | None = None, arm: str = "Franka Emika Panda"
) -> Prompts:
    """The prompts of a question.

    Args:
        task: one of ``TASKS``.
        question: what the user asks; special tokens written in it are parsed as such.
        images: how many images are given.
        steps: how many steps the answer should have (the official way: a sentence added to the question).
        arm: the robot's name, for ``subtasks`` only.

    Raises:
        ValueError: for an unknown task, an empty question, steps below 1, or a question that holds ``IMAGE`` itself.
    """
    name = check_task(task)
    if not question.strip():
        raise ValueError("the prompt is empty: say what to generate")
    if IMAGE in question:
        raise ValueError(f"the prompt contains {IMAGE}: leave it out, the task's template has the images' place")
    if steps is not None and steps < 1:
        raise ValueError(f"{steps} steps: ask for at least 1, or for None to let the model choose")
    place = IMAGE * images
    if name == "subtasks":
        start = f"{_SUBTASKS} Robot Arm Type: {arm}."
        length = "" if steps is None else f" Finish the task with {steps} steps."
        views = f"{IMAGE}\n" * images
        return Prompts(
            full=f"{start} Instruction: {question.rstrip('.')}.{length}\n{views}{_BSS}",
            no_text=f"{start}{place}{_BSS}",
            nothing=f"{start}{_BSS}",
            sparse=True,
        )
    if steps is not None:
        question = f"{question} Please provide {steps} steps for the task."
    user = f"{place}{question}" if name == "x2i" else f"{question}{place}"
    more = _INTERLEAVE if name == "howto" else ""
    bare = f"{_BOS}You are a helpful assistant. USER: {{}} ASSISTANT: {_BSS}"
    return Prompts(
        full=f"{_BOS}You are a helpful assistant for {name} task.{more} USER: {user} ASSISTANT: {_BSS}",
        no_text=bare.format(place),
        nothing=bare.format(""),
    )
