"""What a task's phases are called in plain words: the sentences that a model which names subtasks learns to say.

Engine-free, like ``tasks``. A subtask is a phase of the scripted experts; its sentence names the objects that the
instruction names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from emu_embodied.envs.tasks import NAMED, SIDES, PandaPickPlace, PandaPush, PandaReach

_REACH = {"approach": "move the gripper to the {colour} ball"}
_PUSH = {
    "retreat": "raise the gripper away from the {colour} cube",
    "approach": "move above the {other} side of the {colour} cube",
    "descend": "lower the gripper beside the {colour} cube",
    "push": "push the {colour} cube to the {side} marker",
}
_GRASP = {
    "retreat": "raise the gripper above the {colour} cube",
    "approach": "move the gripper above the {colour} cube",
    "descend": "lower the gripper around the {colour} cube",
    "grasp": "close the gripper on the {colour} cube",
}
_LIFT = {**_GRASP, "lift": "lift the {colour} cube"}
_PLACE = {
    **_LIFT,
    "carry": "carry the {colour} cube above the {side} marker",
    "lower": "lower the {colour} cube onto the {side} marker",
    "release": "let go of the {colour} cube",
}
_STEPS: tuple[tuple[tuple[str, ...], dict[str, str]], ...] = (
    (PandaReach.templates, _REACH),
    (PandaPush.templates, _PUSH),
    (PandaPickPlace.place_templates, _PLACE),
    (PandaPickPlace.lift_templates, _LIFT),
)
"""(instruction templates, phase -> sentence template), phases in the order in which they bring a task forward."""


def subtasks(instruction: str) -> dict[str, str]:
    """The subtasks of an instruction: phase -> sentence of at most ``tasks.MAX_INSTRUCTION`` bytes.

    Phases come in the order in which they bring the task forward, recovery first: one that is followed by an earlier
    one has failed. Phases that are not among them (``done``, ``random`` ...) are no subtasks. An instruction that no
    task gives has none.
    """
    for pattern, sentences in _patterns():
        if match := pattern.fullmatch(instruction):
            words = match.groupdict()
            if "side" in words:
                # One pushes a thing to the left from its right.
                words["other"] = "right" if words["side"] == "left" else "left"
            return {phase: sentence.format(**words) for phase, sentence in sentences.items()}
    return {}


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], dict[str, str]], ...]:
    return tuple((_pattern(template), sentences) for templates, sentences in _STEPS for template in templates)


def _pattern(template: str) -> re.Pattern[str]:
    """What a template's instructions look like; its fields become groups."""

    def pieces() -> Iterator[str]:
        for text, field in re.findall(r"([^{]*)(?:\{(\w+)\})?", template):
            yield re.escape(text)
            if field:
                yield f"(?P<{field}>{'|'.join(NAMED if field == 'colour' else SIDES)})"

    return re.compile("".join(pieces()))
