"""The `--plan` option, which predicts the time, memory and disk space that a run needs.

    python main.py CONFIG [key=value ...] --plan                # measured on this machine
    composer main.py CONFIG --plan                              # on all of its GPUs
    python main.py CONFIG --plan --gpu H100 --gpus 8 --price 24 # estimated for another machine

The exit status is 0, or 2 if the run is impossible or does not fit in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import sys
import warnings
from dataclasses import asdict
from typing import Any

import psutil
import torch
from composer.utils import dist, get_device

from errors import ConfigError, UserError, whole
from extras.planning.estimate import GPUS, NO_BF16, Estimate, assumed, estimate
from extras.planning.length import count_samples, evaluation_totals, lengths, passes, run_totals
from extras.planning.measure import BuildTrainer, measure, measure_evaluation
from networks.deeplab import create_meta_network
from training.config import load, resolve
from training.microbatch import AUTOCAST, CONTEXT, GIB, Footprint, count, fitting, free_memory
from training.precision import choose_precision, compiles, devices
from training.schema import Config


class Plan(dict[str, Any]):
    """The plan of a run, with the keys that `--json` prints. `str(plan)` is the plan as text."""

    def __str__(self) -> str:
        batch, compiled = self["batch"], ", compiled" if self["compiled"] else ""
        rows = [
            ("device", f"{self['device']}, {self['precision']}{compiled}"),
            (
                "batch",
                f"{batch['images']} images, {batch['a_process']} per process, "
                f"micro-batches of {batch['at_once']}",
            ),
        ]
        if memory := self.get("memory"):
            line = f"{memory['step'] / GIB:.2f} GiB of {memory['device'] / GIB:.1f}"
            if "counted" in memory:
                line += f"; {memory['counted'] / GIB:.2f} GiB counted for the step itself"
            rows.append(("memory", line))
        if "hours" in self:
            rows += self._speed() + self._length()
            parts = ", ".join(f"{name} {_time(part)}" for name, part in self["hours_of"].items())
            rows.append(("time", f"{_time(self['hours'])}: {parts}"))
        if "cost" in self:
            rows.append(("cost", f"{self['cost']:.2f}"))
        if self["does_not_fit"]:
            rows.append(("DOES NOT FIT", self["does_not_fit"]))
        lines = [f"plan of {self['config']}, recipe {self['recipe']}", ""]
        lines += [f"{name:<13} {value}" for name, value in rows]
        if "assumed" in self:
            lines += ["", "assumed:", *(f"- {line}" for line in self["assumed"])]
        return "\n".join(lines)

    def _speed(self) -> list[tuple[str, str]]:
        speed = self["speed"]
        rate = f"{speed['images_per_second']:.1f} images/s"
        # The plan of an evaluation has no training steps.
        if "step" not in speed:
            return [("speed", rate)]
        rate = f"{1e3 * speed['step']:.0f} ms, {rate}"
        if "at_most" in speed:
            peak = f"{speed['at_most']:.0f} at the full speed of the data sheet"
            return [("step", f"{rate} ({peak})")]
        loader = f"{speed['loader']:.1f} images/s, {speed['loader_processes']} processes"
        rows = [("step", rate), ("network", f"{speed['network']:.1f} images/s"), ("loader", loader)]
        if "store" in speed:
            size = f"the data set has {speed['data_set'] / 1e9:.2f} GB"
            rows.append(("store", f"{speed['store'] / 1e6:.0f} MB/s; {size}"))
        return [*rows, ("limited by", speed["limit"])]

    def _length(self) -> list[tuple[str, str]]:
        length = self["length"]
        if "images" in length:
            return [("length", f"1 evaluation of {length['images']} images")]
        saved = self["checkpoint"]
        room = "" if saved["free"] is None else f"; {saved['free'] / 1e9:.0f} GB are free"
        return [
            ("length", f"{length['steps']} steps, {length['epoch']} per epoch"),
            ("", f"{length['evaluations']} evaluations, {length['checkpoints']} checkpoints"),
            ("checkpoint", f"{saved['bytes'] / 1e9:.2f} GB, {saved['at_once']} kept{room}"),
        ]


def _time(hours: float) -> str:
    return f"{hours:.2f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def main(arguments: list[str], build_trainer: BuildTrainer) -> int:
    """Print the plan that the command line requests.

    Args:
        arguments: Command-line arguments of main.py.
        build_trainer: The function `main.build_trainer`.

    Returns:
        The exit status.
    """
    options, overrides = parser().parse_known_args(arguments)
    logging.getLogger("composer").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    try:
        for given in overrides:
            if given.startswith("-"):
                raise ConfigError(
                    f"unknown option {given}; for help, run python main.py CONFIG --plan -h"
                )
        if options.gpu is None and (options.gpus != 1 or options.images):
            raise ConfigError("--gpus and --images apply only to estimates; add --gpu NAME")
        config = resolve(load(options.config, overrides), with_data=not options.images)
        if options.gpu and config.is_train:
            plan = estimated(config, options)
        elif options.gpu:
            plan = estimated_evaluation(config, options)
        elif config.is_train:
            plan = measured(config, build_trainer)
        else:
            plan = measured_evaluation(config, build_trainer)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plan = Plan({"config": options.config, "recipe": config.recipe_name or "none"} | plan)
    if options.price is not None and "hours" in plan:
        plan["cost"] = plan["hours"] * options.price
    if dist.get_global_rank() == 0:
        print(json.dumps(plan, indent=2) if options.json else plan)
    return 2 if plan["does_not_fit"] else 0


def parser() -> argparse.ArgumentParser:
    """Return main.py's argument parser for `--plan`."""
    result = argparse.ArgumentParser(
        prog="python main.py", usage="%(prog)s CONFIG [key=value ...] --plan [options]"
    )
    result.add_argument("config", help="YAML config of the run")
    result.add_argument("--plan", action="store_true", help="print the plan instead of running")
    result.add_argument("--gpu", choices=GPUS, help="GPU to estimate for; default: measure here")
    result.add_argument(
        "--gpus", type=whole(1, 100_000), default=1, help="number of GPUs (default: 1)"
    )
    result.add_argument("--price", type=float, help="price of the machine per hour")
    names = ("TRAINING", "VALIDATION")
    count = whole(1, 10**12)
    result.add_argument(
        "--images", type=count, nargs=2, metavar=names, help="numbers of images, without the data"
    )
    result.add_argument("--json", action="store_true", help="print JSON")
    return result


def _settings(
    device: str, precision: str, compiled: bool, batch: int, processes: int
) -> dict[str, Any]:
    """Return the first keys of a plan, which all plans contain.

    By default, a micro-batch is a process's whole batch.
    """
    share = batch // processes
    return {
        "device": device,
        "precision": precision,
        "compiled": compiled,
        "batch": {"images": batch, "a_process": share, "at_once": share},
    }


def _estimate(
    config: Config, options: argparse.Namespace, section: str
) -> tuple[dict[str, Any], Footprint, Estimate]:
    """Return an estimated plan's settings, the network's footprint, and the estimate.

    Raises:
        ConfigError: The batch size is not a multiple of the number of GPUs.
    """
    gpus, dataset = options.gpus, getattr(config, section)
    if dataset.batch_size % gpus:
        raise ConfigError(
            f"{section}.batch_size: {dataset.batch_size} does not divide evenly among {gpus} GPUs; "
            f"use a multiple of {gpus}"
        )
    auto = "amp_fp16" if options.gpu in NO_BF16 else "amp_bf16"
    precision = auto if config.precision == "auto" else config.precision
    compiled = config.compile is not False
    device = f"{gpus} x {options.gpu}, estimated"
    plan = _settings(device, precision, compiled, dataset.batch_size, gpus)
    footprint = _count(config, dataset.final_size, precision, compiled)
    steps = passes(config) if section == "train_dataset" else 1.0
    found = estimate(footprint, config, options.gpu, gpus, steps, precision, compiled)
    return plan, footprint, found


def estimated(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """Return the plan of a training run, estimated for the GPUs of another machine.

    Args:
        config: Config of the run.
        options: Command-line options.

    Raises:
        ConfigError: The batch size is not a multiple of the number of GPUs, or exceeds the data
            set.
    """
    plan, footprint, found = _estimate(config, options, "train_dataset")
    batch = config.train_dataset.batch_size
    training, validation = options.images or (
        count_samples(config, "train"),
        count_samples(config, "val"),
    )
    epoch = (math.floor if config.train_dataset.drop_last else math.ceil)(training / batch)
    if epoch == 0:
        raise ConfigError(
            f"train_dataset.batch_size: {training} images do not fill one batch of {batch}; use a "
            "smaller batch_size"
        )
    plan["batch"]["at_once"] = found.at_once
    plan |= {
        "memory": {"step": found.memory + CONTEXT, "device": found.free + CONTEXT},
        "assumed": assumed(options.gpu, plan["compiled"]),
        "does_not_fit": None if found.fits else _too_large(found.at_once),
    }
    if not found.fits:
        return plan
    length = lengths(config, epoch)
    seconds = {
        "training": length.steps * found.step,
        "evaluation": length.evaluations * validation / options.gpus / found.evaluation,
    }
    speed = {
        "step": found.step,
        "images_per_second": batch / found.step,
        "at_most": batch / found.fastest,
        "limit": "network",
    }
    return plan | {"speed": speed} | run_totals(config, footprint, length, seconds)


def _this_machine(config: Config, section: str) -> tuple[dict[str, Any], int, float]:
    """Return a plan's settings, the number of processes, and the free bytes per process."""
    ranks, device = dist.get_world_size(), get_device(None)
    if ranks > 1:
        dist.initialize_dist(device)
    precision, cpu_autocast = choose_precision(config.precision)
    if torch.cuda.is_available():
        free = free_memory(device) - CONTEXT
    else:
        free = float(psutil.virtual_memory().available)
    precision = precision if cpu_autocast is None else "amp_bf16"
    batch = getattr(config, section).batch_size
    return _settings(devices(ranks), precision, compiles(config), batch, ranks), ranks, free


def measured(config: Config, build_trainer: BuildTrainer) -> dict[str, Any]:
    """Measure a few steps on this machine, and return the plan of a training run.

    Args:
        config: Config of the run.
        build_trainer: The function `main.build_trainer`.
    """
    plan, ranks, free = _this_machine(config, "train_dataset")
    size = config.train_dataset.final_size
    footprint = _count(config, size, plan["precision"], plan["compiled"])
    batch, images = plan["batch"]["images"], plan["batch"]["a_process"]
    at_once, fits = fitting(footprint, config, images, free, ranks, torch.cuda.is_available())
    plan["batch"]["at_once"] = at_once
    plan |= {
        "memory": {"step": footprint.step(at_once, config, ranks), "device": free},
        "does_not_fit": None if fits else _too_large(at_once),
    }
    if not fits:
        return plan
    with contextlib.redirect_stdout(sys.stderr):
        found = measure(config, build_trainer)
    plan["batch"]["at_once"] = found.at_once
    counted = footprint.step(found.at_once, config, ranks)
    plan["memory"] = {"step": found.memory, "counted": counted, "device": free}
    length = lengths(config, found.epoch)
    # Without loader processes, each step waits until its data is loaded.
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
    return plan | {"speed": speed} | run_totals(config, footprint, length, seconds)


def estimated_evaluation(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """Return the plan of an evaluation, estimated for the GPUs of another machine.

    The plan does not include the memory use.

    Args:
        config: Config of the run.
        options: Command-line options.
    """
    plan, _, found = _estimate(config, options, "eval_dataset")
    images = options.images[1] if options.images else count_samples(config, "val")
    rate = options.gpus * found.evaluation
    lines = assumed(options.gpu, plan["compiled"])
    plan["assumed"] = [line for line in lines if "memory: " not in line]
    return plan | evaluation_totals(images, rate, {"evaluation": images / rate})


def measured_evaluation(config: Config, build_trainer: BuildTrainer) -> dict[str, Any]:
    """Time the first batches on this machine, and return the plan of an evaluation.

    Args:
        config: Config of the run.
        build_trainer: The function `main.build_trainer`.
    """
    plan, _, free = _this_machine(config, "eval_dataset")
    with contextlib.redirect_stdout(sys.stderr):
        found = measure_evaluation(config, build_trainer)
    plan["memory"] = {"step": found.memory, "device": free}
    seconds = {"start": found.start, "evaluation": found.evaluation}
    return plan | evaluation_totals(found.images, found.images / found.evaluation, seconds)


def _count(config: Config, size: int, precision: str, compiled: bool) -> Footprint:
    """Count the network's operations and memory for an image of `size` x `size` pixels."""
    network = create_meta_network(**asdict(config.model))
    return count(network, size, AUTOCAST.get(precision), compiled)


def _too_large(at_once: int) -> str:
    return (
        f"even a micro-batch of {at_once} is too large; use a smaller final_size or backbone_arch"
    )
