"""A Panda at its table who is told something else: new words, chosen pairs of colour and side, or the wrong thing.

What is meant, and so reward, success and goal, stays the scene's; only what the robot is told changes. For asking
whether the instruction decides, and for data that leave pairs out.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Literal, get_args

import gymnasium

from emu_embodied.envs.panda import PandaEnv
from emu_embodied.envs.registry import check_env_id
from emu_embodied.envs.tasks import HELD_OUT_PAIRS, Scene

Pairs = Literal["all", "seen", "held_out"]
"""Which scenes: all of them, those without ``HELD_OUT_PAIRS``, or those alone."""
Telling = Literal["true", "rephrased", "shuffled", "swapped"]
"""What the robot is told: the scene's instruction; the same in words that training never saw; another episode's, of
another colour; or that it were the other thing and (where there is one) the other side."""


class SpokenEnv(PandaEnv):
    """A ``PandaEnv`` whose instruction is chosen.

    Args:
        pairs: which scenes are drawn.
        telling: what the robot is told.
        **kwargs: as ``PandaEnv``.

    Raises:
        ValueError: for an unknown choice.
    """

    def __init__(self, *, pairs: Pairs = "all", telling: Telling = "true", **kwargs: Any) -> None:
        for name, value, known in (("pairs", pairs, get_args(Pairs)), ("telling", telling, get_args(Telling))):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, choose one of {', '.join(known)}")
        super().__init__(**kwargs)
        self._pairs = pairs
        self._telling = telling

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw a new scene; the same seed gives the same one, whatever the robot is told of it."""
        gymnasium.Env.reset(self, seed=seed)
        scene = self._draw()
        self._begin(replace(scene, instruction=self._told(scene)))
        return self._gym_observation(), self._info()

    def _draw(self) -> Scene:
        while True:
            scene = self.task.sample(self.np_random)
            if self._pairs == "all" or (self.task.pair(scene) in HELD_OUT_PAIRS) == (self._pairs == "held_out"):
                return scene

    def _told(self, scene: Scene) -> str:
        if self._telling == "true":
            return scene.instruction
        if self._telling == "rephrased":
            return self.task.rephrased(scene, self.np_random)
        if self._telling == "swapped":
            return self._swapped(scene)
        while True:
            other = self.task.sample(self.np_random)
            if self.task.pair(other)[0] != self.task.pair(scene)[0] and other.kind == scene.kind:
                return other.instruction

    def _swapped(self, scene: Scene) -> str:
        """The same sentence of the other thing, and of the other side."""
        colour, side = self.task.pair(scene)
        shape = self.task.slots[scene.meant][1]
        [other] = [item.colour for i, item in enumerate(scene.items) if item.shape == shape and i != scene.meant]
        words = {colour: other, side: "left" if side == "right" else "right"}
        return re.sub("[a-z]+", lambda word: words.get(word[0], word[0]), scene.instruction)


def make_spoken(env_id: str, *, pairs: Pairs = "all", telling: Telling = "true", **kwargs: Any) -> SpokenEnv:
    """Make the environment of an id whose instruction is chosen.

    Raises:
        ValueError: for an id that is none of a Panda at its table, or is unknown.
    """
    spec = check_env_id(env_id)
    if spec.suite != "panda":
        raise ValueError(f"{env_id} has one instruction: language is asked of the Panda's own tasks")
    return SpokenEnv(**{**spec.kwargs, "env_id": env_id, "pairs": pairs, "telling": telling, **kwargs})
