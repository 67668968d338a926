"""Callbacks that monitor a run, and functions that build all callbacks and summarise the run.

No callback makes a training step wait for the GPU. Only the first rank writes files.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import torch
from composer.callbacks import LRMonitor, MemoryMonitor, SpeedMonitor
from composer.core import Callback, Event, State
from composer.loggers import ConsoleLogger, FileLogger, Logger, LoggerDestination
from composer.utils import create_interval_scheduler, dist
from torch import Tensor

from errors import RunError
from networks.base import main_logits
from segmentation.classes import ClassInfo, classes_to_json
from segmentation.metrics import MIoU, class_table, confusion_matrix, mean_iou, table_as_csv
from training.config import class_infos, network_label
from training.distributed import core_turns
from training.label_check import LabelCheck
from training.loggers import server_runs_of
from training.pictures import Curves, Pictures, save_to_run
from training.precision import choose_precision, compiles, devices
from training.schema import Config

if TYPE_CHECKING:
    from composer import Trainer

    from checkpointing.resume import Start
    from checkpointing.saver import Checkpoints


log = logging.getLogger(__name__)


class EvaluationSchedule:
    """A schedule for Composer's `eval_interval` that evaluates at every interval and at the end.

    Args:
        interval: Time between evaluations, as a Composer time string.

    Attributes:
        due: Whether the current weights still need an evaluation.
        postponed: Whether the run was asked to stop, so that the evaluation waits until it resumes.
    """

    def __init__(self, interval: str) -> None:
        self.due = False
        self.postponed = False
        self._is_time = create_interval_scheduler(
            interval, checkpoint_events=False, final_events={Event.FIT_END}
        )

    def __call__(self, state: State, event: Event) -> bool:
        """Return whether Composer should evaluate now."""
        if not self._is_time(state, event):
            return False
        self.due = True
        return not self.postponed


class StopAtNonFiniteLoss(Callback):
    """A callback that ends the run if the loss becomes NaN or infinite, before anything is saved.

    Args:
        saver: Callback that saves the run's checkpoints, or None.
    """

    def __init__(self, saver: Checkpoints | None) -> None:
        self.saver = saver

    def batch_start(self, state: State, logger: Logger) -> None:
        self._learning_rate = float(state.optimizers[0].param_groups[0]["lr"])

    def batch_end(self, state: State, logger: Logger) -> None:
        # Composer has already copied the loss to the CPU for logging, so reading it causes no GPU
        # sync.
        losses = state.total_loss_dict or {}
        wrong = [f"{name} is {loss}" for name, loss in losses.items() if not math.isfinite(loss)]
        if not wrong:
            return
        last = self.saver.last if self.saver else None
        raise RunError(
            f"the loss is not finite in batch {state.timestamp.batch.value}, at a learning rate of "
            f"{self._learning_rate:g} ({wrong[0]}); the last good checkpoint is "
            f"{last or 'none'}; try a lower optimizer.lr"
        )


class ClassTable(Callback):
    """A callback that logs the IoU and accuracy of each class after an evaluation.

    Args:
        classes: Names of the classes.
        folder: Folder for the files `classes/ep{epoch}-ba{batch}.csv`, or None to only log the
            table.
    """

    def __init__(self, classes: Sequence[ClassInfo], folder: str | None = None):
        self.classes = classes
        self.folder = folder

    def eval_end(self, state: State, logger: Logger) -> None:
        metric = state.eval_metrics.get(state.dataloader_label or "", {}).get("MIoU")
        matrix = metric.total_matrix if isinstance(metric, MIoU) else None
        if dist.get_global_rank() != 0 or matrix is None:
            return
        columns, rows = class_table(matrix, self.classes)
        # Composer needs pandas to log tables to a file, so skip the file logger if pandas is
        # missing. Always skip the console, where 150 rows would bury all other output.
        has_pandas = importlib.util.find_spec("pandas") is not None
        skipped = ConsoleLogger if has_pandas else (ConsoleLogger, FileLogger)
        for destination in logger.destinations:
            if not isinstance(destination, skipped):
                name = f"classes/{state.dataloader_label}"
                destination.log_table(columns, rows, name, state.timestamp.batch.value)
        if self.folder is not None:
            text = table_as_csv(columns, rows)
            save_to_run(text.encode(), self.folder, "classes/{time}.csv", state)


class TrainMIoU(Callback):
    """A callback that logs the mIoU of every `interval`-th training batch, in percent.

    The metric `metrics/train/MIoU` is computed from the outputs of the training step, so it needs
    no extra forward pass. The metric only shows a trend, because the outputs come from augmented
    crops with dropout. Images mixed by MixUp are scored against the target of the image with the
    larger weight. The second pass of SAM, with perturbed weights, is not scored.

    Args:
        interval: Number of batches between scores.
        num_classes: Number of classes C.
    """

    def __init__(self, interval: int, num_classes: int):
        self.interval = interval
        self.num_classes = num_classes
        self._matrix: Tensor | None = None
        self._passes = 0

    def batch_start(self, state: State, logger: Logger) -> None:
        self._matrix, self._passes = None, 0

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._passes += 1

    def after_loss(self, state: State, logger: Logger) -> None:
        if (state.timestamp.batch.value + 1) % self.interval or self._passes > 1:
            return
        target = main_target(state.batch[1])
        with torch.no_grad():
            logits = main_logits(state.outputs).detach()
            counts = confusion_matrix(logits, target, self.num_classes)
        self._matrix = counts if self._matrix is None else self._matrix + counts

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._matrix is not None:
            dist.all_reduce(self._matrix)
            logger.log_metrics({"metrics/train/MIoU": 100 * mean_iou(self._matrix).item()})
            self._matrix = None


def main_target(target: Any) -> Tensor:
    """Return a batch's class indices (N, H, W); with MixUp, the image's with the larger weight."""
    if isinstance(target, Tensor):
        return target
    return target.target if target.mixing <= 0.5 else target.permuted


class RunRecord(Callback):
    """A callback that stores the config and the class names as JSON in every checkpoint.

    `evaluate.py`, `predict.py` and `export.py` read this record, so they do not need the YAML file.
    The record also lists the W&B and MLflow runs, so that a resumed run can continue them.

    Args:
        config: Config of the run.
        classes: Names and colours of the classes.
        loggers: All loggers of the run.
        checkpoint: Path or URI of the checkpoint from which the run starts, or None.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        classes: Sequence[ClassInfo],
        loggers: Sequence[LoggerDestination] = (),
        checkpoint: str | None = None,
    ):
        self._record = {"config": json.dumps(config), "classes": classes_to_json(classes)}
        self._loggers, self.checkpoint = loggers, checkpoint

    def state_dict(self) -> dict[str, Any]:
        return {**self._record, "server_runs": server_runs_of(self._loggers)}


def build_callbacks(
    config: Config,
    saver: Checkpoints | None,
    loggers: Sequence[LoggerDestination] = (),
    start: Start | None = None,
) -> list[Callback]:
    """Build all of a run's callbacks: checks, monitors, pictures, the report and the saver.

    Args:
        config: Config of the run.
        saver: Callback that saves checkpoints, or None.
        loggers: All loggers of the run.
        start: Checkpoint from which the run starts, or None.
    """
    num_classes = config.model.num_classes
    classes = class_infos(config)
    folder = config.save_folder
    if folder and not config.is_train:
        # A standalone evaluation numbers its pictures and tables as batch 0. Write them to a
        # subfolder, so that they do not overwrite the training run's files.
        folder = f"{folder}/evaluation"
    callbacks: list[Callback] = [
        StopAtNonFiniteLoss(saver),
        LabelCheck(classes, config.data is None and config.eval_dataset.ignore_background),
        SpeedMonitor(window_size=20),
        LRMonitor(),
    ]
    if torch.cuda.is_available():
        callbacks.append(MemoryMonitor())
    callbacks += core_turns()
    # Draw pictures only if a folder or a logger can store them.
    pictures, curves = None, Curves(folder)
    if config.pictures > 0 and (folder or loggers):
        pictures = Pictures(classes, config.pictures, folder)
        callbacks.append(pictures)
    callbacks.append(curves)
    if config.train_metrics_interval:
        callbacks.append(TrainMIoU(config.train_metrics_interval, num_classes))
    # A standalone evaluation writes no report, because it would overwrite the one from training.
    if folder and config.is_train:
        from training.report import Report

        callbacks.append(Report(config, classes, folder, curves, pictures))
    callbacks.append(ClassTable(classes, folder if config.class_table_csv else None))
    callbacks.append(RunRecord(asdict(config), classes, loggers, start.where if start else None))
    # The saver comes last, so that all other callbacks have finished the step when it saves their
    # state.
    if saver:
        callbacks.append(saver)
    return callbacks


def saver_of(state: State) -> Checkpoints | None:
    """Return the callback that saves a run's checkpoints, or None.

    The callback is found by the name of its class, so that a run without checkpoints need not
    import the class.
    """
    found = (c for c in state.callbacks if type(c).__qualname__ == "Checkpoints")
    return cast("Checkpoints | None", next(found, None))


def start_lines(trainer: Trainer, config: Config) -> list[str]:
    """Return the overview that a run prints when it starts, one fact per line."""
    state, processes = trainer.state, dist.get_world_size()
    (record,) = (callback for callback in state.callbacks if isinstance(callback, RunRecord))
    batch = state.timestamp.batch.value
    precision = choose_precision(config.precision).name
    compiled = ", compiled" if compiles(config) else ""
    parameters = sum(weight.numel() for weight in state.model.parameters()) / 1e6
    weights = record.checkpoint or config.model.backbone_weights or "random"
    origin = f"resumed from {weights}" if batch else f"with weights: {weights}"
    (evaluator,) = state.evaluators
    images = f"{_count_images(evaluator.dataloader.dataloader)} for validation"
    lines = {"device": f"{devices(processes)}, {precision}{compiled}"}
    if config.is_train:
        images = f"{_count_images(state.train_dataloader)} for training, {images}"
        size, micro = config.train_dataset.batch_size, state.device_train_microbatch_size
        share = f"{size // processes} per process in micro-batches of {micro}"
        lines["batch"] = f"{size} images, {share}"
    lines["network"] = f"{network_label(config)}, {parameters:.1f} million parameters"
    lines["images"] = f"{images}, {config.model.num_classes} classes"
    if config.is_train:
        batches = state.dataloader_len.value if state.dataloader_len else "?"
        length = f"{config.max_duration}, {batches} batches per epoch"
        lines["recipe"] = f"{config.recipe_name or 'baseline'}, {length}"
    lines["start"] = f"batch {batch}, {origin}"
    return [f"{name + ':':<9} {line}" for name, line in lines.items()]


def _count_images(dataloader: Any) -> int | str:
    """Return the number of images in a data loader, or "?" if its data set has no length."""
    dataset = getattr(dataloader, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else "?"


def summary(trainer: Trainer) -> str:
    """Return the results of a run and the paths of its output files, one per line."""
    lines = []
    callbacks = trainer.state.callbacks
    miou = trainer.state.eval_metric_values.get("MIoU")
    if miou is not None:
        # Callers of main() may add their own Curves callbacks, so use the first one that has
        # evaluations.
        evaluations = next((c.eval for c in callbacks if isinstance(c, Curves) and c.eval), [])
        first = evaluations[0][1] if len(evaluations) > 1 and evaluations[0][0] == 0 else None
        before = "" if first is None or math.isnan(first) else f"{first:.2f} before, "
        if math.isnan(miou):
            lines.append(f"mIoU: {before}none, because no validation pixel has a class")
        else:
            lines.append(f"mIoU: {before}{miou:.2f} now")
    saver = saver_of(trainer.state)
    if saver and saver.ended:
        lines.append(f"ended early: {saver.best.metric} did not improve for {saver.ended}")
    if saver and (path := saver.best_path()):
        best = saver.best
        lines.append(f"best {best.metric}: {best.value:.2f} after batch {best.batch}, {path}")
    if trainer.saved_checkpoints:
        lines.append(f"checkpoint: {trainer.saved_checkpoints[-1]}")
    for callback in callbacks:
        name = type(callback).__qualname__
        if name in ("Pictures", "Report") and (latest := getattr(callback, "latest", None)):
            lines.append(f"{name.lower()}: {latest}")
    return "\n".join(lines)
