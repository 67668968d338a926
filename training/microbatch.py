"""The memory, operations and traffic of a training step, counted on tensors without data.

The count runs one pass over 32 images and one over 64, about a second each. It computes no values
and needs no GPU. The difference tells the cost of an image, and the rest is the fixed cost. With
`auto`, a run begins with as many images as fit by this count. `main.py --plan` predicts memory and
speed from it.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import weakref
from collections.abc import Iterator
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
CONTEXT = 1.2 * GIB  # An assumed size of the CUDA context and the workspaces of cuDNN and cuBLAS.
AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
# Batch sizes of the two passes. They are large enough for the saved activations to set the peak.
FEW_AND_MORE = 32, 64
MARGIN = 0.05  # Allowance for fragmentation and uncounted memory, as a fraction of a step.
# Bytes of an input pixel: fp32 image and int64 target, twice because Composer keeps a copy of both.
# The pass itself counts one fp32 image, which is subtracted.
INPUT = 2 * (3 * 4 + 8) - 3 * 4


class Footprint(NamedTuple):
    """The costs of a training step; memory and traffic are in bytes.

    Args:
        weights: Size of the parameters.
        buffers: Size of the BatchNorm statistics.
        fixed: Memory of a pass that does not depend on the number of images, such as cast weights.
        image: Memory of a pass for each image.
        saved: Part of `image` that is kept for the backward pass.
        operations: Floating-point operations of the convolutions for each image, forward and
            backward.
        traffic: Memory traffic between convolutions for each image, forward and backward.
        normalised: Input size of the normalisation layers for each image.
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
        """Return the peak memory of a step with this micro-batch, without the CUDA context."""
        recipe = config.recipe
        average, climb = recipe.ema is not None, recipe.sam is not None
        # Copies of the weights: the weights themselves, gradients, optimizer moments, EMA, SAM's
        # saved weights, and DDP's buckets.
        copies = 2 + _moments(config) + average + climb + (ranks > 1)
        standing = self.weights * copies + self.buffers * (1 + average)
        image = self.image - (1 - config.activation_memory_budget) * self.saved
        return (self.fixed + standing + images * image) * (1 + MARGIN)

    def checkpoint(self, config: Config) -> int:
        """Return the size of a checkpoint in bytes: weights, optimizer moments and average."""
        average = config.recipe.ema is not None
        return self.weights * (1 + _moments(config) + average) + self.buffers * (1 + average)


def _moments(config: Config) -> int:
    return 2 if config.optimizer.name == "adamw" else 1


class _Counter(TorchDispatchMode):
    """A dispatch mode that counts live tensor bytes, their peak, and the work of each operation."""

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
    """Count the costs of forward and backward passes over images of `size` x `size` pixels.

    Args:
        network: Network that is not compiled yet, on any device including "meta".
        size: Side of the images, pixels.
        dtype: Type of the computation under autocast; None: fp32.
        compiled: Whether the network will be compiled. A synchronised BatchNorm then takes no more
            memory than an ordinary one, because its operations are fused into one kernel.

    Raises:
        ModelError: The network's operations depend on the values of its tensors.
    """
    with FakeTensorMode(), _told_of_failure():
        empty = _without_data(network).train()
        if compiled:
            for module in empty.modules():
                if isinstance(module, SyncBatchNorm2d):
                    module.__class__ = nn.BatchNorm2d  # pyright: ignore[reportAttributeAccessIssue]
        for weight in empty.parameters():  # Gradients are counted with the weights.
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(_forget)
        few, more = (_pass(empty, size, images, dtype) for images in FEW_AND_MORE)
    # The differences give the cost of an image; the rest of the peak is the fixed cost.
    each = {key: (more[key] - few[key]) / (FEW_AND_MORE[1] - FEW_AND_MORE[0]) for key in few}
    tensors = list(network.parameters()), list(network.buffers())
    weights, buffers = (sum(t.numel() * t.element_size() for t in group) for group in tensors)
    return Footprint(
        weights,
        buffers,
        fixed=round(few["peak"] - FEW_AND_MORE[0] * each["peak"]),
        image=each["peak"] + INPUT * size**2,
        saved=each["saved"],
        # The backward pass has two products of the same size for each product.
        operations=3 * each["operations"],
        traffic=each["traffic"],
        normalised=each["normalised"],
        norms=sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()),
        fewest=1 if takes_one_image(network, size) else 2,
    )


def takes_one_image(network: nn.Module, size: int) -> bool:
    """Return whether a network can train on one image, found by a trial without data.

    DeepLabV3 cannot: after global pooling, its BatchNorm would normalise a single value.
    """
    try:
        with FakeTensorMode():
            image = torch.empty(1, 3, size, size).contiguous(memory_format=torch.channels_last)
            _without_data(network).train()(image)
    except ValueError as error:
        return "more than 1 value per channel" not in str(error)
    # If the trial without data fails, training itself will show whether one image works.
    except Exception as error:
        log.info("cannot tell whether the network can train on a single image: %s", one_line(error))
    return True


def last_batch_of(spec: DataSpec, config: Config) -> int:
    """Return the size of a rank's last batch in an epoch, or 0 if that batch is full."""
    sampler = getattr(spec.dataloader, "sampler", None)
    if config.train_dataset.drop_last or not isinstance(sampler, EpochSampler):
        return 0
    return len(sampler) % (config.train_dataset.batch_size // dist.get_world_size())


def check_single_images(config: Config, network: nn.Module, data: DataSpec | None) -> None:
    """Refuse micro-batches of one image if the network cannot train on them.

    Args:
        config: Config of the run.
        network: Network that is not compiled yet.
        data: Training data of the run, or None.

    Raises:
        ConfigError: A micro-batch would hold one image; the message names a value that works.
    """
    if data is None:
        return
    last_batch = last_batch_of(data, config)
    chosen, size = config.device_train_microbatch_size, config.train_dataset.final_size
    processes = dist.get_world_size()
    batch = config.train_dataset.batch_size // processes

    def leaves_one(micro: int | str | None, images: int) -> bool:
        micro = min(micro, images) if isinstance(micro, int) else images
        return 1 in (micro, images % micro) if images else False

    def works(micro: int) -> bool:
        return not (leaves_one(micro, batch) or leaves_one(micro, last_batch))

    if not (leaves_one(chosen, batch) or leaves_one(chosen, last_batch)):
        return
    if takes_one_image(network, size):
        return
    if batch == 1:
        key, value, use = "train_dataset.batch_size", str(processes), str(2 * processes)
    elif last_batch == 1:
        key, value, use = "train_dataset.drop_last", "false", "true"
    else:
        micro = next(filter(works, range(2, batch + 1)), None)
        key, value = "device_train_microbatch_size", str(chosen)
        use = str(micro) if micro else "another train_dataset.batch_size"
    raise ConfigError(
        f"{key}: {value} leaves a process with one image in a micro-batch, and "
        f"{config.model.name} cannot train on a single image; use {use}"
    )


@contextlib.contextmanager
def _told_of_failure() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # A user's network may raise anything.
        raise ModelError(
            f"model.name: the network cannot run without data: {one_line(error)}"
        ) from error


def _without_data(network: nn.Module) -> nn.Module:
    """Copy a network to the CPU without the contents of its tensors."""
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
    """Count a forward and a backward pass over this number of images."""
    with _Counter() as counter:
        photo = torch.empty(images, 3, size, size).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            outputs = [t for t in tree_iter(network(photo)) if isinstance(t, Tensor)]
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
    """Return the micro-batch size of a rank, and whether it fits in memory.

    With `auto`, the size is halved until it fits.

    Args:
        footprint: Costs of the network.
        config: Config of the run.
        images: Number of images of a rank in a batch.
        free: Memory available for a step, bytes.
        ranks: Number of ranks.
        adapts: Whether `auto` may halve the size. On a CPU, `auto` takes the whole batch.
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
    """Return the GPU memory in bytes that every rank can use: the minimum over all ranks.

    If a single GPU ran out of memory while the others waited in a collective, the run would end.
    """
    free = torch.tensor([torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()])
    if dist.get_world_size() > 1:
        free = device.tensor_to_device(free)
        dist.all_reduce(free, "MIN")
    return float(free.item())


def choose_microbatch(
    config: Config, network: nn.Module, precision: Precision, device: Device
) -> tuple[int | str, int | None]:
    """Choose the number of images that a rank computes at once.

    Args:
        config: Config of the run.
        network: Network that is not compiled yet.
        precision: Precision of the run.
        device: Device of this rank.

    Returns:
        Composer's `device_train_microbatch_size`, and with `auto` on a GPU the first size to try. A
            first size near the largest that fits saves compilations of sizes that do not fit.
    """
    chosen, share = config.device_train_microbatch_size, per_process(config.train_dataset)
    if chosen is None or (chosen == "auto" and not torch.cuda.is_available()):
        return share, None
    if chosen != "auto" or not config.is_train:
        return chosen, None
    return chosen, _first_microbatch(network, config, precision.composer, share, device)


def _first_microbatch(
    network: nn.Module, config: Config, precision: str, images: int, device: Device
) -> int:
    """Estimate the number of images that fit in the memory of a GPU."""
    size, dtype = config.train_dataset.final_size, AUTOCAST.get(precision)
    try:
        footprint = count(network, size, dtype, compiles(config))
    except ModelError as error:
        log.info("auto begins with the whole batch: %s", error)
        return images
    free, ranks = free_memory(device) - CONTEXT, dist.get_world_size()
    return fitting(footprint, config, images, free, ranks)[0]
