"""Functions that choose the numeric precision for this machine, and whether to compile."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.version
from composer.core import State
from composer.utils import dist
from torch import nn
from torch._functorch import config as functorch

from errors import ConfigError
from training.schema import Config


def check_kernels() -> None:
    """Reject GPUs that torch has no kernels for, because the first training step would fail.

    Raises:
        ConfigError: torch has no kernels for this GPU; the message names a suitable torch version.
    """
    if not torch.cuda.is_available() or torch.version.hip:
        return
    built = torch.cuda.get_arch_list()
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if any(_runs(capability, name) for name in built):
            continue
        older = all(capability < _capability(name) for name in built)
        remedy = "torch 2.15.0 or newer, built for CUDA 13: make install"
        if older:
            remedy = "torch 2.7.0, which supports 5.0 and later: make install TORCH=2.7.0"
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, but torch {torch.__version__} has no kernels for it "
            f"(only for {', '.join(built)}); install {remedy}"
        )


def _runs(capability: tuple[int, int], name: str) -> bool:
    """Return whether a GPU can run code that was compiled for an architecture.

    Kernels for `sm_80` run on compute capability 8.0 and later 8.x versions. Code for `compute_80`
    runs on 8.0 and all later versions, because the driver compiles it. Kernels for `sm_90a` run
    only on compute capability 9.0.
    """
    made_for = _capability(name)
    if name.startswith("compute_"):
        return made_for <= capability
    if name.endswith("a"):
        return made_for == capability
    return made_for[0] == capability[0] and made_for[1] <= capability[1]


def _capability(name: str) -> tuple[int, int]:
    """Return the compute capability for an architecture name; for example, `sm_103` is (10, 3)."""
    digits = re.sub(r"\D", "", name)
    return int(digits[:-1]), int(digits[-1])


class Precision(NamedTuple):
    """The numeric precision of a run.

    Args:
        composer: Composer's name for the precision on a GPU.
        cpu_autocast: Data type for autocast on a CPU, or None for no autocast. Composer itself
            offers no autocast on a CPU.
    """

    composer: str
    cpu_autocast: torch.dtype | None = None

    @property
    def name(self) -> str:
        """The name of the precision, as written in the YAML."""
        return self.composer if self.cpu_autocast is None else "amp_bf16"


def choose_precision(name: str) -> Precision:
    """Choose the precision of a run on this machine.

    Args:
        name: Value of `precision` in the YAML.

    Raises:
        ConfigError: This machine does not support the precision.
    """
    if torch.cuda.is_available():
        if name == "auto":
            # A V100 or T4 can only emulate bf16, which is slow, so use fp16 on these GPUs.
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            name = "amp_bf16" if native else "amp_fp16"
        return Precision(name)
    if name == "amp_fp16":
        raise ConfigError("precision: amp_fp16 needs a GPU; use auto, fp32 or amp_bf16 here")
    if name == "auto":
        name = "amp_bf16" if _cpu_has_bf16() else "fp32"
    return Precision("fp32", torch.bfloat16 if name == "amp_bf16" else None)


def compiles(config: Config) -> bool:
    """Return whether a run compiles its model; `auto` requires a GPU and build tools."""
    if config.compile != "auto":
        return config.compile is True
    if not torch.cuda.is_available():
        return False
    from segmentation.build_tools import missing_build_tools

    return missing_build_tools(gpu=True) is None


def compile_if_wanted(config: Config, network: nn.Module, transforms: Iterable[Any]) -> None:
    """If the run compiles, mark its network and transforms for compilation at their first call."""
    if not compiles(config):
        return
    functorch.activation_memory_budget = config.activation_memory_budget
    # Do not use Composer's compile option, which compiles DDP's forward pass but not the
    # evaluation.
    network.compile(dynamic=False)
    for transform in transforms:
        transform.compile()


def stop_broadcasts(config: Config, state: State) -> None:
    """On a single node, stop DDP from broadcasting BatchNorm statistics before each forward pass.

    The broadcasts are not needed, because SyncBatchNorm keeps the statistics of a node's ranks
    equal.
    """
    is_one_node = dist.get_world_size() == dist.get_local_world_size() > 1
    if config.model.name == "deeplabv3" and config.model.sync_bn and is_one_node:
        cast(Any, state.model).broadcast_buffers = False


def check_build_tools(config: Config) -> str | None:
    """Check whether this machine has the build tools that the config needs.

    Returns:
        A one-line warning about features that are turned off because a tool is missing, or None.

    Raises:
        ConfigError: The config sets `compile: true`, but a tool is missing.
    """
    gpu = torch.cuda.is_available()
    if not gpu and config.compile is not True:
        return None
    from segmentation.build_tools import missing_build_tools

    missing = missing_build_tools(gpu)
    if not missing:
        return None
    if config.compile is True:
        raise ConfigError(
            f"compile: compile=true works only with {missing}; otherwise, set compile=false"
        )
    kernels = "computes its loss in PyTorch instead of Triton"
    what = f"is not compiled, and {kernels}" if config.compile == "auto" else kernels
    setting = str(config.compile).lower()
    return f"compile: {setting}: this run {what}, because this machine lacks {missing}"


def devices(ranks: int) -> str:
    """Describe the devices of a run, such as `8 x NVIDIA H100` or `CPU, 2 threads`."""
    threads = torch.get_num_threads()
    name = "CPU, 1 thread" if threads == 1 else f"CPU, {threads} threads"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return f"{ranks} x {name}" if ranks > 1 else name


def _cpu_has_bf16() -> bool:
    """Return whether this CPU has bf16 instructions, according to /proc/cpuinfo."""
    try:
        with open("/proc/cpuinfo") as file:
            return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", file.read()) is not None
    except OSError:
        return False
