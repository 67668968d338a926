"""A few real steps of a run, an evaluation's first batches, and the loader by itself, timed.

Nothing is left behind: no checkpoint, logger, download of weights or cache of shards.
"""

from __future__ import annotations

import contextlib
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
from extras.preparation.check_command import batches
from training.composer_internals import train_data_spec
from training.label_check import LabelCheck
from training.schema import Config

if TYPE_CHECKING:
    from composer import Trainer

STEPS = 6  # timed, at least
LOADER_SECONDS, STORE_SECONDS = 4.0, 5.0
# `main.build_trainer`. It gets a logger that keeps nothing, so that pictures are drawn and timed.
BuildTrainer = Callable[..., "Trainer"]


class Measured(NamedTuple):
    """Of this process and its device; seconds, bytes, and images of one process."""

    start: float  # until the first step is done, with imports and compilation
    at_once: int  # images
    memory: float  # the most that the steps took
    step: float  # without waiting for data, mean over the recipe
    loader: float  # images a second, by itself
    workers: int
    epoch: int  # batches
    evaluation: float  # of all evaluation images, with pictures
    store: tuple[float, float] | None  # bytes of a remote data set, bytes a second


class _Watch(Callback):
    """Times steps, without what they wait for data, and the batches of evaluations."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.eval_batches: list[float] = []
        self._began = 0.0

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._began = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        # Composer has waited for the device, to log the loss.
        self.steps.append(time.perf_counter() - self._began)
        if torch.cuda.is_available() and len(self.steps) == 1:
            torch.cuda.reset_peak_memory_stats()  # `auto` may have tried what does not fit

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        self._began = time.perf_counter()

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.eval_batches.append(time.perf_counter() - self._began)


def measure(config: Config, build_trainer: BuildTrainer) -> Measured:
    """Measure the run of a config.

    Args:
        config: The run's; a recipe with SAM shortens its interval to 2, to see both kinds of step.
        build_trainer: `main.build_trainer`.
    """
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        settings = _leaving_nothing(config, folder)
        sam = getattr(getattr(settings, str(settings.recipe_name), None), "sam", None)
        interval = sam.interval if sam else 1
        cycle = min(interval, 2)
        if sam:
            sam.interval = cycle
        watch = _Watch()
        trainer = build_trainer(settings, callbacks=[watch], loggers=[LoggerDestination()])
        _without_label_check(trainer)
        for evaluator in trainer.state.evaluators:  # Composer evaluates at the end of a `fit`
            evaluator.eval_interval = lambda state, event: False
        trainer.fit(duration=f"{cycle}ba")  # compiles
        start = seconds_since_start()
        # The loader's processes start anew, which slows the first steps.
        timed = cycle * math.ceil(STEPS / cycle)
        trainer.fit(duration=f"{cycle + timed}ba")
        kinds = [statistics.median(watch.steps[-timed + kind :: cycle]) for kind in range(cycle)]
        # Of SAM's, the last of a cycle climbs.
        step = (kinds[-1] + (interval - 1) * kinds[0]) / interval
        memory = peak_memory()
        spec = train_data_spec(trainer)
        at_once = trainer.state.device_train_microbatch_size
        assert at_once is not None
        loader = cast(DataLoader, spec.dataloader)
        result = Measured(
            start,
            int(at_once),
            memory,
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
    """Times and memory of an evaluation alone, in this process and on its device."""

    start: float  # seconds until the first image, with imports
    evaluation: float  # seconds of all images, with pictures
    images: int  # of all processes
    memory: float  # bytes, the most that the first batches took


def measure_evaluation(config: Config, build_trainer: BuildTrainer) -> MeasuredEvaluation:
    """Measure the first batches of an evaluation; arguments as of `measure`."""
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        watch = _Watch()
        settings = _leaving_nothing(config, folder)
        trainer = build_trainer(settings, callbacks=[watch], loggers=[LoggerDestination()])
        _without_label_check(trainer)
        start = seconds_since_start()
        taken = _evaluation(trainer, watch)
        (evaluator,) = trainer.state.evaluators
        dataset = cast(Sized, cast(DataLoader, evaluator.dataloader.dataloader).dataset)
        result = MeasuredEvaluation(start, taken, len(dataset), peak_memory())
        trainer.close()
    return result


def _without_label_check(trainer: Trainer) -> None:
    """Take away the check of labels: a few batches show a few classes, no reason to warn."""
    callbacks = trainer.state.callbacks
    trainer.state.callbacks = [c for c in callbacks if not isinstance(c, LabelCheck)]


def _leaving_nothing(config: Config, folder: str) -> Config:
    """Return the config of a run that writes nothing, with what it caches in a folder."""
    settings = copy.deepcopy(config)
    settings.loggers, settings.save_folder, settings.autoresume = {}, None, False
    settings.save_best, settings.stop_after = False, None
    settings.load_path, settings.load_weights_only, settings.load_classes_by_name = (
        None,
        False,
        False,
    )
    settings.model.backbone_weights = None
    settings.max_duration = settings.eval_interval = "1000000000ba"
    settings.class_table_csv = False
    for dataset in (settings.train_dataset, settings.eval_dataset):
        if dataset.is_streaming and dataset.local:
            dataset.local = os.path.join(folder, "shards")
    return settings


def seconds_since_start() -> float:
    """Return the age of this process in seconds, with its imports."""
    return time.time() - psutil.Process().create_time()


def peak_memory() -> float:
    """Return the most memory that this process has held: a GPU's, with CUDA's, or resident."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()
        return torch.cuda.max_memory_allocated() + context
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _loader_rate(loader: DataLoader) -> float:
    """Images a second that a loader gives when nobody keeps it waiting."""
    most: float = math.inf
    shards = getattr(loader.dataset, "shards", None)
    if isinstance(shards, Shards) and shards.is_cache:
        _, most = _load(loader, most)  # fetches what the next line reads
    return _load(loader, most)[0]


def _load(loader: DataLoader, most: float) -> tuple[float, int]:
    """Load for some seconds, or so many batches at most; return images a second, and batches."""
    warm = 1 + 2 * loader.num_workers  # batches that were under way before the clock started
    seen, number, began = 0, 0, 0.0
    with contextlib.closing(batches(loader)) as given:
        for number, (image, _) in enumerate(given):
            seen += len(image) if began else 0
            if seen and (time.perf_counter() - began > LOADER_SECONDS or number >= most):
                break
            if number == warm:
                began = time.perf_counter()
    return seen / (time.perf_counter() - began), number


def _evaluation(trainer: Trainer, watch: _Watch) -> float:
    """Return an evaluation's seconds: those of its first batches, and pictures, on to all."""
    (evaluator,) = trainer.state.evaluators
    count = len(cast(DataLoader, evaluator.dataloader.dataloader))
    few = min(2, count)
    trainer.eval(subset_num_batches=few)  # starts the loader, compiles
    watch.eval_batches.clear()
    began = time.perf_counter()
    trainer.eval(subset_num_batches=few)
    taken = time.perf_counter() - began
    return taken + (count - few) * watch.eval_batches[0]


def _store(loader: DataLoader, folder: str) -> tuple[float, float] | None:
    """Return a remote data set's bytes, and how many a second come from there."""
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
