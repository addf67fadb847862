"""``emu-embodied generate``: a prompt, or a file of them, into stories of text and pictures."""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    import numpy as np

    from emu_embodied.interleaved import GenerationRequest, GenerationSettings, InterleavedModel
    from emu_embodied.prompt_file import Prompt

Images = Annotated[tuple[tuple[Path, ...], ...], tyro.conf.UseAppendAction]
"""``--image A B`` and ``--image A --image B`` alike."""


@dataclass(frozen=True, kw_only=True)
class Interleaved:
    """Flags of everything that generates text and pictures."""

    checkpoint: str
    """Folder of an Emu3.5 checkpoint, as released."""
    vision_tokenizer: Path | None = None
    """Folder of the vision tokenizer; searched in and beside the checkpoint by default."""
    text_tokenizer: Path | None = None
    """Folder of emu3.tiktoken; searched likewise."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N, or spread: over all devices, then main memory."""
    dtype: str = "auto"
    """Number format of weights and products: auto (as stored), bfloat16, float16 or float32."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Keep weights in fewer bits (bitsandbytes)."""
    offload: Path | None = None
    """Folder for weights that fit neither the devices nor main memory."""
    greedy: bool = False
    """Take the most likely token everywhere."""
    seed: int = 6666
    """Seed of the draws; of prompt i in a file, seed + i."""
    cfg: float | None = None
    """Guidance scale of pictures; 1 is none. The task's official number by default."""
    image_cfg: float | None = None
    """Guidance scale of the given pictures (three-way guidance)."""
    cfg_decay: float | None = None
    """Guidance scale that is reached, linearly, at picture --cfg-decay-images."""
    cfg_decay_images: int | None = None
    """Pictures over which --cfg-decay acts; 15 by default."""
    aspect: str | None = None
    """Width to height of the pictures: 4:3, 1:1, 16:9 ...; auto lets the model choose."""
    height: int | None = None
    """Height of the pictures [pixels], together with --width."""
    width: int | None = None
    """Width of the pictures [pixels]."""
    image_area: int | None = None
    """Area that given pictures are brought to [pixels]."""
    max_new_tokens: int | None = None
    """Tokens generated at most."""
    max_images: int | None = None
    """Stop after so many pictures."""
    text_temperature: float | None = None
    """Of text; the task's official number by default, as for the five below."""
    text_top_k: int | None = None
    """Most likely text tokens drawn from; 0 for all."""
    text_top_p: float | None = None
    """Probability mass of text tokens drawn from."""
    image_temperature: float | None = None
    """Of picture tokens."""
    image_top_k: int | None = None
    """Most likely picture tokens drawn from; 0 for all."""
    image_top_p: float | None = None
    """Probability mass of picture tokens drawn from."""

    def settings(self, task: str, cell: int) -> GenerationSettings:
        """The task's official settings with the flags' changes.

        Raises:
            ValueError: for a number out of its range, or flags that contradict each other.
        """
        from emu_embodied.interleaved import GenerationSettings
        from emu_embodied.tokens.image_block import block_length

        if self.cfg_decay_images is not None and self.cfg_decay is None:
            raise ValueError("--cfg-decay-images is for --cfg-decay, the scale that is reached: give both")
        given: dict[str, Any] = {
            "guidance": self.cfg,
            "guidance_end": self.cfg_decay,
            "guidance_images": self.cfg_decay_images,
            "image_guidance": self.image_cfg,
        }
        names = ("image_area", "max_new_tokens", "max_images", "text_temperature", "text_top_k", "text_top_p")
        for name in (*names, "image_temperature", "image_top_k", "image_top_p"):
            given[name] = getattr(self, name)
        changes = {name: value for name, value in given.items() if value is not None}
        changes |= self._size(cell)
        settings = GenerationSettings.for_task(task, greedy=self.greedy, **changes)
        needed = 0 if settings.size is None else block_length(settings.size)
        if needed > settings.max_new_tokens:
            raise ValueError(
                f"a picture of this size takes {needed} tokens, --max-new-tokens is {settings.max_new_tokens}: "
                "raise it, or ask for a smaller picture"
            )
        return settings

    def _size(self, cell: int) -> dict[str, Any]:
        from emu_embodied.tokens.image_block import grid

        if (self.height is None) != (self.width is None):
            raise ValueError("--height and --width belong together: give both, or --aspect")
        if self.height is None:
            return {} if self.aspect is None else {"size": grid(self.aspect, cell=cell)}
        if self.aspect is not None:
            raise ValueError("give --aspect or --height and --width, not both")
        return {"size": grid(f"{self.height}x{self.width}", cell=cell)}

    def vision_cell(self) -> int:
        """Side of one code's cell [pixels], from the vision tokenizer's configuration alone; weights are not read.

        Raises:
            ValueError: if there is no checkpoint, or none of its tokenizers, at the folders given.
        """
        from emu_embodied.models.folders import find_folders
        from emu_embodied.models.ibq import read_ibq_config

        found = find_folders(self.checkpoint, vision=self.vision_tokenizer, text=self.text_tokenizer)
        return read_ibq_config(found.vision).cell

    def load(self) -> InterleavedModel:
        """Read the model onto the devices asked for."""
        from emu_embodied.hardware import pick_device
        from emu_embodied.interleaved import InterleavedModel
        from emu_embodied.models.loading import explaining_memory, loading

        options = loading(self.device, self.dtype, self.quantize, self.offload)
        device = pick_device("auto" if self.device == "spread" else self.device)
        with explaining_memory(self.checkpoint):
            return InterleavedModel.from_pretrained(
                self.checkpoint, vision=self.vision_tokenizer, text=self.text_tokenizer, device=device, **options
            )


@dataclass(frozen=True, kw_only=True)
class Generate(Interleaved):
    """Generate text and pictures from a prompt, as Emu3.5 was trained to: images, guides, stories, robot subtasks.

    Writes image_NN.png, story.md, story.html and result.json into --out; with --prompts, into a folder for each prompt.
    """

    task: str
    """t2i, x2i (edit or combine given pictures), howto, story, explore, vla (robot) or subtasks."""
    prompt: str | None = None
    """What to generate."""
    image: Images = ()
    """Pictures given with the prompt."""
    prompts: Path | None = None
    """File of prompts instead: a line is text, or JSON {"prompt": ..., "image": ..., "task": ..., "seed": ...}."""
    num_workers: int = 1
    """Share the prompts among so many processes ..."""
    worker_id: int = 0
    """... of which this is number 0, 1, ..."""
    steps: int | None = None
    """Steps that the answer should have (howto)."""
    arm: str = "Franka Emika Panda"
    """The robot's name (subtasks)."""
    out: Path
    """Folder for the results. Prompts of a file that are finished there are skipped."""

    def run(self) -> int:
        """Check everything, load, generate."""
        prompts = self._prompts()
        check_task_names([self.task, *(prompt.task for prompt in prompts if prompt.task)])
        cell = self.vision_cell()
        jobs = []
        for prompt in prompts:
            folder = self.out if self.prompts is None else self.out / prompt.folder
            request, seed = self._request(prompt, cell), self._seed(prompt)
            if not self._is_done(folder, request, seed):
                jobs.append((prompt, folder, seed))
        if not jobs:
            print(f"nothing to do: all {len(prompts)} prompts are finished in {self.out}")
            return 0
        model = self.load()
        for number, (prompt, folder, seed) in enumerate(jobs, start=1):
            if self.prompts is not None:
                print(f"[{number}/{len(jobs)}] {folder.name}", flush=True)
            self._generate(model, self._request(prompt, cell), folder, seed)
        return 0

    def _prompts(self) -> list[Prompt]:
        """What this process has to do."""
        from emu_embodied.prompt_file import Prompt, read_prompts, share_of

        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give --prompt TEXT or --prompts FILE, one of the two")
        if self.prompts is None:
            if self.num_workers != 1 or self.worker_id != 0:
                raise ValueError("--num-workers and --worker-id share out the prompts of --prompts FILE")
            assert self.prompt is not None
            return [Prompt(index=0, text=self.prompt, images=tuple(path for paths in self.image for path in paths))]
        if self.image:
            raise ValueError('with --prompts the pictures stand in the file: {"prompt": ..., "image": ...}')
        return share_of(read_prompts(self.prompts), self.num_workers, self.worker_id)

    def _seed(self, prompt: Prompt) -> int:
        return self.seed + prompt.index if prompt.seed is None else prompt.seed

    def _request(self, prompt: Prompt, cell: int) -> GenerationRequest:
        """The request of a prompt, checked as far as it can be without the weights."""
        from emu_embodied.interleaved import GenerationRequest

        task = prompt.task or self.task
        images = tuple(read_image(path, cell) for path in prompt.images)
        return GenerationRequest(
            task=task,
            prompt=prompt.text,
            images=images,
            steps=self.steps,
            arm=self.arm,
            settings=self.settings(task, cell),
        )

    def _record(self, request: GenerationRequest, seed: int) -> dict[str, Any]:
        from emu_embodied.stories import describe_request

        return describe_request(request, None if self.greedy else seed, checkpoint=str(Path(self.checkpoint)))

    def _is_done(self, folder: Path, request: GenerationRequest, seed: int) -> bool:
        """Whether a folder holds this very result, finished.

        Raises:
            ValueError: if it holds the finished result of something else, or of the same without --prompts.
        """
        from emu_embodied.models.checkpoints import read_config
        from emu_embodied.stories import RESULT

        if not (folder / RESULT).exists():
            return False
        result = read_config(folder, RESULT)
        if not result.get("finished"):
            return False
        if self.prompts is None:
            raise ValueError(f"{folder} holds a result already: give another --out")
        if result.get("request") != self._record(request, seed):
            raise ValueError(f"{folder} holds the result of other settings or another prompt: give another --out")
        return True

    def _generate(self, model: InterleavedModel, request: GenerationRequest, folder: Path, seed: int) -> None:
        import torch

        from emu_embodied.models.loading import explaining_memory
        from emu_embodied.provenance import make_meta
        from emu_embodied.stories import StoryLog

        start = time.perf_counter()
        events = model.stream(request, torch.Generator().manual_seed(seed))
        log = StoryLog(folder, request.task, request.prompt, request.images, say)
        finished = False
        try:
            with explaining_memory(self.checkpoint):
                log.take_all(events)
            finished = True
        finally:
            log.close(finished=finished, meta=make_meta(seed=seed), request=self._record(request, seed))
            print(f"\n{folder / 'story.html'} ({time.perf_counter() - start:.1f} s)", flush=True)


def say(text: str) -> None:
    """Print a piece of text as it comes."""
    sys.stdout.write(
        text.encode(sys.stdout.encoding or "utf-8", errors="replace").decode(sys.stdout.encoding or "utf-8")
    )
    sys.stdout.flush()


def check_task_names(tasks: Sequence[str]) -> None:
    """Check that all tasks exist.

    Raises:
        ValueError: for one that does not, with the nearest.
    """
    from emu_embodied.tokens.templates import check_task

    for task in tasks:
        check_task(task)


def read_image(path: Path, cell: int) -> np.ndarray:
    """A picture file as uint8 [height, width, 3], turned as its camera says; transparent parts become white.

    Raises:
        ValueError: if it is missing, no picture, or smaller than a cell.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        near = (
            difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
            if path.parent.is_dir()
            else []
        )
        raise ValueError(
            f"the image {path} is missing" + (f"; did you mean {path.with_name(near[0])}?" if near else "")
        )
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            pixels = np.array(image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    if min(pixels.shape[:2]) < cell:
        raise ValueError(
            f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels: smaller than one cell of {cell} x {cell}"
        )
    return pixels
