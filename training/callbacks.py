"""What is looked at while training: the loss, the table of classes, training mIoU; and all of it.

All are Composer callbacks. None makes the training step wait for the device, and none writes from
any process but the first.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from composer.callbacks import LRMonitor, MemoryMonitor, SpeedMonitor
from composer.core import Callback, State
from composer.loggers import ConsoleLogger, FileLogger, Logger, LoggerDestination
from composer.utils import dist
from torch import Tensor

from errors import RunError
from networks.base import main_logits
from segmentation.classes import ClassInfo, classes_to_json
from segmentation.metrics import MIoU, class_table, confusion_matrix, mean_iou, table_as_csv
from training.config import class_infos
from training.label_check import LabelCheck
from training.loggers import server_runs_of
from training.pictures import Curves, Pictures, save_to_run
from training.schema import Config

if TYPE_CHECKING:
    from composer import Trainer

    from checkpointing.saver import Checkpoints


log = logging.getLogger(__name__)


class StopAtNonFiniteLoss(Callback):
    """Ends a run whose loss is NaN or infinite, before it saves or evaluates anything of that.

    Args:
        saver: What saves the run's checkpoints, if any does.
    """

    def __init__(self, saver: Checkpoints | None) -> None:
        self.saver = saver

    def batch_start(self, state: State, logger: Logger) -> None:
        self._learning_rate = float(state.optimizers[0].param_groups[0]["lr"])

    def batch_end(self, state: State, logger: Logger) -> None:
        # Composer has the mean over all processes on the host by now, to log it.
        losses = state.total_loss_dict or {}
        wrong = [f"{name} is {loss}" for name, loss in losses.items() if not math.isfinite(loss)]
        if not wrong:
            return
        last = self.saver.last if self.saver else None
        raise RunError(
            f"{wrong[0]} in batch {state.timestamp.batch.value}, at a learning rate of "
            f"{self._learning_rate:g}; the last good checkpoint is {last or 'none'}; "
            "a lower optimizer.lr may help"
        )


class ClassTable(Callback):
    """After each evaluation, sends IoU and accuracy of every class to the loggers that take tables.

    Args:
        classes: Names of the classes.
        folder: Where `classes/ep{epoch}-ba{batch}.csv` goes below as well, or None.
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
        # Composer's file logger makes tables with pandas; on the console 150 rows would hide the
        # rest.
        pandas = importlib.util.find_spec("pandas") is not None
        for destination in logger.destinations:
            if not isinstance(destination, ConsoleLogger) and (
                pandas or not isinstance(destination, FileLogger)
            ):
                name = f"classes/{state.dataloader_label}"
                destination.log_table(columns, rows, name, state.timestamp.batch.value)
        if self.folder is not None:
            text = table_as_csv(columns, rows)
            save_to_run(text.encode(), self.folder, "classes/{time}.csv", state)


class TrainMIoU(Callback):
    """Logs the mIoU of every `interval`-th training batch as `metrics/train/MIoU`, in percent.

    It is read off the outputs that the loss is computed from, so it costs no forward pass, and is
    of augmented crops with dropout: for the trend. Photos that MixUp mixed are scored against the
    class of the stronger one, and SAM's second pass, with perturbed weights, is left out.

    Args:
        interval: Batches between two scores.
        num_classes: Number of classes C.
        ignore_index: The target of pixels without a label.
    """

    def __init__(self, interval: int, num_classes: int, ignore_index: int = -1):
        self.interval = interval
        self.num_classes = num_classes
        self.ignore_index = ignore_index
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
            counts = confusion_matrix(
                main_logits(state.outputs).detach(), target, self.num_classes, self.ignore_index
            )
        self._matrix = counts if self._matrix is None else self._matrix + counts

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._matrix is not None:
            dist.all_reduce(self._matrix)
            logger.log_metrics({"metrics/train/MIoU": 100 * mean_iou(self._matrix).item()})
            self._matrix = None


def main_target(target: Any) -> Tensor:
    """Return class indices (N, H, W) to score against: of a mixed target, those that weigh more."""
    if isinstance(target, Tensor):
        return target
    return target.target if target.mixing <= 0.5 else target.permuted


class RunRecord(Callback):
    """Puts the configuration and the class names into every checkpoint, as JSON.

    `evaluate.py`, `predict.py` and `export.py` read them there and need no YAML. A resumed run
    reads there in which runs of W&B and MLflow it goes on.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        classes: Sequence[ClassInfo],
        loggers: Sequence[LoggerDestination] = (),
    ):
        self._record = {"config": json.dumps(config), "classes": classes_to_json(classes)}
        self._loggers = loggers

    def state_dict(self) -> dict[str, Any]:
        return {**self._record, "server_runs": server_runs_of(self._loggers)}


def build_callbacks(
    config: Config, saver: Checkpoints | None, loggers: Sequence[LoggerDestination] = ()
) -> list[Callback]:
    """Build what watches a run: its loss, speed, learning rate and memory, and what is drawn."""
    num_classes = config.model.num_classes
    classes = class_infos(config)
    folder = config.save_folder
    if folder and not config.is_train:
        # Its pictures and tables are of batch 0, and would replace those of the run that trained.
        folder = f"{folder}/evaluation"
    callbacks: list[Callback] = [
        StopAtNonFiniteLoss(saver),
        LabelCheck(classes, config.data is None and config.eval_dataset.ignore_background),
        SpeedMonitor(window_size=20),
        LRMonitor(),
    ]
    if torch.cuda.is_available():
        callbacks.append(MemoryMonitor())
    pictures = Pictures(classes, config.pictures, folder) if config.pictures else None
    curves = Curves(folder)
    callbacks += [pictures, curves] if pictures else [curves]
    if config.train_metrics_interval:
        callbacks.append(TrainMIoU(config.train_metrics_interval, num_classes))
    if folder and config.is_train:  # an evaluation leaves the page of the run that trained
        from training.report import Report

        callbacks.append(Report(config, classes, folder, curves, pictures))
    return [
        *callbacks,
        ClassTable(classes, folder if config.class_table_csv else None),
        RunRecord(asdict(config), classes, loggers),
    ]


def saver_of(state: State) -> Checkpoints | None:
    """Return the callback that saves a run's checkpoints, or None.

    It is found by name, as Composer finds it in a checkpoint, so that a run that saves nothing need
    not import it.
    """
    return next((c for c in state.callbacks if type(c).__qualname__ == "Checkpoints"), None)  # pyright: ignore[reportReturnType]


def summary(trainer: Trainer) -> str:
    """Say what a run reached and left behind, a line each."""
    lines = []
    callbacks = trainer.state.callbacks
    miou = trainer.state.eval_metric_values.get("MIoU")
    if miou is not None:
        # A caller of main() may have added a Curves of its own, or one that has seen nothing yet.
        evaluations = next((c.eval for c in callbacks if isinstance(c, Curves) and c.eval), [])
        first = evaluations[0][1] if len(evaluations) > 1 and evaluations[0][0] == 0 else None
        before = "" if first is None or math.isnan(first) else f"{first:.2f} before, "
        now = "none: no validation pixel has a class" if math.isnan(miou) else f"{miou:.2f} now"
        lines.append(f"mIoU: {before}{now}")
    saver = saver_of(trainer.state)
    if saver and saver.ended:
        lines.append(f"ended early: {saver.best.metric} was no better for {saver.ended}")
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
