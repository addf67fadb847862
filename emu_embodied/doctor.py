"""What this machine has, and what to do about what is missing."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from emu_embodied.hardware import GLProbe, Hardware, describe_hardware, pick_device, pick_dtype, probe_gl
from emu_embodied.provenance import package_versions

if TYPE_CHECKING:
    from emu_embodied.models.footprint import Footprint, Way

EXTRAS = {
    "tensorboard": "track",
    "tiktoken": "emu35",
    "yaml": "emu35",
    "accelerate": "large",
    "bitsandbytes": "large",
    "peft": "lora",
}
"""Optional module -> the extra that installs it."""
GL_ADVICE = "install off-screen GL: apt-get install libegl1 libgl1 libgl1-mesa-dri (or libosmesa6 and MUJOCO_GL=osmesa)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipped:
    """A checkpoint inside the package."""

    name: str
    """What ``--checkpoint`` takes."""
    megabytes: float
    """Size on disk [MB]."""
    env_ids: tuple[str, ...]
    """Environments it was trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was found."""

    hardware: Hardware
    """Processor, memory, devices."""
    dtype: str
    """What ``--dtype auto`` would train in on the best device."""
    gl: GLProbe
    """Off-screen drawing."""
    versions: dict[str, str]
    """Installed packages that results depend on."""
    missing_extras: dict[str, str]
    """Optional modules that are not installed -> their extra."""
    weights: tuple[Shipped, ...]
    """Shipped checkpoints."""
    advice: tuple[str, ...]
    """What to do, most urgent first."""
    healthy: bool
    """Whether `plan` would work here."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        h = self.hardware
        devices = ", ".join(f"{a.device} {a.name} ({a.memory_gb:.0f} GB)" for a in h.accelerators) or "none"
        drawn = f"{self.gl.backend} ({self.gl.renderer})" if self.gl.backend else "NOT WORKING"
        weights = [f"{w.name} ({w.megabytes:.1f} MB: {', '.join(w.env_ids)})" for w in self.weights]
        rows = {
            "processor": f"{h.cpu}, {h.cores} cores, {h.memory_gb:.0f} GB, {h.system}",
            "torch": f"{self.versions.get('torch', 'missing')}, {h.torch_threads} threads, trains in {self.dtype}",
            "CUDA devices": devices,
            "off-screen GL": drawn,
            "weights": ", ".join(weights) or "none",
            "versions": ", ".join(f"{name} {version}" for name, version in self.versions.items()),
        }
        lines = [f"{name:<14} {value}" for name, value in rows.items()]
        lines += [f"-> {line}" for line in self.advice] or ["nothing is missing"]
        return "\n".join(lines)


def examine() -> Report:
    """Probe everything; drawing is proved in a process of its own and takes a second or two."""
    hardware = describe_hardware(with_torch=True)
    gl = probe_gl()
    weights = tuple(_shipped())
    extras = {name: extra for name, extra in EXTRAS.items() if importlib.util.find_spec(name) is None}
    advice = []
    if gl.backend is None:
        advice.append(GL_ADVICE)
    if not weights:
        advice.append("no shipped weights: train some (README, 'Train your own') or install the package from a wheel")
    advice += [f"optional: pip install 'emu-embodied[{extra}]' for {name}" for name, extra in extras.items()]
    dtype = str(pick_dtype("auto", pick_device("auto"))).removeprefix("torch.")
    return Report(
        hardware=hardware,
        dtype=dtype,
        gl=gl,
        versions=package_versions(),
        missing_extras=extras,
        weights=weights,
        advice=tuple(advice),
        healthy=gl.backend is not None and bool(weights),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """How much memory a checkpoint needs, and how it would run here."""

    need: Footprint
    """Sizes."""
    ways: tuple[Way, ...]
    """Ways of running it, best first."""

    @property
    def fits(self) -> bool:
        """Whether one of the ways works."""
        return any(way.works for way in self.ways)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        from emu_embodied.models.footprint import describe

        return describe(self.need, self.ways)


def examine_checkpoint(name_or_folder: str, hardware: Hardware | None = None) -> Estimate:
    """Estimate from configurations and headers; no weights are read.

    Args:
        name_or_folder: a shipped name, or a folder of ours or of Emu3.5's.
        hardware: of the machine meant; this one if None.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    from emu_embodied.models.footprint import footprint, ways
    from emu_embodied.world_config import checkpoint_folder

    folder = checkpoint_folder(name_or_folder)
    need = footprint(folder, name=str(name_or_folder))
    found = ways(need, describe_hardware(with_torch=True) if hardware is None else hardware)
    return Estimate(need=need, ways=tuple(found))


def _shipped() -> list[Shipped]:
    from emu_embodied.world_config import WEIGHTS, WorldModelConfig, shipped

    found = []
    for name in shipped():
        files = [path for path in (WEIGHTS / name).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 1e6
        found.append(
            Shipped(name=name, megabytes=size, env_ids=WorldModelConfig.load(WEIGHTS / name / "world.json").env_ids)
        )
    return found
