"""What a machine is said to have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emu_embodied import hardware
from emu_embodied.hardware import bf16_units, describe_hardware, pick_device, pick_dtype, probe_gl


@pytest.mark.parametrize(
    ("flags", "units"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile amx_int8\n", "amx"),
        ("flags\t\t: fpu avx512f avx512_bf16\n", "avx512_bf16"),
        ("flags\t\t: fpu avx512f avx512_vnni\n", None),
        ("flags\t\t: fpu\nbugs\t\t: amx_bf16 amx_tile\n", None),
        ("Features\t: fp asimd bf16\n", None),
        ("", None),
    ],
)
def test_bf16_units_are_read_from_the_processor_flags(tmp_path: Path, flags: str, units: str | None) -> None:
    (tmp_path / "cpuinfo").write_text(flags)
    assert bf16_units(tmp_path / "cpuinfo") == units


def test_bf16_units_where_there_is_no_cpuinfo(tmp_path: Path) -> None:
    assert bf16_units(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("units", "dtype"), [("amx", torch.bfloat16), ("avx512_bf16", torch.float32), (None, torch.float32)]
)
def test_auto_dtype_is_bf16_only_where_it_pays(
    monkeypatch: pytest.MonkeyPatch, units: str | None, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(hardware, "bf16_units", lambda: units)
    assert pick_dtype("auto", "cpu") == pick_dtype("auto", torch.device("cpu")) == dtype
    assert pick_dtype("bf16") == torch.bfloat16 and pick_dtype("float32") == torch.float32


@pytest.mark.parametrize("native", [True, False])
def test_auto_dtype_on_cuda_is_bf16_where_it_is_native(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation)
    assert pick_dtype("auto", "cuda") == (torch.bfloat16 if native else torch.float32)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(pick_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    with pytest.raises(ValueError, match="it has 2"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device().type == "cpu"
    with pytest.raises(ValueError, match="--device cpu or auto"):
        pick_device("cuda")


@pytest.mark.parametrize(("name", "near"), [("gpu", "'cuda'"), ("cude", "'cuda'"), ("CPU ", "did you mean")])
def test_unknown_device_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=near):
        pick_device(name)


def test_unknown_dtype_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"):
        pick_dtype("bflot16")


def test_description_is_of_this_machine() -> None:
    described = describe_hardware(with_torch=True)
    assert 1 <= described.cores <= (os.cpu_count() or 1) and 0.1 < described.memory_gb < 1e5
    assert described.torch_threads == torch.get_num_threads()
    assert len(described.accelerators) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert describe_hardware(with_torch=False).torch_threads is None
    assert set(described.to_dict()) >= {"cpu", "cores", "memory_gb", "bf16_units", "torch_threads", "accelerators"}


def test_peak_memory_is_this_process_and_not_its_parent() -> None:
    ballast = bytearray(400_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from emu_embodied.hardware import peak_memory_mb; print(peak_memory_mb())"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert 5 < float(done.stdout) < 100
    assert hardware.peak_memory_mb() > 400


def test_gl_probe_names_what_failed() -> None:
    probe = probe_gl(("nonsense",))
    assert probe.backend is None and "nonsense" in probe.errors["nonsense"]
    assert probe_gl(("nonsense",), timeout=0.01).errors == {"nonsense": "no picture in 0.01 s"}


def test_gl_probe_draws() -> None:
    probe = probe_gl()
    if probe.backend is None:
        pytest.skip(f"no off-screen GL here: {probe.errors}")
    assert probe.renderer
    again = probe_gl(("nonsense", probe.backend))
    assert again.backend == probe.backend and list(again.errors) == ["nonsense"]
