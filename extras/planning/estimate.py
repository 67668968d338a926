"""How fast a run would be on GPUs that are not here, from what its network's passes take.

A rough count, whose assumptions `assumed` names: a step is its convolutions at a share of the GPU's
peak, then what lies between them at a share of its bandwidth, then what is waited for.
"""

from __future__ import annotations

from typing import NamedTuple

from training.microbatch import CONTEXT, GIB, MARGIN, Footprint, fitting
from training.schema import Config

# Of what a data sheet promises.
ARITHMETIC, BANDWIDTH = 0.55, 0.80
# Compiled, the numbers that a BatchNorm reads come and go three times on the way there (statistics;
# normalise and write) and seven times on the way back (two sums; the gradient; ReLU's and the
# residual's share).
PASSES = 10
HOST = 8e-3  # seconds a step that the GPU waits for Composer
COLLECTIVE = 30e-6  # seconds of a small all-reduce, of which a synchronised BatchNorm has two
BETWEEN_NODES = 25e9  # bytes a second of a GPU
NODE = 8  # GPUs


class GPU(NamedTuple):
    """A data sheet: memory (GiB that CUDA reports), dense operations/s, bytes/s."""

    memory: float
    half: float  # bf16 or fp16
    single: float  # fp32, TF32 where there is
    bandwidth: float
    link: float  # of an all-reduce within a node


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
    """Of one GPU among all."""

    at_once: int  # images
    fits: bool
    memory: float  # of a step, bytes
    free: float  # of a GPU
    step: float  # seconds of a step, mean over the recipe
    fastest: float  # the same if the GPU kept what its data sheet promises
    evaluation: float  # images a second of a GPU


def estimate(
    footprint: Footprint,
    config: Config,
    name: str,
    gpus: int,
    passes: float,
    precision: str,
    compiled: bool,
) -> Estimate:
    """Estimate a run.

    Args:
        footprint: Counted in the type that the run computes in.
        config: The run's.
        name: Of `GPUS`.
        gpus: How many.
        passes: Forward and backward passes of a step, mean over the recipe.
        precision: What the run computes in, as Composer names it.
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
    again = 1 + (1 - kept) / 6  # recomputed: at most half of the way there, which is a third
    arithmetic, traffic = footprint.operations / rate, again * moved / gpu.bandwidth
    image = arithmetic / ARITHMETIC + traffic / BANDWIDTH
    parts = -(-images // at_once)
    waits = HOST
    if gpus > 1:
        if config.model.sync_bn:
            waits += passes * parts * 2 * footprint.norms * COLLECTIVE
        link = gpu.link if gpus <= NODE else min(gpu.link, BETWEEN_NODES)
        reduce = 2 * (gpus - 1) / gpus * footprint.weights / link
        waits += max(0.0, reduce - images * image / 2)  # hidden by the way back, as far as it goes
    # Weights, gradients and momentum, read and written.
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
    """Say what an estimate takes for granted, a line each."""
    gpu = GPUS[name]
    moved = (
        f"{PASSES} times what BatchNorms read, at least half of each operation's own"
        if compiled
        else "each operation's own"
    )
    return [
        f"{name}: {gpu.half / 1e12:.0f} TFLOP/s in bf16 or fp16, {gpu.single / 1e12:.0f} in fp32, "
        f"{gpu.bandwidth / 1e9:.0f} GB/s, {gpu.memory:.1f} GiB (data sheet)",
        f"convolutions at {ARITHMETIC:.0%} of that, memory at {BANDWIDTH:.0%}; "
        f"bytes moved: {moved}",
        f"{1e3 * HOST:.0f} ms of host a step; {1e6 * COLLECTIVE:.0f} us a small all-reduce; "
        f"gradients at {gpu.link / 1e9:.0f} GB/s, behind the way back; "
        f"{NODE} GPUs a node, {BETWEEN_NODES / 1e9:.0f} GB/s beyond",
        f"memory: as counted, {MARGIN:.0%} for fragments, {CONTEXT / GIB:.1f} GiB for CUDA, cuDNN",
        "not counted: the loader on that machine, start and compilation, network storage",
    ]
