"""``emu-embodied explore``: walk through an imagined world by instructions, or let the model walk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emu_embodied.cli_generate import Interleaved, read_image, say

if TYPE_CHECKING:
    import numpy as np

    from emu_embodied.explore import Explorer
    from emu_embodied.stories import StoryLog

Camera = Callable[[str, str, int], "np.ndarray"]
"""Environment id, camera and reset seed -> what that camera shows, uint8 [height, width, 3]."""


@dataclass(frozen=True, kw_only=True)
class Walk(Interleaved):
    """Flags of ``explore``, and the walk itself; whoever composes it hands in a camera."""

    image: Path | None = None
    """Picture to start from."""
    env: str | None = None
    """Start from what a camera of this environment shows."""
    camera: str = "front"
    """Which of its cameras."""
    env_seed: int = 0
    """Reset seed of the environment."""
    instructions: Path | None = None
    """File of instructions, a line each, instead of the terminal."""
    free: bool = False
    """Let the model choose where to go, for --steps pictures."""
    steps: int = 8
    """Pictures of a free walk."""
    prompt: str = "Explore this scene."
    """What a free walk is told at its start."""
    out: Path
    """Folder for the results; refused if it holds an earlier result."""

    def walk(self, camera: Camera) -> int:
        """Check everything, load, walk."""
        import torch

        from emu_embodied.explore import Explorer
        from emu_embodied.stories import RESULT, StoryLog

        if (self.out / RESULT).exists():
            raise ValueError(f"{self.out} holds a result already: give another --out")
        given = self._check()
        cell = self.vision_cell()
        settings = self.settings("explore", cell)
        image = None if self.image is None else read_image(self.image, cell)
        if self.env is not None:
            image = camera(self.env, self.camera, self.env_seed)
        model = self.load()
        generator = None if self.greedy else torch.Generator().manual_seed(self.seed)
        explorer = Explorer(model, settings, generator)
        if image is not None:
            explorer.see(image)
        log = StoryLog(self.out, "explore", self._title(), () if image is None else (image,), say)
        finished = False
        try:
            if self.free:
                log.take_all(explorer.wander(self.prompt, self.steps))
            else:
                self._follow(explorer, log, given)
            finished = True
        finally:
            self._close(log, explorer, finished)
            print(f"\n{self.out / 'story.html'}", flush=True)
        return 0

    def _check(self) -> list[str] | None:
        """The instructions of a file; None for the terminal or a free walk."""
        if self.image is not None and self.env is not None:
            raise ValueError("give --image or --env to start from, not both")
        if self.free and self.instructions is not None:
            raise ValueError("a --free walk takes no --instructions: give one of the two")
        if self.free and (self.steps < 1 or not self.prompt.strip()):
            raise ValueError("a free walk needs at least 1 of --steps and a --prompt that is not empty")
        if self.instructions is None:
            return None
        if not self.instructions.is_file():
            raise ValueError(f"the file of instructions {self.instructions} is missing")
        given = [line.strip() for line in self.instructions.read_text(encoding="utf-8-sig").splitlines()]
        given = [line for line in given if line]
        if not given:
            raise ValueError(f"{self.instructions} holds no instructions: write one on each line")
        return given

    def _title(self) -> str:
        return self.prompt if self.free else "Exploration"

    def _follow(self, explorer: Explorer, log: StoryLog, given: list[str] | None) -> None:
        """One picture for each instruction; the story on disk is complete after each."""
        for instruction in typed() if given is None else given:
            try:
                events = explorer.step(instruction)
            except ValueError as error:
                if given is not None:
                    raise
                say(f"({error})\n")  # a slip at the terminal ends no walk
                continue
            log.tell(instruction)
            log.take_all(events)
            self._close(log, explorer, False)

    def _close(self, log: StoryLog, explorer: Explorer, finished: bool) -> None:
        from emu_embodied.provenance import make_meta

        request = {
            "task": "explore",
            "free": self.free,
            "start": self.env or (None if self.image is None else str(self.image)),
            "seed": None if self.greedy else self.seed,
            "settings": asdict(explorer.settings),
            "checkpoint": str(Path(self.checkpoint)),
        }
        log.close(finished=finished, meta=make_meta(seed=self.seed), request=request)


def typed() -> Iterator[str]:
    """Lines from the terminal until an empty one or the end."""
    while True:
        if sys.stdin.isatty():
            say("\n> ")
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line
