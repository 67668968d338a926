"""What a training step takes, counted on tensors without data: memory, operations, bytes moved.

Nothing is computed and no GPU is asked: a pass over 32 and one over 64 images, a second each, say
what the weights take and what an image takes. `auto` begins with as many images as fit by that, and
`main.py --plan` tells a run's memory and speed from it.
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
CONTEXT = 1.2 * GIB  # CUDA's context, cuDNN's and cuBLAS's workspaces: an assumption
AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
# Images of the two passes; so many that the peak is where all that is kept for the way back is.
FEW_AND_MORE = 32, 64
MARGIN = 0.05  # of what a step takes: fragments, and what a count leaves out
# A pixel of an image: fp32 and int64 on the way in, and the copy that Composer keeps of both; the
# photo that the pass counts itself is taken off.
INPUT = 2 * (3 * 4 + 8) - 3 * 4


class Footprint(NamedTuple):
    """What a step takes; memory and traffic in bytes.

    Args:
        weights: The parameters.
        buffers: BatchNorm's statistics.
        fixed: What a pass takes besides, however many images: weights in its type.
        image: What each image of a pass takes.
        saved: Of that, what a pass keeps for the way back.
        operations: Floating-point operations of an image's convolutions, there and back.
        traffic: An image's numbers that go to memory and back between convolutions, there and back.
        normalised: An image's bytes that normalising layers read.
        norms: How many BatchNorms there are.
        fewest: How few images the network can train on at once.
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
        """Memory of a step that takes so many images at once, of a GPU's context aside."""
        recipe = config.recipe
        average, climb = recipe.ema is not None, recipe.sam is not None
        # Weights, gradients, moments, the average, SAM's way back, DDP's buckets.
        copies = 2 + _moments(config) + average + climb + (ranks > 1)
        standing = self.weights * copies + self.buffers * (1 + average)
        image = self.image - (1 - config.activation_memory_budget) * self.saved
        return (self.fixed + standing + images * image) * (1 + MARGIN)

    def checkpoint(self, config: Config) -> int:
        """Bytes of a checkpoint: weights, moments and the average."""
        average = config.recipe.ema is not None
        return self.weights * (1 + _moments(config) + average) + self.buffers * (1 + average)


def _moments(config: Config) -> int:
    return 2 if config.optimizer.name == "adamw" else 1


class _Counter(TorchDispatchMode):
    """Counts the bytes of the tensors that are made and still there, and what operations do."""

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
    """Count what passes of a network over images of `size` pixels take.

    Args:
        network: Not compiled yet; on any device, "meta" too.
        size: The images' side.
        dtype: What it computes in under autocast; None for fp32.
        compiled: Whether it will be compiled; a synchronised BatchNorm then takes no more than
            another, since its parts are one kernel.

    Raises:
        ModelError: What the network does depends on its numbers.
    """
    with FakeTensorMode(), _told_of_failure():
        empty = _without_data(network).train()
        if compiled:
            for module in empty.modules():
                if isinstance(module, SyncBatchNorm2d):
                    module.__class__ = nn.BatchNorm2d  # pyright: ignore[reportAttributeAccessIssue]
        for weight in empty.parameters():  # gradients are counted with the weights
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(_forget)
        few, more = (_pass(empty, size, images, dtype) for images in FEW_AND_MORE)
    # What grows with the images, an image's; and of the peak what does not.
    each = {key: (more[key] - few[key]) / (FEW_AND_MORE[1] - FEW_AND_MORE[0]) for key in few}
    tensors = list(network.parameters()), list(network.buffers())
    weights, buffers = (sum(t.numel() * t.element_size() for t in group) for group in tensors)
    return Footprint(
        weights,
        buffers,
        fixed=round(few["peak"] - FEW_AND_MORE[0] * each["peak"]),
        image=each["peak"] + INPUT * size**2,
        saved=each["saved"],
        operations=3 * each["operations"],  # each product has two of its size on the way back
        traffic=each["traffic"],
        normalised=each["normalised"],
        norms=sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()),
        fewest=1 if takes_one_image(network, size) else 2,
    )


def takes_one_image(network: nn.Module, size: int) -> bool:
    """Whether a network can train on one image of `size` pixels, found by trying it without data.

    DeepLabV3's BatchNorm after global pooling cannot: it would normalise a single value.
    """
    try:
        with FakeTensorMode():
            image = torch.empty(1, 3, size, size).contiguous(memory_format=torch.channels_last)
            _without_data(network).train()(image)
    except ValueError as error:
        return "more than 1 value per channel" not in str(error)
    except Exception as error:  # a network that cannot be tried without data: training will tell
        log.info("not known whether one image can be trained on alone: %s", one_line(error))
    return True


def last_batch_of(spec: DataSpec, config: Config) -> int:
    """Return the images of this process in an epoch's last batch; 0 if it is as large as others."""
    sampler = getattr(spec.dataloader, "sampler", None)
    if config.train_dataset.drop_last or not isinstance(sampler, EpochSampler):
        return 0
    return len(sampler) % (config.train_dataset.batch_size // dist.get_world_size())


def check_single_images(config: Config, network: nn.Module, data: DataSpec | None) -> None:
    """Refuse micro-batches of one image, if the network cannot train on them.

    Args:
        config: The run's.
        network: The run's, not compiled yet.
        data: The run's training data, or None.

    Raises:
        ConfigError: Names the key, and a value that works.
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
        f"{key}: {value} leaves one image alone in a process's batch, and {config.model.name} "
        f"cannot train on one image; use {use}"
    )


@contextlib.contextmanager
def _told_of_failure() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a network of one's own may do anything
        raise ModelError(
            f"model.name: cannot be counted without data: {one_line(error)}"
        ) from error


def _without_data(network: nn.Module) -> nn.Module:
    """Copy a network, but for the contents of its tensors; they are a CPU's, which all have."""
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
    """Count a forward and backward pass over so many images."""
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
    """Return how many of its images a process takes at once, and whether they fit.

    With `auto` they are all, half, a quarter, ..., whichever fits first.

    Args:
        footprint: Of the network.
        config: The run's.
        images: A process's share of a batch.
        free: Bytes that it has for a step.
        ranks: How many processes there are.
        adapts: Whether `auto` does so; on a CPU it is the whole batch.
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
    """Bytes of its GPU that a process can have; the fewest of all processes'.

    Out of memory on one GPU alone, while the others wait for it in a collective, ends the run.
    """
    free = torch.tensor([torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()])
    if dist.get_world_size() > 1:
        free = device.tensor_to_device(free)
        dist.all_reduce(free, "MIN")
    return float(free.item())


def choose_microbatch(
    config: Config, network: nn.Module, precision: Precision, device: Device
) -> tuple[int | str, int | None]:
    """Choose how many images a process takes at once, of its share of a batch.

    Args:
        config: The run's.
        network: The run's, not compiled yet.
        precision: The run's.
        device: What the process computes on.

    Returns:
        Composer's `device_train_microbatch_size`, and with `auto` on a GPU how many images to begin
        with: starting near the largest that fit saves compiling for those that do not.
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
    """Return how many of a GPU's images fit into its memory, by an estimate."""
    size, dtype = config.train_dataset.final_size, AUTOCAST.get(precision)
    try:
        footprint = count(network, size, dtype, compiles(config))
    except ModelError as error:
        log.info("auto begins with the whole batch: %s", error)
        return images
    free, ranks = free_memory(device) - CONTEXT, dist.get_world_size()
    return fitting(footprint, config, images, free, ranks)[0]
