"""What this machine can compute and draw with. Torch is imported only by the functions that need it."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
"""Names that ``pick_dtype`` takes besides ``auto``, and torch's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """One CUDA device."""

    device: str
    """Torch's name, e.g. ``cuda:0``."""
    name: str
    """The maker's name."""
    memory_gb: float
    """[GB]"""
    capability: str
    """CUDA compute capability, e.g. ``9.0``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """What there is to compute with."""

    system: str
    """Operating system and machine type."""
    cpu: str
    """Processor name."""
    cores: int
    """Cores this process may use (affinity and container quota) [cores]."""
    memory_gb: float
    """Memory this process may use [GB]."""
    bf16_units: str | None
    """``amx`` (matrix units), ``avx512_bf16`` (dot products) or None."""
    torch_threads: int | None
    """Threads of one torch operation; None if torch was not asked."""
    accelerators: tuple[Accelerator, ...]
    """CUDA devices; empty if torch was not asked."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class GLProbe:
    """Whether a picture could be drawn off-screen."""

    backend: str | None
    """``MUJOCO_GL`` value that works, or None."""
    renderer: str
    """What drew it, e.g. ``llvmpipe`` (a CPU) or a GPU's name."""
    errors: dict[str, str]
    """Backend -> last line of its error, for those that were tried and failed."""


def describe_hardware(*, with_torch: bool | None = None) -> Hardware:
    """What this machine has.

    Args:
        with_torch: whether to ask torch for threads and CUDA devices (importing it takes a second or more). None: only
            if the process has imported it anyway.
    """
    threads: int | None = None
    accelerators: tuple[Accelerator, ...] = ()
    if with_torch or (with_torch is None and "torch" in sys.modules):
        import torch

        threads, accelerators = torch.get_num_threads(), _accelerators()
    return Hardware(
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_name(),
        cores=usable_cores(),
        memory_gb=round(usable_memory_gb(), 1),
        bf16_units=bf16_units(),
        torch_threads=threads,
        accelerators=accelerators,
    )


def pick_device(name: str = "auto") -> torch.device:
    """The torch device to compute on.

    Args:
        name: ``auto`` (CUDA if there is a device, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ValueError: if the name is unknown or this machine has no such device.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        near = get_close_matches(name.replace("gpu", "cuda"), ["auto", "cpu", "cuda", "cuda:0"], n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown device {name!r}: did you mean {near!r}? Known: auto, cpu, cuda, cuda:N")
    if int(match[1] or 0) >= count:
        has = f"it has {count}" if count else "torch finds none (is this a CUDA build of torch, and a driver there?)"
        raise ValueError(f"device {name!r} is not on this machine: {has}; use --device cpu or auto")
    return torch.device(name)


def pick_dtype(name: str = "auto", device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype of matrix products.

    ``auto`` takes bfloat16 only where it is quicker: on CUDA devices that have it in hardware, and on CPUs with AMX.
    Without those units a CPU converts back and forth (LOG.md has figures: a third of float32's speed).

    Raises:
        ValueError: if the name is unknown.
    """
    import torch

    if name == "auto":
        kind = torch.device(device).type
        native = torch.cuda.is_bf16_supported(including_emulation=False) if kind == "cuda" else bf16_units() == "amx"
        return torch.bfloat16 if native and kind in ("cuda", "cpu") else torch.float32
    if name not in DTYPES:
        near = get_close_matches(name, ["auto", *DTYPES], n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown dtype {name!r}: did you mean {near!r}? Known: auto, {', '.join(DTYPES)}")
    return getattr(torch, DTYPES[name])


def bf16_units(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The CPU's hardware for bfloat16 products: ``amx``, ``avx512_bf16`` or None (also where it cannot be told)."""
    try:
        flags = set(re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)[0].split())
    except (OSError, IndexError):
        return None
    if {"amx_bf16", "amx_tile"} <= flags:
        return "amx"
    return "avx512_bf16" if "avx512_bf16" in flags else None


def usable_cores() -> int:
    """Cores this process may use: its affinity, and a container's quota rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no control groups, or the quota "max"
        return cores


def usable_memory_gb() -> float:
    """Memory this process may use [GB]: the machine's, or a container's limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text())) / 1e9
    except (OSError, ValueError):  # no control groups, or the limit "max"
        return machine / 1e9


def peak_memory_mb() -> float:
    """Largest resident memory this process has had [MB]."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux a child starts with the value its parent had.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


_DRAW = """
import mujoco
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><light pos="0 0 3"/><geom size=".3"/></worldbody></mujoco>')
renderer = mujoco.Renderer(model, 32, 32)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer.update_scene(data)
assert renderer.render().max() > 0, "the picture is black"
try:
    from OpenGL import GL
    print("renderer:", GL.glGetString(GL.GL_RENDERER).decode())
except ImportError:
    print("renderer: unknown")
renderer.close()
"""


def probe_gl(backends: tuple[str, ...] | None = None, *, timeout: float = 60.0) -> GLProbe:
    """Draw one picture with MuJoCo in another process, because a bad GL library takes its process with it.

    Args:
        backends: ``MUJOCO_GL`` values to try in turn; by default the variable's own if set, else egl, osmesa, and a
            window system where there is a display.
        timeout: for each [s].
    """
    if backends is None:
        chosen = os.environ.get("MUJOCO_GL")
        windowed = ("glfw",) if os.environ.get("DISPLAY") or sys.platform == "darwin" else ()
        backends = (chosen,) if chosen else ("egl", "osmesa", *windowed)
    errors = {}
    for backend in backends:
        environment = {**os.environ, "MUJOCO_GL": backend}
        if backend in ("egl", "osmesa"):
            environment["PYOPENGL_PLATFORM"] = backend
        try:
            done = subprocess.run(
                [sys.executable, "-c", _DRAW], env=environment, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            errors[backend] = f"no picture in {timeout:g} s"
            continue
        if found := re.search(r"^renderer: (.*)$", done.stdout, re.MULTILINE):
            return GLProbe(backend=backend, renderer=found[1], errors=errors)
        lines = [line for line in done.stderr.splitlines() if line and not line.startswith((" ", "\t", ")"))]
        errors[backend] = lines[-1] if lines else f"exit code {done.returncode}"
    return GLProbe(backend=None, renderer="", errors=errors)


def _accelerators() -> tuple[Accelerator, ...]:
    import torch

    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        found.append(
            Accelerator(
                device=f"cuda:{i}",
                name=properties.name,
                memory_gb=round(properties.total_memory / 1e9, 1),
                capability=f"{properties.major}.{properties.minor}",
            )
        )
    return tuple(found)


def _cpu_name() -> str:
    try:
        return re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
