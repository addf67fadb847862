"""What a checkpoint knows: figures of its tokenizer, of what stands in its vectors, and of how it heeds actions.

Shape letters: M states, N frame tokens of a state, P proprio dims, O object dims, H horizon in blocks, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from emu_embodied.metrics.image import psnr
from emu_embodied.metrics.looking import look
from emu_embodied.metrics.probes import Place, ProbeScore, Split, kernel, places, probe, words
from emu_embodied.models.ibq import code_usage, to_pixels
from emu_embodied.records import Episode, Observation
from emu_embodied.tokens.frames import IBQFrameTokenizer
from emu_embodied.world_model import WorldModel

HELD_OUT = 0.33
"""Share of episodes that probes are measured on."""
REENCODED = 20
"""How often a picture is encoded and decoded in a row."""
PROBED = 1000
"""States that probes see, spread over all: fitting takes the cube of their number."""
IMAGINED = 64
"""Episodes that are imagined."""
PICTURES = 32
"""Pictures that the tokenizer's round trips are measured on."""
BATCH = 16
"""States that go through the networks at once."""
MAX_PSNR = 60.0
"""[dB] what equal pictures count as: infinity has no mean."""


@dataclass(frozen=True, slots=True)
class States:
    """All states of some episodes, as the model reads them.

    Attributes:
        codes_MN: int64, on the model's device.
        proprio_MP: float32.
        objects_MO: float32.
        instructions: M of them.
        episode_M: int, which episode each is of.
    """

    codes_MN: torch.Tensor
    proprio_MP: np.ndarray
    objects_MO: np.ndarray
    instructions: tuple[str, ...]
    episode_M: np.ndarray

    def at(self, rows: np.ndarray) -> States:
        """Some of them."""
        told = tuple(self.instructions[row] for row in rows)
        return States(self.codes_MN[rows], self.proprio_MP[rows], self.objects_MO[rows], told, self.episode_M[rows])


@dataclass(frozen=True, slots=True)
class TokenizerFigures:
    """Of the vision tokenizer, on real frames."""

    codes: int
    """Size of the codebook."""
    codes_used: int
    """Codes that occur."""
    used: float
    """The same as a share of the codebook, in [0, 1]."""
    perplexity: float
    """Codes that, used evenly, would have the same entropy."""
    idempotence: float
    """Share of codes that come back when a picture is decoded and encoded again, in [0, 1]."""
    psnr: float
    """A picture after one round trip against itself [dB]."""
    psnr_reencoded: float
    """The same after ``REENCODED`` round trips in a row [dB]."""


@dataclass(frozen=True, slots=True)
class Foretold:
    """Means over episodes of what was imagined h blocks ahead."""

    h: int
    """Blocks after the last state seen; 0 is that state."""
    psnr: float | None
    """Imagined frames against real ones [dB]; None at h = 0."""
    psnr_shuffled: float | None
    """The same when another episode's actions were imagined [dB]."""
    errors: dict[str, float]
    """Distance of each position, in its unit: proprio's as imagined, objects' as read out."""
    stays: dict[str, float]
    """The same for the true positions of the last state seen."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found.

    Attributes:
        probes: kind of vector -> how well each position is read from it: ``pixels_and_words`` (the pictures themselves
            and the instruction's words, for comparison), ``codes`` (the tokenizer's code vectors), ``codes_and_words``,
            ``hidden`` (the backbone's, of the whole state), ``readout`` (its last one, from which on the model says
            what it makes of the state); not linear (see ``looking``) ``codes_by_looking`` and ``encoder_by_looking``
            (before quantisation: what the codebook costs).
        gripper: name of the robot's own position among them; None if proprio has none.
        object: name of the first object's; None if the environment tells of none.
        tokenizer: its figures.
        ahead: figures of imagination, from h = 0.
        states: number of states probed.
        held_states: of them measured.
    """

    probes: dict[str, list[ProbeScore]]
    gripper: str | None
    object: str | None
    tokenizer: TokenizerFigures
    ahead: list[Foretold]
    states: int
    held_states: int

    @property
    def sensitivity(self) -> float:
        """PSNR lost when the actions are another episode's, mean over horizons [dB]."""
        return sensitivity(self.ahead)

    def score(self, kind: str, place: str | None) -> ProbeScore | None:
        """One probe's score."""
        return next((score for score in self.probes[kind] if score.place == place), None)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; the first entries are the short answer.

        Positions without centimetres stand under their own unit (``object_probe_px``), with None under ``_cm``.
        """
        short: dict[str, Any] = {}
        for label, place in (("gripper", self.gripper), ("object", self.object)):
            found = self.score("codes_and_words", place)
            short[f"{label}_probe_cm"] = None
            if found is not None:
                short[f"{label}_probe_{found.unit}"] = found.error
                short[f"{label}_guess_{found.unit}"] = found.guess
        return {
            **short,
            "codebook_used": self.tokenizer.used,
            "idempotent": self.tokenizer.idempotence,
            "action_sensitivity_db": self.sensitivity,
            "probes": {kind: [score.to_dict() for score in scores] for kind, scores in self.probes.items()},
            "tokenizer": asdict(self.tokenizer),
            "ahead": [asdict(row) for row in self.ahead],
            "states": self.states,
            "held_states": self.held_states,
        }

    def table(self) -> str:
        """The figures as text."""
        lines = ["probes: error (of a constant guess)"]
        for kind, scores in self.probes.items():
            cells = [f"{score.place} {score.error:.2f} ({score.guess:.2f}) {score.unit}" for score in scores]
            lines.append(f"  {kind:17s} {'   '.join(cells)}")
        one = self.tokenizer
        lines.append(
            f"tokenizer: {one.codes_used} of {one.codes} codes, perplexity {one.perplexity:.0f}, idempotence "
            f"{one.idempotence:.3f}, {one.psnr:.2f} dB, after {REENCODED} round trips {one.psnr_reencoded:.2f} dB"
        )
        lines.append(f"action sensitivity: {self.sensitivity:.2f} dB")
        for row in self.ahead:
            seen = "" if row.psnr is None else f"{row.psnr:.2f} dB (shuffled {row.psnr_shuffled:.2f})   "
            cells = [f"{name} {error:.2f} (stays {row.stays[name]:.2f})" for name, error in row.errors.items()]
            lines.append(f"  {row.h} blocks ahead: {seen}{'   '.join(cells)}")
        return "\n".join(lines)


def inspect_world(
    world: WorldModel, episodes: Sequence[Episode], fields: Any, horizon: int, *, seed: int
) -> Inspection:
    """Probe a model on episodes that it has not seen.

    Args:
        world: the model.
        episodes: each of at least ``horizon`` blocks.
        fields: ``(proprio_fields, object_fields)`` of their environment.
        horizon: blocks imagined.
        seed: of noise, of the shuffle and of intervals.

    Raises:
        ValueError: if there are too few episodes, or one is too short.
    """
    short = min(len(episode) for episode in episodes)
    if short < horizon:
        raise ValueError(f"an episode has {short} blocks, fewer than the horizon of {horizon}")
    robot, things = (places(part) for part in fields)
    every = encode_states(world, episodes)
    rows = np.linspace(0, len(every.episode_M) - 1, min(PROBED, len(every.episode_M))).astype(int)
    states = every.at(rows)
    split = Split.of(states.episode_M, HELD_OUT)
    cells = world.frames.embed(states.codes_MN).cpu()
    vectors = cells.flatten(1)
    told = words(states.instructions)
    hidden = hidden_states(world, states)
    shown = [np.concatenate([episode.frames[camera] for episode in episodes]) for camera in world.config.cameras]
    pixels = torch.from_numpy(np.stack(shown, 1)[rows]).flatten(1)
    kernels = {
        "pixels_and_words": kernel(pixels, ~split.held_M, told),
        "codes": kernel(vectors, ~split.held_M),
        "codes_and_words": kernel(vectors, ~split.held_M, told),
        "hidden": kernel(hidden.flatten(1), ~split.held_M),
        "readout": kernel(hidden[:, -1], ~split.held_M),
    }
    probes = {
        kind: [
            *probe(found, states.proprio_MP, robot[:1], split, seed=seed),
            *probe(found, states.objects_MO, things, split, seed=seed),
        ]
        for kind, found in tqdm(kernels.items(), desc="probes", unit="probe")
    }
    sought = [*((place, states.proprio_MP) for place in robot[:1]), *((place, states.objects_MO) for place in things)]
    unquantised = encoder_cells(world, pixels.unflatten(1, (len(shown), *shown[0].shape[1:])))
    for kind, looked_at in tqdm({"encoder_by_looking": unquantised, "codes_by_looking": cells}.items(), desc="looking"):
        probes[kind] = [
            look(looked_at, told, numbers_MO, place, split, world.frames.grid, seed=seed)
            for place, numbers_MO in sought
        ]
    return Inspection(
        probes=probes,
        gripper=robot[0].name if robot else None,
        object=things[0].name if things else None,
        tokenizer=tokenizer_figures(world.frames, frames_of(world, episodes), every.codes_MN),
        ahead=foretell(world, episodes[:IMAGINED], horizon, robot[:1], things, seed=seed),
        states=len(states.episode_M),
        held_states=int(split.held_M.sum()),
    )


def encode_states(world: WorldModel, episodes: Sequence[Episode]) -> States:
    """Every state of the episodes, tokenised."""
    codes = []
    for episode in tqdm(episodes, desc="encode", unit="episode"):
        per_camera = [world.frames.encode(episode.frames[camera]) for camera in world.config.cameras]
        codes.append(torch.cat(per_camera, 1))
    lengths = [len(episode) + 1 for episode in episodes]
    return States(
        codes_MN=torch.cat(codes).to(world.device),
        proprio_MP=np.concatenate([episode.proprio_TP for episode in episodes]),
        objects_MO=np.concatenate([episode.objects_TO for episode in episodes]),
        instructions=tuple(e.instruction for e, length in zip(episodes, lengths, strict=True) for _ in range(length)),
        episode_M=np.repeat(np.arange(len(episodes)), lengths),
    )


@torch.inference_mode()
def hidden_states(world: WorldModel, states: States) -> torch.Tensor:
    """What the backbone makes of each state alone, told its instruction: float32 [M, places, D] on the CPU.

    The places are those of frames and proprio, up to ``reading_place``.
    """
    layout, backbone = world.layout, world.backbone
    length = layout.text_tokens + reading_place(world) + 1
    positions = torch.arange(length, device=world.device)
    found = []
    for start in tqdm(range(0, len(states.episode_M), BATCH), desc="hidden states", unit="batch"):
        rows = slice(start, start + BATCH)
        text = torch.stack([layout.text_ids(world.text.encode(i)) for i in states.instructions[rows]])
        proprio = torch.from_numpy(states.proprio_MP[rows]).to(world.device)
        unseen = proprio.new_zeros(len(proprio), len(world.config.objects))
        bins = world.proprio.encode(torch.cat([proprio, unseen], 1))
        ids = torch.cat([text.to(world.device), layout.state_ids(states.codes_MN[rows], bins)], 1)[:, :length]
        hidden = backbone.core(backbone.embed(ids), positions, mask=None)
        found.append(hidden[:, layout.text_tokens :].float().cpu())
    return torch.cat(found)


@torch.no_grad()
def encoder_cells(world: WorldModel, pictures: torch.Tensor) -> torch.Tensor:
    """What the tokenizer's encoder gives before quantisation.

    Args:
        world: whose tokenizer.
        pictures: uint8 [M, cameras, height, width, 3].

    Returns:
        float32 [M, N, code dim] on the CPU, the cameras one after another.
    """
    flat = pictures.flatten(0, 1).split(BATCH)
    found = [world.frames.ibq.vectors(to_pixels(part.to(world.frames.device))).flatten(1, 2).cpu() for part in flat]
    return torch.cat(found).unflatten(0, pictures.shape[:2]).flatten(1, 2)


def reading_place(world: WorldModel) -> int:
    """Where in a state the last thing stands that the model is told; what follows is read out of it."""
    return int(world.layout.proprio_slots[len(world.config.proprio) - 1])


def frames_of(world: WorldModel, episodes: Sequence[Episode]) -> np.ndarray:
    """At most ``PICTURES`` real frames of all cameras, spread over the episodes: uint8 [M, height, width, 3]."""
    frames = np.concatenate([episode.frames[camera] for episode in episodes for camera in world.config.cameras])
    return frames[np.linspace(0, len(frames) - 1, min(PICTURES, len(frames))).astype(int)]


def tokenizer_figures(
    frames: IBQFrameTokenizer, pictures: np.ndarray, codes: torch.Tensor | None = None
) -> TokenizerFigures:
    """Figures of a tokenizer.

    Args:
        frames: the tokenizer.
        pictures: uint8 [M, height, width, 3], for the round trips.
        codes: codes of more pictures, for the use of the codebook; those of ``pictures`` where None.
    """
    first = frames.encode(pictures)
    usage = code_usage(first if codes is None else codes, frames.codebook_size)
    once = shown = frames.decode(first)
    returned = float((frames.encode(once) == first).float().mean())
    for _ in tqdm(range(REENCODED - 1), desc="round trips", unit="round"):
        shown = frames.decode(frames.encode(shown))
    occur = int((usage.counts > 0).sum())
    return TokenizerFigures(
        codes=frames.codebook_size,
        codes_used=occur,
        used=occur / frames.codebook_size,
        perplexity=usage.perplexity,
        idempotence=returned,
        psnr=_decibels(once, pictures),
        psnr_reencoded=_decibels(shown, pictures),
    )


def foretell(
    world: WorldModel,
    episodes: Sequence[Episode],
    horizon: int,
    robot: Sequence[Place],
    things: Sequence[Place],
    *,
    seed: int,
) -> list[Foretold]:
    """Imagine a stretch of every episode with its own actions and with those of the next one.

    Stretches start at all places of their episodes, so that there is something to see.
    """
    generator = torch.Generator().manual_seed(seed)
    known = things if world.config.objects else ()
    names = [place.name for place in (*robot, *known)]
    pictures: list[np.ndarray] = []
    errors: list[np.ndarray] = []
    stays: list[np.ndarray] = []
    starts = [i % (len(episode) - horizon + 1) for i, episode in enumerate(episodes)]
    for i, (episode, start) in enumerate(zip(tqdm(episodes, desc="imagine", unit="episode"), starts, strict=True)):
        other = (i + 1) % len(episodes)
        own, foreign = (episodes[of].actions_TKA[starts[of] : starts[of] + horizon] for of in (i, other))
        belief = world.observe([_seen(episode, start)])
        imagination = world.imagine(belief, torch.from_numpy(np.stack([own, foreign])), generator)
        drawn = world.render(imagination, [0, 1], range(horizon))
        real = {camera: episode.frames[camera][start + 1 : start + 1 + horizon] for camera in drawn}
        pictures.append(np.mean([_decibels_of_both(shown, real[camera]) for camera, shown in drawn.items()], 0))
        window = slice(start, start + horizon + 1)
        felt = torch.cat([belief.proprio_P[None], imagination.proprio_SHP[0]]).cpu().numpy()
        pairs = [(place, felt, episode.proprio_TP[window]) for place in robot]
        if imagination.objects_SHO is not None:
            read = torch.cat([belief.objects_O[None], imagination.objects_SHO[0]]).cpu().numpy()
            pairs += [(place, read, episode.objects_TO[window]) for place in known]
        errors.append(np.array([place.error(told, true) for place, told, true in pairs]))
        stays.append(np.array([place.error(np.broadcast_to(true[:1], true.shape), true) for place, _, true in pairs]))
    shown_SH = np.mean(pictures, 0)
    wrong, still = (np.mean(found, 0) for found in (errors, stays))
    return [
        Foretold(
            h=h,
            psnr=float(shown_SH[0, h - 1]) if h else None,
            psnr_shuffled=float(shown_SH[1, h - 1]) if h else None,
            errors={name: float(wrong[i, h]) for i, name in enumerate(names)},
            stays={name: float(still[i, h]) for i, name in enumerate(names)},
        )
        for h in range(horizon + 1)
    ]


def sensitivity(ahead: Sequence[Foretold]) -> float:
    """PSNR lost when the actions are another episode's, mean over horizons [dB]."""
    pairs = [(row.psnr, row.psnr_shuffled) for row in ahead]
    return float(np.mean([own - foreign for own, foreign in pairs if own is not None and foreign is not None]))


def _seen(episode: Episode, t: int) -> Observation:
    frames = {camera: images[t] for camera, images in episode.frames.items()}
    return Observation(frames, episode.proprio_TP[t], episode.instruction)


def _decibels_of_both(shown_SHWC: np.ndarray, real_HWC: np.ndarray) -> np.ndarray:
    """PSNR float64 [S, H] of imagined frames against what happened."""
    return np.stack([np.minimum(psnr(shown, real_HWC), MAX_PSNR) for shown in shown_SHWC])


def _decibels(images: np.ndarray, references: np.ndarray) -> float:
    return float(np.minimum(psnr(images, references), MAX_PSNR).mean())
