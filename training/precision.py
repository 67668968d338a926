"""What a run computes in, and whether it compiles, as its config and this machine have it."""

from __future__ import annotations

import re

import torch

from errors import ConfigError
from training.config import Config


def choose_precision(name: str) -> tuple[str, torch.dtype | None]:
    """Choose Composer's precision, and the CPU autocast dtype (Composer has no CPU autocast).

    Raises:
        ConfigError: This machine does not compute in that precision.
    """
    if torch.cuda.is_available():
        if name == "auto":
            # Not emulated: a V100 or T4 takes bf16 only slowly.
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            name = "amp_bf16" if native else "amp_fp16"
        return name, None
    if name == "amp_fp16":
        raise ConfigError("precision: amp_fp16 needs a GPU; use auto, fp32 or amp_bf16 here")
    if name == "auto":
        name = "amp_bf16" if _cpu_has_bf16() else "fp32"
    return "fp32", torch.bfloat16 if name == "amp_bf16" else None


def compiles(config: Config) -> bool:
    """Return whether a run compiles the model here."""
    return config.compile is True or (config.compile == "auto" and torch.cuda.is_available())


def _cpu_has_bf16() -> bool:
    """Return whether this CPU multiplies bf16 numbers itself (x86 and Arm Linux name it alike)."""
    try:
        with open("/proc/cpuinfo") as file:
            return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", file.read()) is not None
    except OSError:
        return False
