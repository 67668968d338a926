"""Estimates of a run's speed and memory on the GPUs of another machine.

The estimates are rough, and `assumed` lists their assumptions. The time of a step has three parts:
convolutions at a fraction of the GPU's peak rate, other operations at a fraction of its memory
bandwidth, and waiting time.
"""

from __future__ import annotations

from typing import NamedTuple

from training.microbatch import CONTEXT, GIB, MARGIN, Footprint, fitting
from training.schema import Config

# Training steps reach these fractions of the compute rate and bandwidth given in a GPU's data
# sheet.
ARITHMETIC, BANDWIDTH = 0.55, 0.80
# A compiled network reads or writes the input of each BatchNorm ten times: three times in the
# forward pass (once for the statistics and twice to normalise), and seven times in the backward
# pass (for two sums, the gradient, ReLU and the residual connection).
PASSES = 10
# In each step, the GPU waits this many seconds for Composer's work on the CPU.
HOST = 8e-3
# Seconds for a small all-reduce. A synchronised BatchNorm needs two of them per pass.
COLLECTIVE = 30e-6
# Bandwidth between a GPU and other nodes, in bytes per second.
BETWEEN_NODES = 25e9
# Number of GPUs in a node.
NODE = 8


class GPU(NamedTuple):
    """The values in the data sheet of a GPU.

    Attributes:
        memory: GPU memory that CUDA reports, in GiB.
        half: Dense operations per second in bf16 or fp16.
        single: Dense operations per second in fp32, or TF32 if the GPU has it.
        bandwidth: Memory bandwidth in bytes per second.
        link: Bandwidth of an all-reduce within a node in bytes per second.
    """

    memory: float
    half: float
    single: float
    bandwidth: float
    link: float


GPUS = {
    "T4": GPU(14.6, 65e12, 8.1e12, 320e9, 10e9),
    "V100": GPU(31.7, 125e12, 15.7e12, 900e9, 120e9),
    "A10": GPU(22.1, 125e12, 62.5e12, 600e9, 10e9),
    "A10G": GPU(22.1, 70e12, 35e12, 600e9, 10e9),
    "L4": GPU(22.0, 121e12, 60e12, 300e9, 10e9),
    "L40S": GPU(44.4, 362e12, 183e12, 864e9, 20e9),
    "RTX3090": GPU(23.7, 71e12, 35.6e12, 936e9, 10e9),
    "RTX4090": GPU(23.6, 165e12, 82.6e12, 1008e9, 10e9),
    "RTX5090": GPU(31.4, 209e12, 104e12, 1792e9, 20e9),
    "A100-40GB": GPU(39.4, 312e12, 156e12, 1555e9, 230e9),
    "A100": GPU(79.2, 312e12, 156e12, 2039e9, 230e9),
    "H100": GPU(79.2, 989e12, 494e12, 3350e9, 350e9),
    "H200": GPU(139.8, 989e12, 494e12, 4800e9, 350e9),
    "B200": GPU(178.0, 2250e12, 1125e12, 7700e9, 700e9),
}
NO_BF16 = ("T4", "V100")


class Estimate(NamedTuple):
    """The estimated time and memory of a run, per GPU.

    Attributes:
        at_once: Micro-batch size in images.
        fits: Whether a step fits in the GPU memory.
        memory: GPU memory that a step needs, in bytes.
        free: Free GPU memory in bytes.
        step: Seconds per step, averaged over all steps of the recipe.
        fastest: Seconds per step if the GPU reached the values on its data sheet.
        evaluation: Evaluation speed of one GPU, in images per second.
    """

    at_once: int
    fits: bool
    memory: float
    free: float
    step: float
    fastest: float
    evaluation: float


def estimate(
    footprint: Footprint,
    config: Config,
    name: str,
    gpus: int,
    passes: float,
    precision: str,
    compiled: bool,
) -> Estimate:
    """Estimate the time and memory that a run needs.

    Args:
        footprint: Operation and memory counts of the network in the run's data type.
        config: Config of the run.
        name: Name of a GPU in `GPUS`.
        gpus: Number of GPUs.
        passes: Average number of forward-backward passes per step of the recipe.
        precision: Precision of the run in Composer's notation.
        compiled: Whether the run compiles its network.
    """
    gpu = GPUS[name]
    images = config.train_dataset.batch_size // gpus
    free = gpu.memory * GIB - CONTEXT
    at_once, fits = fitting(footprint, config, images, free, gpus)
    rate = gpu.single if precision == "fp32" else gpu.half
    moved = footprint.traffic
    if compiled:
        moved = max(PASSES * footprint.normalised, moved / 2)
    kept = config.activation_memory_budget
    # Activations that are not kept are computed again. This repeats at most half of the forward
    # pass, or a sixth of the work of a step.
    again = 1 + (1 - kept) / 6
    arithmetic, traffic = footprint.operations / rate, again * moved / gpu.bandwidth
    image = arithmetic / ARITHMETIC + traffic / BANDWIDTH
    parts = -(-images // at_once)
    waits = HOST
    if gpus > 1:
        if config.model.sync_bn:
            waits += passes * parts * 2 * footprint.norms * COLLECTIVE
        link = gpu.link if gpus <= NODE else min(gpu.link, BETWEEN_NODES)
        reduce = 2 * (gpus - 1) / gpus * footprint.weights / link
        # The all-reduce overlaps with part of the backward pass.
        waits += max(0.0, reduce - images * image / 2)
    # The optimizer reads weights, gradients and momentum, and writes weights and momentum.
    update = 5 * footprint.weights / gpu.bandwidth / BANDWIDTH
    return Estimate(
        at_once,
        fits,
        footprint.step(at_once, config, gpus),
        free,
        step=passes * images * image + update + waits,
        fastest=passes * images * (arithmetic + traffic),
        evaluation=3 / image,
    )


def assumed(name: str, compiled: bool) -> list[str]:
    """Return the assumptions of an estimate, one per line.

    Args:
        name: Name of a GPU in `GPUS`.
        compiled: Whether the run compiles its network.
    """
    gpu = GPUS[name]
    moved = (
        f"{PASSES} times the inputs of BatchNorms, or at least half of all operands and results"
        if compiled
        else "all operands and results"
    )
    return [
        f"{name}: {gpu.half / 1e12:.0f} TFLOP/s in bf16 or fp16, {gpu.single / 1e12:.0f} in fp32, "
        f"{gpu.bandwidth / 1e9:.0f} GB/s, {gpu.memory:.1f} GiB (data sheet)",
        f"convolutions reach {ARITHMETIC:.0%} of these rates, memory {BANDWIDTH:.0%}; "
        f"bytes moved: {moved}",
        f"the host takes {1e3 * HOST:.0f} ms per step, a small all-reduce "
        f"{1e6 * COLLECTIVE:.0f} us; gradients are sent during the backward pass at "
        f"{gpu.link / 1e9:.0f} GB/s; a node has {NODE} GPUs, and nodes exchange "
        f"{BETWEEN_NODES / 1e9:.0f} GB/s",
        f"memory: the counted bytes, {MARGIN:.0%} for fragmentation, {CONTEXT / GIB:.1f} GiB for "
        "CUDA and cuDNN",
        "not included: the loader on that machine, start and compilation, network storage",
    ]
