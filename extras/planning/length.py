"""Functions that predict how many steps and hours a run takes, and how much disk space it needs."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dataset.sampler import length_of_repeated
from errors import ConfigError
from files import is_remote
from training.build_recipe import in_batches
from training.class_weights import sample_factors
from training.config import data_sources
from training.microbatch import Footprint
from training.schema import Config

# Number of bytes that are written to measure the speed of a disk.
DISK_BYTES = 2**27


class Length(NamedTuple):
    """The number of steps, evaluations and checkpoints of a run.

    Attributes:
        epoch: Number of steps in an epoch.
        steps: Number of training steps.
        evaluations: Number of evaluations.
        checkpoints: Number of checkpoints that the run saves.
    """

    epoch: int
    steps: int
    evaluations: int
    checkpoints: int


def lengths(config: Config, epoch: int) -> Length:
    """Return the number of steps, evaluations and checkpoints of a run.

    Args:
        config: Config of the run.
        epoch: Number of steps in an epoch.
    """

    def steps(text: str) -> int:
        return max(1, math.ceil(in_batches(text, epoch, config.train_dataset.batch_size)))

    total = steps(config.max_duration)
    # Round up, because Composer also evaluates and saves a checkpoint at the end of the run.
    evaluations = math.ceil(total / steps(config.eval_interval)) + config.eval_first
    checkpoints = math.ceil(total / steps(config.save_interval)) if config.save_folder else 0
    return Length(epoch, total, evaluations, checkpoints)


def passes(config: Config) -> float:
    """Return how many forward and backward passes a step of the recipe takes on average.

    Args:
        config: Config of the run.
    """
    sam = getattr(getattr(config, str(config.recipe_name), None), "sam", None)
    return 1 + 1 / sam.interval if sam else 1.0


def count_samples(config: Config, split: str) -> int:
    """Return the number of samples in one epoch of a split.

    Args:
        config: Config of the run.
        split: 'train' or 'val'.
    """
    source = data_sources(config)[split]
    rare = config.train_dataset.rare_class_sampling
    if split == "train" and rare:
        return length_of_repeated(sample_factors(source, rare))
    if source.shards is None:
        return len(source.samples())
    # Download the shard index to a temporary folder, so that the plan leaves no files behind.
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        options = replace(source.shards, local=folder if source.shards.local else None)
        return len(replace(source, shards=options).open_shards())


def run_totals(
    config: Config, footprint: Footprint, length: Length, seconds: dict[str, float]
) -> dict[str, Any]:
    """Return the planned duration of a run and the disk space of its checkpoints.

    Args:
        config: Config of the run.
        footprint: Operation and memory counts of the network.
        length: Number of steps, evaluations and checkpoints.
        seconds: Duration of each part of the run in seconds, indexed by name.

    Raises:
        ConfigError: The save folder is not writable.
    """
    size, keep = footprint.checkpoint(config), config.save_num_checkpoints_to_keep
    # The saver deletes the oldest checkpoint only after the new one is complete, so the disk needs
    # room for one more.
    kept = length.checkpoints if keep == -1 else min(keep + 1, length.checkpoints)
    kept += bool(kept) and config.save_best
    saved: dict[str, Any] = {"bytes": size, "at_once": kept, "free": None}
    problem = None
    if kept and config.save_folder:
        rate, saved["free"] = _disk(config.save_folder)
        seconds = seconds | {"checkpoints": length.checkpoints * size / rate}
        if saved["free"] is not None and saved["free"] < kept * size:
            problem = (
                "save_folder has too little disk space for the checkpoints; reduce "
                "save_num_checkpoints_to_keep"
            )
    return {
        "length": length._asdict(),
        "checkpoint": saved,
        "hours": sum(seconds.values()) / 3600,
        "hours_of": {name: value / 3600 for name, value in seconds.items()},
        "does_not_fit": problem,
    }


def _disk(folder: str) -> tuple[float, int | None]:
    """Return the disk's write speed in bytes per second, and its free space in bytes."""
    # If the save folder is remote, measure the local disk instead, because training does not wait
    # for uploads.
    remote = is_remote(folder)
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
        raise ConfigError(
            f"save_folder: cannot write to {folder}: {error.strerror}; choose a writable folder"
        ) from None
    return rate, None if remote else shutil.disk_usage(here).free


def evaluation_totals(images: int, rate: float, seconds: dict[str, float]) -> dict[str, Any]:
    """Return the planned duration and speed of an evaluation.

    Args:
        images: Number of evaluation images.
        rate: Evaluation speed in images per second.
        seconds: Duration of each part in seconds, indexed by name.
    """
    return {
        "speed": {"images_per_second": rate},
        "length": {"images": images, **Length(0, 0, 1, 0)._asdict()},
        "hours": sum(seconds.values()) / 3600,
        "hours_of": {name: value / 3600 for name, value in seconds.items()},
        "does_not_fit": None,
    }
