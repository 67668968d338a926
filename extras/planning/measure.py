"""Functions that time a few training steps, the first evaluation batches, and the loader.

They leave no checkpoints, logs, downloaded weights or cached shards behind.
"""

from __future__ import annotations

import copy
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sized
from typing import TYPE_CHECKING, NamedTuple, cast

import psutil
import torch
from composer.core import Callback, State
from composer.loggers import Logger, LoggerDestination
from torch.utils.data import DataLoader

from dataset.shards import Shards
from extras.preparation.check_command import loader_rate
from training.composer_internals import train_data_spec
from training.label_check import LabelCheck
from training.schema import Config

if TYPE_CHECKING:
    from composer import Trainer

# Minimum number of training steps to time.
STEPS = 6
LOADER_SECONDS, STORE_SECONDS = 4.0, 5.0
# Type of `main.build_trainer`.
BuildTrainer = Callable[..., "Trainer"]


class Measured(NamedTuple):
    """The speed and memory of a training run, measured in this process and on its device.

    Attributes:
        start: Seconds until the end of the first step, including imports and compilation.
        at_once: Micro-batch size in images.
        memory: Peak memory of a training step in bytes.
        step: Seconds per step without the wait for data, averaged over all steps of the recipe.
        loader: Speed of the data loader alone, in images per second.
        workers: Number of loader processes.
        epoch: Number of batches in an epoch.
        evaluation: Seconds to evaluate all images, including the time to draw pictures.
        store: Size of a remote data set in bytes, and its download speed in bytes per second.
    """

    start: float
    at_once: int
    memory: float
    step: float
    loader: float
    workers: int
    epoch: int
    evaluation: float
    store: tuple[float, float] | None


class _Watch(Callback):
    """A callback that times evaluation batches and steps. Step times exclude the wait for data."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.eval_batches: list[float] = []
        self._began = 0.0

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._began = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        # The device has finished the step by now, because Composer has already logged its loss.
        self.steps.append(time.perf_counter() - self._began)
        if torch.cuda.is_available() and len(self.steps) == 1:
            # Ignore the memory of the first step, which may have tried a micro-batch that was too
            # large.
            torch.cuda.reset_peak_memory_stats()

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        self._began = time.perf_counter()

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.eval_batches.append(time.perf_counter() - self._began)


def measure(config: Config, build_trainer: BuildTrainer) -> Measured:
    """Measure the training run that a config describes.

    If the recipe uses SAM, its interval is reduced to 2, so that both kinds of step are measured.

    Args:
        config: Config of the run.
        build_trainer: The function `main.build_trainer`.
    """
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        settings = _without_side_effects(config, folder)
        sam = getattr(getattr(settings, str(settings.recipe_name), None), "sam", None)
        interval = sam.interval if sam else 1
        cycle = min(interval, 2)
        if sam:
            sam.interval = cycle
        trainer, watch = _build_watched(settings, build_trainer)
        # Disable evaluation, which Composer would otherwise run at the end of each `fit`.
        for evaluator in trainer.state.evaluators:
            evaluator.eval_interval = lambda state, event: False
        # Warm up first, because the first steps compile the network.
        trainer.fit(duration=f"{cycle}ba")
        start = seconds_since_start()
        # Time several steps, because the first step of each `fit` waits for the loader processes.
        timed = cycle * math.ceil(STEPS / cycle)
        trainer.fit(duration=f"{cycle + timed}ba")
        kinds = [statistics.median(watch.steps[-timed + kind :: cycle]) for kind in range(cycle)]
        # SAM makes an additional pass in the last step of each cycle.
        step = (kinds[-1] + (interval - 1) * kinds[0]) / interval
        loader = cast(DataLoader, train_data_spec(trainer).dataloader)
        result = Measured(
            start,
            cast(int, trainer.state.device_train_microbatch_size),
            peak_memory(),
            step,
            _loader_rate(loader),
            loader.num_workers,
            len(loader),
            _evaluation(trainer, watch),
            _store(loader, folder),
        )
        trainer.close()
    return result


class MeasuredEvaluation(NamedTuple):
    """The time and memory of an evaluation without training, measured on this process's device.

    Attributes:
        start: Seconds until the first image is evaluated, including imports.
        evaluation: Seconds to evaluate all images, including the time to draw pictures.
        images: Number of evaluation images, summed over all processes.
        memory: Peak memory of the first evaluation batches in bytes.
    """

    start: float
    evaluation: float
    images: int
    memory: float


def measure_evaluation(config: Config, build_trainer: BuildTrainer) -> MeasuredEvaluation:
    """Measure the first batches of the evaluation that a config describes.

    Args:
        config: Config of the run.
        build_trainer: The function `main.build_trainer`.
    """
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        trainer, watch = _build_watched(_without_side_effects(config, folder), build_trainer)
        start = seconds_since_start()
        taken = _evaluation(trainer, watch)
        (evaluator,) = trainer.state.evaluators
        dataset = cast(Sized, cast(DataLoader, evaluator.dataloader.dataloader).dataset)
        result = MeasuredEvaluation(start, taken, len(dataset), peak_memory())
        trainer.close()
    return result


def _build_watched(settings: Config, build_trainer: BuildTrainer) -> tuple[Trainer, _Watch]:
    """Build a trainer and the callback that times its steps and evaluation batches."""
    watch = _Watch()
    # Without a save folder, a run draws its pictures only if it has a logger.
    trainer = build_trainer(settings, callbacks=[watch], loggers=[LoggerDestination()])
    # Remove the label check, which would warn that the measured batches lack some classes.
    callbacks = trainer.state.callbacks
    trainer.state.callbacks = [c for c in callbacks if not isinstance(c, LabelCheck)]
    return trainer, watch


def _without_side_effects(config: Config, folder: str) -> Config:
    """Return a config for a run that writes only cached shards, to a subfolder of `folder`."""
    settings = copy.deepcopy(config)
    settings.loggers, settings.stop_after = {}, None
    settings.save_folder = settings.load_path = settings.model.backbone_weights = None
    settings.load_weights_only = settings.load_classes_by_name = settings.autoresume = False
    settings.save_best = settings.class_table_csv = False
    settings.max_duration = settings.eval_interval = "1000000000ba"
    for dataset in (settings.train_dataset, settings.eval_dataset):
        if dataset.is_streaming and dataset.local:
            dataset.local = os.path.join(folder, "shards")
    return settings


def seconds_since_start() -> float:
    """Return the number of seconds since this process started, including its imports."""
    return time.time() - psutil.Process().create_time()


def peak_memory() -> float:
    """Return the peak memory of this process in bytes.

    With a GPU, the result is the device memory, including the CUDA context. Without a GPU, it is
    the resident memory.
    """
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()
        return torch.cuda.max_memory_allocated() + context
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _loader_rate(loader: DataLoader) -> float:
    """Return how many images per second a loader delivers if no model slows it down."""
    last: float = math.inf
    shards = getattr(loader.dataset, "shards", None)
    if isinstance(shards, Shards) and shards.is_cache:
        # The first pass downloads the shards, so the second pass measures only the loader.
        _, last, _ = loader_rate(loader, LOADER_SECONDS)
    return loader_rate(loader, LOADER_SECONDS, last)[0]


def _evaluation(trainer: Trainer, watch: _Watch) -> float:
    """Return the duration of a full evaluation in seconds, extrapolated from its first batches."""
    (evaluator,) = trainer.state.evaluators
    count = len(cast(DataLoader, evaluator.dataloader.dataloader))
    few = min(2, count)
    # Do not time the first call, which starts the loader and compiles the network.
    trainer.eval(subset_num_batches=few)
    watch.eval_batches.clear()
    began = time.perf_counter()
    trainer.eval(subset_num_batches=few)
    taken = time.perf_counter() - began
    return taken + (count - few) * watch.eval_batches[0]


def _store(loader: DataLoader, folder: str) -> tuple[float, float] | None:
    """Return a remote data set's size in bytes and its download speed in bytes per second.

    Return None for a local data set.
    """
    shards = getattr(loader.dataset, "shards", None)
    if not isinstance(shards, Shards) or not shards.is_cache:
        return None
    sizes = [(shard.zip_data or shard.raw_data).bytes for shard in shards.shards]
    remote, split = shards.settings["remote"], shards.settings["split"]
    fresh = Shards(remote, os.path.join(folder, "again"), split)
    seen, began = 0, time.perf_counter()
    for number, size in enumerate(sizes):
        fresh.fetch(number)
        seen += size
        if time.perf_counter() - began > STORE_SECONDS:
            break
    return float(sum(sizes)), seen / (time.perf_counter() - began)
