"""Estimates of a training step's memory, operations and traffic, using tensors without data.

An estimate makes one pass over 32 images and one over 64, each in about a second. The passes
compute no values and need no GPU. The difference between them gives the cost per image, and the
rest is the fixed cost. If the micro-batch size is `auto`, a run starts with as many images as
should fit in memory according to the estimate. `main.py --plan` uses the estimate to predict memory
and speed.
"""

from __future__ import annotations

import copy
import itertools
import logging
import weakref
from typing import Any, NamedTuple

import torch
from composer.core import DataSpec
from composer.devices import Device
from composer.utils import dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from dataset.sampler import EpochSampler
from errors import ConfigError, ModelError, one_line
from networks.batch_norm import SyncBatchNorm2d
from training.config_checks import per_process
from training.precision import Precision, compiles
from training.schema import Config

log = logging.getLogger(__name__)

GIB = 2**30
# Estimated memory of the CUDA context and of cuDNN's and cuBLAS's workspaces, in bytes.
CONTEXT = 1.2 * GIB
AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
# Batch sizes of the two trial passes. They are large enough for the saved activations to dominate
# the peak memory.
FEW_AND_MORE = 32, 64
# Safety margin for fragmentation and uncounted memory, as a fraction of a step's memory.
MARGIN = 0.05
# Bytes per input pixel that the trial passes miss. Composer keeps a second copy of the fp32 image
# and of the int64 target, but the passes count only one image.
INPUT = 2 * (3 * 4 + 8) - 3 * 4


class Footprint(NamedTuple):
    """The costs of a training step, with memory and traffic in bytes.

    Args:
        weights: Size of the parameters.
        buffers: Size of the buffers, such as BatchNorm statistics.
        fixed: Memory of a pass that does not depend on the number of images, such as cast weights.
        image: Memory per image in a pass.
        saved: Part of `image` that is stored for the backward pass.
        operations: Floating-point operations per image, forward and backward, in the layers whose
            operations torch can count, such as convolutions.
        traffic: Memory traffic per image of all other operations, forward and backward.
        normalised: Total input size of the normalisation layers per image.
        norms: Number of BatchNorm layers.
        fewest: Smallest number of images that the network can train on at once.
    """

    weights: int
    buffers: int
    fixed: int
    image: float
    saved: float
    operations: float
    traffic: float
    normalised: float
    norms: int
    fewest: int = 2

    def step(self, images: int, config: Config, ranks: int = 1) -> float:
        """Return the peak memory of a step with this micro-batch size, without the CUDA context."""
        recipe = config.recipe
        average, climb = recipe.ema is not None, recipe.sam is not None
        # The gradients, each optimizer moment, the EMA average, SAM's saved weights and DDP's
        # buckets each take as much memory as the weights.
        copies = 2 + _moments(config) + average + climb + (ranks > 1)
        standing = self.weights * copies + self.buffers * (1 + average)
        image = self.image - (1 - config.activation_memory_budget) * self.saved
        return (self.fixed + standing + images * image) * (1 + MARGIN)

    def checkpoint(self, config: Config) -> int:
        """Return a checkpoint's size in bytes, including optimizer moments and the EMA average."""
        average = config.recipe.ema is not None
        return self.weights * (1 + _moments(config) + average) + self.buffers * (1 + average)


def _moments(config: Config) -> int:
    return 2 if config.optimizer.name == "adamw" else 1


class _Counter(TorchDispatchMode):
    """A dispatch mode that counts the memory of live tensors, operations and memory traffic."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.operations = self.traffic = self.normalised = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_iter(result) if isinstance(t, Tensor)]
        known = {t.untyped_storage()._cdata for t in given}
        for tensor in made:
            self._keep(tensor.untyped_storage())
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        elif func._schema.is_mutable or not known >= {t.untyped_storage()._cdata for t in made}:
            self.traffic += sum(t.numel() * t.element_size() for t in given + made)
        if "_norm" in func.__name__ and "backward" not in func.__name__:
            self.normalised += given[0].numel() * given[0].element_size()
        return result

    def _keep(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._live.pop(key)


def count(
    network: nn.Module, size: int, dtype: torch.dtype | None, compiled: bool = False
) -> Footprint:
    """Estimate the costs of forward and backward passes over images of `size` x `size` pixels.

    Args:
        network: Network that is not compiled yet, on any device including "meta".
        size: Side of the images, in pixels.
        dtype: Data type for autocast, or None for fp32 without autocast.
        compiled: Whether the network will be compiled. In a compiled network, a synchronised
            BatchNorm needs no more memory than an ordinary BatchNorm, because its operations are
            fused into one kernel.

    Raises:
        ModelError: The network's operations depend on the values of its tensors.
    """
    try:
        with FakeTensorMode():
            empty = _without_data(network).train()
            if compiled:
                for module in empty.modules():
                    if isinstance(module, SyncBatchNorm2d):
                        module.__class__ = nn.BatchNorm2d  # pyrefly: ignore[bad-argument-type]
            for weight in empty.parameters():
                # Free each gradient, because `Footprint.step` counts all gradients separately.
                if weight.requires_grad:
                    weight.register_post_accumulate_grad_hook(_forget)
            few, more = (_pass(empty, size, images, dtype) for images in FEW_AND_MORE)
    except Exception as error:  # A user's network may raise any exception.
        raise ModelError(
            f"model.name: cannot estimate how much memory the network needs: {one_line(error)}"
        ) from error
    # The difference between the two passes gives the cost per image. The rest of the peak memory
    # does not depend on the number of images.
    each = {key: (more[key] - few[key]) / (FEW_AND_MORE[1] - FEW_AND_MORE[0]) for key in few}
    tensors = list(network.parameters()), list(network.buffers())
    weights, buffers = (sum(t.numel() * t.element_size() for t in group) for group in tensors)
    return Footprint(
        weights,
        buffers,
        fixed=round(few["peak"] - FEW_AND_MORE[0] * each["peak"]),
        image=each["peak"] + INPUT * size**2,
        saved=each["saved"],
        # For each matrix product in the forward pass, the backward pass computes two of the same
        # size.
        operations=3 * each["operations"],
        traffic=each["traffic"],
        normalised=each["normalised"],
        norms=sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()),
        fewest=1 if takes_one_image(network, size) else 2,
    )


def takes_one_image(network: nn.Module, size: int) -> bool:
    """Return whether a network can train on a single image, according to a trial without data.

    DeepLabV3 cannot train on a single image, because the BatchNorm after global pooling would see
    only one value per channel.
    """
    try:
        with FakeTensorMode():
            image = torch.empty(1, 3, size, size).contiguous(memory_format=torch.channels_last)
            _without_data(network).train()(image)
    except ValueError as error:
        return "more than 1 value per channel" not in str(error)
    # On any other error, assume that the network can train on a single image. If it cannot,
    # training reports the error.
    except Exception as error:
        log.info("cannot tell whether the network can train on a single image: %s", one_line(error))
    return True


def last_batch_of(spec: DataSpec, config: Config) -> int:
    """Return the size of a rank's last batch in an epoch if it is incomplete, otherwise 0."""
    sampler = getattr(spec.dataloader, "sampler", None)
    if config.train_dataset.drop_last or not isinstance(sampler, EpochSampler):
        return 0
    return len(sampler) % per_process(config.train_dataset)


def check_single_images(config: Config, network: nn.Module, data: DataSpec | None) -> None:
    """Reject micro-batches of one image if the network cannot train on a single image.

    Args:
        config: Config of the run.
        network: Network that is not compiled yet.
        data: Training data of the run, or None.

    Raises:
        ConfigError: A micro-batch would contain one image; the message names a value that works.
    """
    if data is None:
        return
    chosen, processes = config.device_train_microbatch_size, dist.get_world_size()
    batch, last_batch = per_process(config.train_dataset), last_batch_of(data, config)

    def leaves_one(micro: int | str | None) -> bool:
        for images in (batch, last_batch):
            size = min(micro, images) if isinstance(micro, int) else images
            if images and 1 in (size, images % size):
                return True
        return False

    if not leaves_one(chosen) or takes_one_image(network, config.train_dataset.final_size):
        return
    if batch == 1:
        key, value, use = "train_dataset.batch_size", str(processes), str(2 * processes)
    elif last_batch == 1:
        key, value, use = "train_dataset.drop_last", "false", "true"
    else:
        micro = next((size for size in range(2, batch + 1) if not leaves_one(size)), None)
        key, value = "device_train_microbatch_size", str(chosen)
        use = str(micro) if micro else "a different train_dataset.batch_size"
    raise ConfigError(
        f"{key}: {value} leaves a process with one image in a micro-batch, and "
        f"{config.model.name} cannot train on a single image; use {use}"
    )


def _without_data(network: nn.Module) -> nn.Module:
    """Copy a network to the CPU, without the values of its tensors."""
    empty: dict[int, Any] = {}
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        shell = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        is_weight = isinstance(tensor, nn.Parameter)
        empty[id(tensor)] = nn.Parameter(shell, tensor.requires_grad) if is_weight else shell
    return copy.deepcopy(network, empty)


def _forget(weight: Tensor) -> None:
    weight.grad = None


def _pass(
    network: nn.Module, size: int, images: int, dtype: torch.dtype | None
) -> dict[str, float]:
    """Measure the memory, operations and traffic of a forward and a backward pass."""
    with _Counter() as counter:
        batch = torch.empty(images, 3, size, size).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            outputs = [t for t in tree_iter(network(batch)) if isinstance(t, Tensor)]
        saved, operations = counter.now, counter.operations
        torch.stack([t.float().sum() for t in outputs if t.requires_grad]).sum().backward()
    return {
        "peak": counter.peak,
        "saved": saved,
        "operations": operations,
        "traffic": counter.traffic,
        "normalised": counter.normalised,
    }


def fitting(
    footprint: Footprint,
    config: Config,
    images: int,
    free: float,
    ranks: int = 1,
    adapts: bool = True,
) -> tuple[int, bool]:
    """Return a rank's micro-batch size, and whether a step fits in memory.

    With `auto`, the size is halved until a step fits.

    Args:
        footprint: Estimated costs of a training step.
        config: Config of the run.
        images: Number of images per rank in a batch.
        free: Memory available for a step, in bytes.
        ranks: Number of ranks.
        adapts: Whether `auto` may halve the size. On a CPU, `auto` uses the complete batch.
    """
    chosen = config.device_train_microbatch_size
    adapts &= chosen == "auto"
    least = 1 if ranks > 1 and config.model.sync_bn else footprint.fewest
    at_once = min(chosen, images) if isinstance(chosen, int) else images
    while footprint.step(at_once, config, ranks) > free:
        if not adapts or at_once // 2 < least:
            return at_once, False
        at_once //= 2
    return at_once, True


def free_memory(device: Device) -> float:
    """Return the free GPU memory in bytes on the rank that has the least.

    If a single GPU ran out of memory, the run would fail, because the other ranks wait for it in a
    collective operation.
    """
    free = torch.tensor([torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()])
    if dist.get_world_size() > 1:
        free = device.tensor_to_device(free)
        dist.all_reduce(free, "MIN")
    return float(free.item())


def choose_microbatch(
    config: Config, network: nn.Module, precision: Precision, device: Device
) -> tuple[int | str, int | None]:
    """Choose the number of images that a rank processes at once.

    Args:
        config: Config of the run.
        network: Network that is not compiled yet.
        precision: Precision of the run.
        device: Device of this rank.

    Returns:
        The value for Composer's `device_train_microbatch_size`, and the first size to try if this
        value is `auto` on a GPU. A good first size avoids compiling the network for sizes that do
        not fit.
    """
    chosen, share = config.device_train_microbatch_size, per_process(config.train_dataset)
    if chosen is None or (chosen == "auto" and not torch.cuda.is_available()):
        return share, None
    if chosen != "auto" or not config.is_train:
        return chosen, None
    # Estimate the number of images that fit in GPU memory.
    size, dtype = config.train_dataset.final_size, AUTOCAST.get(precision.composer)
    try:
        footprint = count(network, size, dtype, compiles(config))
    except ModelError as error:
        log.info("auto starts with the complete batch: %s", error)
        return chosen, share
    free, ranks = free_memory(device) - CONTEXT, dist.get_world_size()
    return chosen, fitting(footprint, config, share, free, ranks)[0]
