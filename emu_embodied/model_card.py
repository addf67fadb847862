"""The card of a checkpoint: what it is, was made of and by, can and cannot do. Rendered from the files beside it alone.

``measured.json`` holds what was measured of the weights after training. What was measured of others is refused: no card
shows figures of an earlier model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from emu_embodied.files import write_atomically, write_json
from emu_embodied.models.checkpoints import read_config, read_folder_shapes
from emu_embodied.world_config import WorldModelConfig

CARD = "MODEL_CARD.md"
MEASURED = "measured.json"
LICENCE = "Apache-2.0, as the code. Made from simulated data alone."

_SHORT = ("codebook_used", "idempotent", "action_sensitivity_db")
_STAGE_FIGURES = (
    ("eval/psnr", "PSNR", " dB"),
    ("eval/codes_used", "codes used", ""),
    ("eval/token_accuracy", "tokens right", ""),
    ("eval/changed_token_accuracy", "of the changed ones", ""),
    ("eval/reward_corr", "reward r", ""),
    ("eval/reward_mae", "reward error", ""),
    ("eval/success_accuracy", "success right", ""),
    ("eval/proprio_mae", "proprio error", ""),
    ("eval/object_mae", "error of foretold objects", ""),
    ("eval/action_within_a_bin", "actions within a bin", ""),
)
"""Held-out figures of a stage's last log line: key, name, unit."""


def write_card(folder: Path, weights: str, inspections: Iterable[Path] = (), benches: Iterable[Path] = ()) -> Path:
    """Add measurements to a checkpoint folder and render its card.

    Args:
        folder: checkpoint folder.
        weights: hash of its weights, which measurements have to name.
        inspections: files that ``inspect`` wrote; a new one replaces the environment's older one.
        benches: files that ``bench`` wrote, of a protocol too; a new row replaces the older one of the same settings.

    Raises:
        ValueError: if a file is neither, or was measured with other weights.
    """
    known = _measured(folder)
    if known["weights"] != weights:  # what was measured of other weights is worth nothing now
        known = {"weights": weights, "inspect": {}, "bench": []}
    for path in inspections:
        content = _read(path, "probes")
        extra = content["meta"]["extra"]
        if extra.get("weights") != weights:
            raise ValueError(f"{path} was measured with other weights than {weights}: measure anew")
        known["inspect"][extra["env"]] = _short_inspection(content)
    for path in benches:
        rows = [row for row in _read(path, "rows")["rows"] if row["success"] is not None]  # a protocol's may wait
        own = [row for row in rows if row["settings"].get("weights", weights) == weights]
        if len(own) < len(rows):
            if not any("weights" in row["settings"] for row in own):
                raise ValueError(f"{path} was measured with other weights than {weights}: measure anew")
            warnings.warn(f"{len(rows) - len(own)} rows of {path} are of other weights and left out", stacklevel=2)
        for row in own:
            known["bench"] = [kept for kept in known["bench"] if _label(kept) != _label(row)] + [row]
    write_json(folder / MEASURED, known)
    card = render_card(folder)
    write_atomically(folder / CARD, lambda aside: aside.write_text(card, encoding="utf-8"))
    return folder / CARD


def render_card(folder: Path) -> str:
    """The card as Markdown, from ``world.json``, ``meta.json``, ``measured.json`` and the headers of the weights.

    Raises:
        ValueError: if the folder is no checkpoint of ours.
    """
    config = WorldModelConfig.load(folder / "world.json")
    stages = read_config(folder, "meta.json") if (folder / "meta.json").is_file() else {}
    measured = _measured(folder)
    parts = [
        f"# {folder.name}",
        "A token world model of emu-embodied: it predicts what a robot sees, feels and is rewarded for, block by block "
        "of actions. This card is rendered from the files in this folder (`emu-embodied card`).",
        "## What it is",
        _bullets(_what(folder, config, acts="policy" in stages)),
        "## Data",
        _bullets(_data(config, stages)),
        "## Training",
        _training(stages),
        "## Measured",
        _inspections(measured["inspect"]),
        _bench(measured["bench"]),
        "## Limits",
        _bullets(_limits(config, measured)),
        "## Licence",
        LICENCE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what(folder: Path, config: WorldModelConfig, *, acts: bool) -> list[str]:
    sizes = {}
    places = {
        "transformer": folder,
        "vision tokenizer": folder / "tokenizer",
        "eye": folder / "eye",
        "reward model": folder / "reward",
    }
    for name, place in places.items():
        if not place.is_dir():
            continue
        count = sum(prod(shape) for _, shape in read_folder_shapes(place).values())
        sizes[name] = f"{name} {count / 1e6:.2f} M parameters"
    megabytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6
    state = config.layout.state_tokens
    decoding = "next token"
    if config.decoding == "dida":
        passes = "one parallel pass" if config.passes == 1 else f"{config.passes} parallel passes"
        decoding = f"{passes} a state (DiDA; adapted with {', '.join(config.paths)})"
    facts = [
        f"{'; '.join(sizes.values())}; {megabytes:.1f} MB of weights.",
        f"Reads {' and '.join(config.cameras)} pictures of {config.image_size} px ({config.camera_tokens} codes of "
        f"{config.codebook} each), {len(config.proprio)} numbers of the robot, and an instruction of at most "
        f"{config.text_length} {'bytes' if config.tokens == 'compact' else 'tokens'}: {state} tokens a state.",
        f"Acts in blocks of {config.block} env steps of {config.action_dim} numbers; sequences of {config.max_states} "
        "states.",
        f"Decodes by {decoding}.",
    ]
    if config.objects:
        facts.append(f"Reads where things are, and foretells it: {', '.join(field.name for field in config.objects)}.")
    if "numbers" in config.streams:
        tokens = replace(config, stream="numbers").layout.state_tokens
        facts.append(f"Also imagines in numbers alone, {tokens} tokens a state (`--stream numbers`).")
    if acts:
        facts.append(
            "Acts by itself, cloned from scripted experts (`token`), and proposes to planners (`--proposals`)."
        )
    if config.subgoals:
        facts.append(f"Names and pictures subtasks, {config.subgoals} at a time.")
    return facts


def _data(config: WorldModelConfig, stages: dict[str, Any]) -> list[str]:
    counts = {entry["extra"].get("episodes") for entry in stages.values()} - {None}
    episodes = f", {max(counts)} episodes" if counts else ""
    return [
        f"Environments: {', '.join(config.env_ids)}{episodes}, recorded by `emu-embodied collect`.",
        f"Data hash: `{config.data_hash}`.",
    ]


def _training(stages: dict[str, Any]) -> str:
    if not stages:
        return "Not recorded: `meta.json` is missing."
    lines = ["| stage | steps | minutes | held-out figures | hardware |", "| --- | ---: | ---: | --- | --- |"]
    for name, entry in stages.items():
        extra, hardware = entry["extra"], entry["hardware"]
        figures = extra.get("figures", {})
        held = [f"{label} {figures[key]:.3g}{unit}" for key, label, unit in _STAGE_FIGURES if figures.get(key)]
        seen = {name.removeprefix("eval/error/"): e for name, e in figures.items() if name.startswith("eval/error/")}
        held += [f"median error of {name} {error:.2g}" for name, error in seen.items() if error is not None]
        device = hardware["accelerators"][0] if hardware.get("accelerators") else hardware["cpu"]
        device = device.get("name", device) if isinstance(device, dict) else device
        cells = (name, extra["steps"], f"{extra['seconds'] / 60:.0f}", ", ".join(held), device)
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    commands = [f"{entry['command']}  # seed {entry['seed']}" for entry in stages.values()]
    missing = [] if "tokenizer" in stages else ["The tokenizer's own stage is not on record here."]
    last = list(stages.values())[-1]
    versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    return "\n\n".join([
        "\n".join(lines), "```\n" + "\n".join(commands) + "\n```", *missing,
        f"Last stage: revision `{last['revision']}`, {versions}.",
    ])  # fmt: skip


def _inspections(found: dict[str, Any]) -> str:
    if not found:
        return "Not inspected: `emu-embodied inspect`."
    lines = [
        "| environment | gripper, probe (guess) | object, probe (guess) | object, by looking | object, as read out | "
        "codebook used | idempotent | action sensitivity | reward r, random plans |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for env_id, one in found.items():
        probes = [_probe_cell(one, label) for label in ("gripper", "object")]
        said = one.get("object_read")
        within = one.get("reward_r_random")
        looked = next((f"{one[name]:.1f} {name[-2:]}" for name in one if name.startswith("object_looking_")), "-")
        cells = [
            env_id, *probes, looked, "-" if said is None else f"{said['error']:.1f} {said['unit']}",
            f"{one['codebook_used']:.2f}", f"{one['idempotent']:.2f}", f"{one['action_sensitivity_db']:.1f} dB",
            "-" if within is None else f"{within:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "On held-out episodes, what can be read of positions from codes and the instruction's words, by a linear probe "
        "and by one that looks at one place."
    )
    return "\n".join(lines) + f"\n\n{note}"


def _probe_cell(one: dict[str, Any], label: str) -> str:
    for unit in ("cm", "px"):
        if one.get(f"{label}_probe_{unit}") is not None:
            return f"{one[f'{label}_probe_{unit}']:.1f} ({one[f'{label}_guess_{unit}']:.1f}) {unit}"
    return "-"


def _bench(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "Not measured in closed loop: `emu-embodied bench`."
    lines = [
        "| environment | policy | by | episodes | success | 95 % interval |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda row: (_where(row), _who(row))):
        low, high = row["ci95"]
        cells = (
            _where(row), _who(row), row["settings"].get("objective", ""), row["episodes"],
            f"{100 * row['success']:.0f} %", f"{100 * low:.0f} to {100 * high:.0f} %",
        )  # fmt: skip
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    note = "Rows without a model (random, scripted, true ...) are controls."
    return "\n".join(lines) + f"\n\n{note}"


def _where(row: dict[str, Any]) -> str:
    protocol = row.get("protocol")
    return f"{row['env']} ({protocol.upper()})" if protocol else str(row["env"])


def _who(row: dict[str, Any]) -> str:
    return str(row.get("control", row["policy"])) + searched(row["settings"])


def searched(settings: Mapping[str, Any]) -> str:
    """What a search had beside its objective, to be put behind its name: proposals, a shorter stream, or nothing."""
    share = settings.get("budget", {}).get("proposals", 0) if "acting" in settings else 0
    return (f", {100 * share:.0f} % proposed" if share else "") + (", in numbers" if "stream" in settings else "")


def _limits(config: WorldModelConfig, measured: dict[str, Any]) -> list[str]:
    facts = [
        "Simulated pictures only, of these environments, cameras and this robot: nothing else was ever seen, and no "
        "robot should be driven by it.",
        f"Imagination behind {config.max_states - config.context_states} blocks goes on from its own states; errors "
        "grow with it.",
    ]
    if not config.paths:
        facts.append("Never adapted for parallel decoding.")
    if not config.objects:
        facts.append("Does not say where objects are.")
    for env_id, one in measured["inspect"].items():
        for unit in ("cm", "px"):
            error, guess = (one.get(f"object_{kind}_{unit}") for kind in ("probe", "guess"))
            if error is not None and guess is not None and error > 0.5 * guess > 0.05:
                pixels = one.get(f"object_pixels_{unit}")
                beside = "" if pixels is None else f", of the pixels themselves by {pixels:.1f}"
                facts.append(
                    f"{env_id}: where the meant object is, a linear probe of its codes reads off by {error:.1f} {unit}"
                    f"{beside}, a constant guess by {guess:.1f}."
                )
    planned = {row["env"] for row in measured["bench"] if "weights" in row["settings"]}
    unmeasured = [env_id for env_id in config.env_ids if env_id not in planned]
    if unmeasured:
        facts.append(f"Not measured in closed loop: {', '.join(unmeasured)}.")
    return facts


def _short_inspection(content: dict[str, Any]) -> dict[str, Any]:
    """What a card shows of an inspection, with where it comes from."""
    short = {key: value for key, value in content.items() if key in _SHORT or key.startswith(("gripper_", "object_"))}
    probed = next((score for score in content["probes"]["codes"][1:]), None)
    for label, kind in (("pixels", "pixels_and_words"), ("looking", "codes_by_looking")):
        for score in content["probes"].get(kind, ()):
            if probed is not None and score["place"] == probed["place"]:
                short[f"object_{label}_{score['unit']}"] = score["error"]
    if probed is not None and probed["place"] in content["ahead"][0]["errors"]:
        short["object_read"] = {"error": content["ahead"][0]["errors"][probed["place"]], "unit": probed["unit"]}
    if content.get("plans"):
        short["reward_r_random"] = content["plans"]["within"].get("random")
    meta = content["meta"]
    return {**short, "command": meta["command"], "revision": meta["revision"], "episodes": meta["extra"]["episodes"]}


def _measured(folder: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"weights": None, "inspect": {}, "bench": []}
    return read_config(folder, MEASURED) if (folder / MEASURED).is_file() else empty


def _read(path: Path, needed: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        content[needed], content["meta"]["extra"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no such measurement ({error!r})") from error
    return dict(content)


def _label(row: dict[str, Any]) -> tuple[Any, ...]:
    settings = {key: value for key, value in row["settings"].items() if key != "weights"}
    return _where(row), _who(row), json.dumps(settings, sort_keys=True)


def _bullets(facts: Sequence[str]) -> str:
    return "\n".join(f"- {fact}" for fact in facts)
