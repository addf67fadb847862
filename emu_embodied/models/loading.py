"""Ways of loading a backbone that is larger than the device: other number formats, several devices, the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.utils import logging

from emu_embodied.hardware import pick_device, pick_dtype
from emu_embodied.require import require

if TYPE_CHECKING:
    from emu_embodied.models.transformer import EmuForCausalLM

Quantize = Literal["4bit", "8bit"]


def loading(
    device: str = "auto",
    dtype: str = "auto",
    quantize: Quantize | None = None,
    offload: Path | None = None,
) -> dict[str, Any]:
    """Arguments for ``EmuForCausalLM.from_pretrained`` (and ``InterleavedModel``'s, which hands them on).

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``; or ``spread`` over all devices, then main memory.
        dtype: of the weights and of computing; ``auto`` is as stored.
        quantize: keep the layers' weights in 4 bits (NF4) or 8, by bitsandbytes; embedding and head stay in ``dtype``.
        offload: folder for whatever fits neither the devices nor main memory; layers are fetched as they are needed.

    Returns:
        ``dtype``, and ``device_map``, ``offload_folder`` and ``quantization_config`` where they are needed. Without a
        ``device_map`` the caller moves the model.

    Raises:
        ValueError: for an unknown device or dtype, or a combination that cannot be.
        ImportError: with the pip line, for a package that is missing.
    """
    chosen = pick_device("auto" if device == "spread" else device)
    options: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else pick_dtype(dtype, chosen)}
    if offload is not None and quantize is not None:
        raise ValueError("quantised weights cannot be kept on disk: give --quantize or --offload, not both")
    if quantize is not None:
        options["quantization_config"] = quantization(quantize, options["dtype"])
        options["device_map"] = "auto" if device == "spread" else {"": str(chosen)}
    elif device == "spread" or offload is not None:
        require("accelerate", extra="large")
        options["device_map"] = "auto"
    if offload is not None:
        options["offload_folder"] = str(offload)
    return options


def quantization(quantize: Quantize, dtype: torch.dtype | str = "auto") -> Any:
    """The configuration of transformers' own integration of bitsandbytes, which runs on CUDA devices and on CPUs.

    Args:
        quantize: bits of a weight; 4 are NF4 with quantised scales (QLoRA).
        dtype: what products are computed in; ``auto`` takes bfloat16.

    Raises:
        ImportError: with the pip line, if bitsandbytes or accelerate is missing.
    """
    require("accelerate", extra="large")
    require("bitsandbytes", extra="large")
    from transformers import BitsAndBytesConfig

    # Our decoders read rows of the head; an action embedding starts new and is small.
    kept = ["lm_head", "action_embedding"]
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=kept,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
    )


def placed(backbone: EmuForCausalLM, device: torch.device | str) -> EmuForCausalLM:
    """On the device, unless loading has already put it somewhere."""
    return backbone if getattr(backbone, "hf_device_map", None) else backbone.to(device)


@contextmanager
def explaining_memory(checkpoint: str | Path) -> Iterator[None]:
    """Turn a device's running out of memory into advice.

    Raises:
        ValueError: if it does.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the device's memory is full; `emu-embodied doctor --checkpoint {checkpoint}` says what fits "
            "(--quantize, --device spread, --offload)"
        ) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers from drawing bars, and tables of weights that are new on purpose, in the middle of our own."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
