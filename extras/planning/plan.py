"""What a run will take, before it is paid for.

    python main.py CONFIG [key=value ...] --plan                # measured on this machine
    composer main.py CONFIG --plan                              # on all of its GPUs
    python main.py CONFIG --plan --gpu H100 --gpus 8 --price 24 # estimated for another machine

Exit status: 0, or 2 where the run cannot be or does not fit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from composer.utils import dist, get_device
from torch import nn

from dataset.counts import count_classes
from dataset.sampler import length_of_repeated
from errors import ConfigError, UserError, whole
from extras.planning.estimate import GPUS, NO_BF16, assumed, estimate
from extras.planning.measure import BuildTrainer, measure, measure_evaluation
from extras.planning.plan_text import text
from files import is_remote
from training.build_recipe import in_batches
from training.class_weights import repeat_factors
from training.config import data_sources, load, resolve
from training.microbatch import AUTOCAST, CONTEXT, Footprint, count, fitting, free_memory
from training.precision import choose_precision, compiles, devices
from training.schema import Config

DISK_BYTES = 2**27  # written to see how fast a disk is
BuildNetwork = Callable[[Config], nn.Module]  # without pretrained weights, on "meta"


class Length(NamedTuple):
    """How much there is to do."""

    epoch: int  # steps
    steps: int
    evaluations: int
    checkpoints: int


def lengths(config: Config, epoch: int) -> Length:
    """Return a run's steps, evaluations and checkpoints, given the steps of an epoch."""

    def steps(text: str) -> int:
        return max(1, math.ceil(in_batches(text, epoch, config.train_dataset.batch_size)))

    total = steps(config.max_duration)
    # One is due at the end, too.
    evaluations = math.ceil(total / steps(config.eval_interval)) + config.eval_first
    checkpoints = math.ceil(total / steps(config.save_interval)) if config.save_folder else 0
    return Length(epoch, total, evaluations, checkpoints)


def passes(config: Config) -> float:
    """Return the forward and backward passes of a step, mean over the recipe."""
    sam = getattr(getattr(config, str(config.recipe_name), None), "sam", None)
    return 1 + 1 / sam.interval if sam else 1.0


def main(
    arguments: list[str], build_trainer: BuildTrainer, build_network: BuildNetwork, began: float
) -> int:
    """Run the command line; return the exit status.

    Args:
        arguments: Those of main.py.
        build_trainer: `main.build_trainer`.
        build_network: Builds a config's network.
        began: When the command did, by `time.perf_counter`.
    """
    options, overrides = parser().parse_known_args(arguments)
    logging.getLogger("composer").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    try:
        for given in overrides:
            if given.startswith("-"):
                raise ConfigError(f"{given}: no such option; see python main.py CONFIG --plan -h")
        if options.gpu is None and (options.gpus != 1 or options.images):
            raise ConfigError("--gpus and --images are for estimates: they need --gpu")
        config = resolve(load(options.config, overrides), with_data=not options.images)
        if options.gpu and not config.is_train:
            plan = estimated_evaluation(config, options, build_network)
        elif not config.is_train:
            plan = measured_evaluation(config, build_trainer, began)
        elif options.gpu:
            plan = estimated(config, options, build_network)
        else:
            plan = measured(config, build_trainer, build_network, began)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plan = {"config": options.config, "recipe": config.recipe_name or "none"} | plan
    if options.price is not None and "hours" in plan:
        plan["cost"] = plan["hours"] * options.price
    if dist.get_global_rank() == 0:
        print(json.dumps(plan, indent=2) if options.json else text(plan))
    return 2 if plan["does_not_fit"] else 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of main.py's arguments where --plan is among them."""
    result = argparse.ArgumentParser(
        prog="python main.py", usage="%(prog)s CONFIG [key=value ...] --plan [options]"
    )
    result.add_argument("config", help="the run's YAML")
    result.add_argument("--plan", action="store_true", help="say what the run takes; do not run")
    result.add_argument("--gpu", choices=GPUS, help="estimate for such; default: measure here")
    result.add_argument(
        "--gpus", type=whole(1, 100_000), default=1, help="how many of them (default: 1)"
    )
    result.add_argument("--price", type=float, help="of the whole machine, an hour")
    names = ("TRAINING", "VALIDATION")
    count = whole(1, 10**12)
    result.add_argument("--images", type=count, nargs=2, metavar=names, help="if no data is here")
    result.add_argument("--json", action="store_true", help="for scripts")
    return result


def _estimated_settings(
    config: Config, options: argparse.Namespace, section: str
) -> tuple[int, int, str, bool]:
    """Return GPUs, batch size, precision and whether to compile, for GPUs that are not here.

    Raises:
        ConfigError: The batch does not divide among the GPUs.
    """
    gpus, batch = options.gpus, getattr(config, section).batch_size
    if batch % gpus:
        raise ConfigError(f"{section}.batch_size: {batch} does not divide among {gpus} GPUs")
    auto = "amp_fp16" if options.gpu in NO_BF16 else "amp_bf16"
    precision = auto if config.precision == "auto" else config.precision
    return gpus, batch, precision, config.compile is not False


def estimated(
    config: Config, options: argparse.Namespace, build_network: BuildNetwork
) -> dict[str, Any]:
    """Plan for GPUs that are not here."""
    gpus, batch, precision, compiled = _estimated_settings(config, options, "train_dataset")
    training, validation = options.images or (
        _samples(config, "train"),
        _samples(config, "val"),
    )
    epoch = (math.floor if config.train_dataset.drop_last else math.ceil)(training / batch)
    if epoch == 0:
        raise ConfigError(f"train_dataset: {training} images do not fill one batch of {batch}")
    footprint = _count(config, build_network, precision, compiled)
    found = estimate(footprint, config, options.gpu, gpus, passes(config), precision, compiled)
    plan = {
        "device": f"{gpus} x {options.gpu}, estimated",
        "precision": precision,
        "compiled": compiled,
        "batch": {"images": batch, "a_process": batch // gpus, "at_once": found.at_once},
        "memory": {"step": found.memory + CONTEXT, "device": found.free + CONTEXT},
        "assumed": assumed(options.gpu, compiled),
        "does_not_fit": None if found.fits else _too_large(found.at_once),
    }
    if not found.fits:
        return plan
    length = lengths(config, epoch)
    seconds = {
        "training": length.steps * found.step,
        "evaluation": length.evaluations * validation / gpus / found.evaluation,
    }
    speed = {
        "step": found.step,
        "images_per_second": batch / found.step,
        "at_most": batch / found.fastest,
        "limit": "network",
    }
    return plan | {"speed": speed} | _whole(config, footprint, length, seconds)


def measured(
    config: Config, build_trainer: BuildTrainer, build_network: BuildNetwork, began: float
) -> dict[str, Any]:
    """Plan for this machine, by some steps of the run."""
    ranks, on_gpu, device = dist.get_world_size(), torch.cuda.is_available(), get_device(None)
    if ranks > 1:
        dist.initialize_dist(device)
    precision, cpu_autocast = choose_precision(config.precision)
    precision = precision if cpu_autocast is None else "amp_bf16"
    footprint = _count(config, build_network, precision, compiles(config))
    batch = config.train_dataset.batch_size
    images = batch // ranks
    free = free_memory(device) - CONTEXT if on_gpu else float(psutil.virtual_memory().available)
    at_once, fits = fitting(footprint, config, images, free, ranks, adapts=on_gpu)
    plan: dict[str, Any] = {
        "device": devices(ranks),
        "precision": precision,
        "compiled": compiles(config),
        "batch": {"images": batch, "a_process": images, "at_once": at_once},
        "memory": {"step": footprint.step(at_once, config, ranks), "device": free},
        "does_not_fit": None if fits else _too_large(at_once),
    }
    if not fits:
        return plan
    with contextlib.redirect_stdout(sys.stderr):
        found = measure(config, build_trainer, began)
    plan["batch"]["at_once"] = found.at_once
    counted = footprint.step(found.at_once, config, ranks)
    plan["memory"] = {"step": found.memory, "counted": counted, "device": free}
    length = lengths(config, found.epoch)
    # Without loader processes, a step loads first.
    load = images / found.loader
    step = found.step + load if found.workers == 0 else max(found.step, load)
    seconds = {
        "start": found.start,
        "training": length.steps * step,
        "evaluation": length.evaluations * found.evaluation,
    }
    speed = {
        "step": step,
        "images_per_second": batch / step,
        "network": batch / found.step,
        "loader": found.loader * ranks,
        "loader_processes": found.workers * ranks,
        "limit": "network" if found.step >= load else "loader",
    }
    if found.store:
        size, rate = found.store
        speed |= {"store": rate, "data_set": size}
        seconds["download"] = max(0.0, size / rate - length.epoch * step)
        if seconds["download"]:
            speed["limit"] = "store, in the first epoch"
    return plan | {"speed": speed} | _whole(config, footprint, length, seconds)


def estimated_evaluation(
    config: Config, options: argparse.Namespace, build_network: BuildNetwork
) -> dict[str, Any]:
    """Plan an evaluation for GPUs that are not here; its memory is not estimated."""
    gpus, batch, precision, compiled = _estimated_settings(config, options, "eval_dataset")
    images = options.images[1] if options.images else _samples(config, "val")
    size = config.eval_dataset.final_size
    footprint = count(build_network(config), size, AUTOCAST.get(precision), compiled)
    found = estimate(footprint, config, options.gpu, gpus, 1.0, precision, compiled)
    rate = gpus * found.evaluation
    plan = {
        "device": f"{gpus} x {options.gpu}, estimated",
        "precision": precision,
        "compiled": compiled,
        "batch": {"images": batch, "a_process": batch // gpus, "at_once": batch // gpus},
        "assumed": [line for line in assumed(options.gpu, compiled) if "memory: " not in line],
    }
    return plan | _evaluation_course(images, rate, {"evaluation": images / rate})


def measured_evaluation(
    config: Config, build_trainer: BuildTrainer, began: float
) -> dict[str, Any]:
    """Plan an evaluation for this machine, by its first batches."""
    ranks, on_gpu, device = dist.get_world_size(), torch.cuda.is_available(), get_device(None)
    if ranks > 1:
        dist.initialize_dist(device)
    precision, cpu_autocast = choose_precision(config.precision)
    free = free_memory(device) - CONTEXT if on_gpu else float(psutil.virtual_memory().available)
    with contextlib.redirect_stdout(sys.stderr):
        found = measure_evaluation(config, build_trainer, began)
    batch = config.eval_dataset.batch_size
    plan = {
        "device": devices(ranks),
        "precision": precision if cpu_autocast is None else "amp_bf16",
        "compiled": compiles(config),
        "batch": {"images": batch, "a_process": batch // ranks, "at_once": batch // ranks},
        "memory": {"step": found.memory, "device": free},
    }
    seconds = {"start": found.start, "evaluation": found.evaluation}
    return plan | _evaluation_course(found.images, found.images / found.evaluation, seconds)


def _evaluation_course(images: int, rate: float, seconds: dict[str, float]) -> dict[str, Any]:
    """Return the part of a plan that says how long an evaluation takes."""
    return {
        "speed": {"images_per_second": rate},
        "length": {"images": images, **Length(0, 0, 1, 0)._asdict()},
        "hours": sum(seconds.values()) / 3600,
        "hours_of": {name: value / 3600 for name, value in seconds.items()},
        "does_not_fit": None,
    }


def _count(config: Config, build: BuildNetwork, precision: str, compiled: bool) -> Footprint:
    size, dtype = config.train_dataset.final_size, AUTOCAST.get(precision)
    return count(build(config), size, dtype, compiled)


def _too_large(at_once: int) -> str:
    return f"not even {at_once} images at once; a smaller final_size or backbone_arch would help"


def _samples(config: Config, split: str) -> int:
    """Return how many samples an epoch of a split has."""
    source = data_sources(config)[split]
    rare = config.train_dataset.rare_class_sampling
    if split == "train" and rare:
        return length_of_repeated(repeat_factors(count_classes(source).present, rare))
    if source.shards is None:
        return len(source.samples())
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:  # for the index
        options = replace(source.shards, local=folder if source.shards.local else None)
        return len(replace(source, shards=options).open_shards())


def _whole(
    config: Config, footprint: Footprint, length: Length, seconds: dict[str, float]
) -> dict[str, Any]:
    """Say what a run takes from start to end, and whether the disk holds what it leaves."""
    size, keep = footprint.checkpoint(config), config.save_num_checkpoints_to_keep
    # An old one goes when the next is whole.
    kept = length.checkpoints if keep == -1 else min(keep + 1, length.checkpoints)
    kept += bool(kept) and config.save_best
    saved: dict[str, Any] = {"bytes": size, "at_once": kept, "free": None}
    problem = None
    if kept and config.save_folder:
        rate, saved["free"] = _disk(config.save_folder)
        seconds = seconds | {"checkpoints": length.checkpoints * size / rate}
        if saved["free"] is not None and saved["free"] < kept * size:
            problem = "save_folder has no room for the checkpoints; keep fewer"
    return {
        "length": length._asdict(),
        "checkpoint": saved,
        "hours": sum(seconds.values()) / 3600,
        "hours_of": {name: value / 3600 for name, value in seconds.items()},
        "does_not_fit": problem,
    }


def _disk(folder: str) -> tuple[float, int | None]:
    """Bytes a second that checkpoints are written with, and how many there is room for."""
    remote = is_remote(folder)  # where they go from a local file, while training goes on
    here = Path(tempfile.gettempdir() if remote else folder).absolute()
    here = next(path for path in (here, *here.parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=here) as file:
            began = time.perf_counter()
            file.write(bytes(DISK_BYTES))
            file.flush()
            os.fsync(file.fileno())
            rate = DISK_BYTES / (time.perf_counter() - began)
    except OSError as error:
        raise ConfigError(f"save_folder: cannot write to {folder}: {error.strerror}") from None
    return rate, None if remote else shutil.disk_usage(here).free
