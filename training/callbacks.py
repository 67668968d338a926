"""What is looked at while training: pictures, curves, the table of classes, training mIoU.

All are Composer callbacks. None makes the training step wait for the device, and none writes from
any process but the first.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from composer.callbacks import LRMonitor, MemoryMonitor, SpeedMonitor
from composer.core import Callback, State, get_precision_context
from composer.loggers import ConsoleLogger, FileLogger, Logger
from composer.utils import (
    dist,
    format_name_with_dist,
    maybe_create_object_store_from_uri,
    parse_uri,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from checkpointing.saver import Checkpoints, saver_of
from errors import RunError
from segmentation.classes import ClassInfo, classes_to_json
from segmentation.drawing import prediction_sheet
from segmentation.metrics import (
    MIoU,
    class_table,
    confusion_matrix,
    mean_iou,
    table_as_csv,
)
from segmentation.network import main_logits
from training.config import class_infos
from training.schema import Config

if TYPE_CHECKING:
    from composer import Trainer


log = logging.getLogger(__name__)


def save_file(data: bytes, folder: str, name: str) -> str | None:
    """Write a file into a folder or below an object store's URI; it appears whole or not at all.

    What a callback writes is worth less than the run: where it cannot be written, a warning says so
    and training goes on.

    Returns:
        Where the file is, or None.
    """
    path = os.path.join(folder, name)
    try:
        if "://" in folder:
            store = maybe_create_object_store_from_uri(folder)
            assert store is not None
            with tempfile.NamedTemporaryFile() as file:
                file.write(data)
                file.flush()
                store.upload_object(parse_uri(path)[2], file.name)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(f"{path}.unfinished", "wb") as file:
                file.write(data)
            os.replace(f"{path}.unfinished", path)
    except Exception as error:  # an object store raises what its client does
        log.warning("cannot write %s: %s", path, error)
        return None
    return path


def _save(data: bytes, folder: str, name: str, state: State) -> str | None:
    """Write a file; `{run_name}` in the folder is filled in, and `{time}` in the name."""
    time = f"ep{state.timestamp.epoch.value}-ba{state.timestamp.batch.value}"
    folder = format_name_with_dist(folder, state.run_name)
    return save_file(data, folder, name.format(time=time))


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


class Pictures(Callback):
    """At each evaluation, draws some fixed validation photos with their masks and predictions.

    The photos are spread evenly over the validation set and the same at every evaluation. They pass
    through the network once more, on the first process, with the weights that are evaluated: at
    `EVAL_START` EMA has put its own in place.

    Args:
        classes: Names and colours of the classes.
        count: How many photos.
        folder: Folder or object-store URI that `pictures/ep{epoch}-ba{batch}.png` goes below; the
            picture goes to the loggers in any case.

    Attributes:
        latest: Where the newest picture is, or None.
    """

    def __init__(self, classes: Sequence[ClassInfo], count: int = 4, folder: str | None = None):
        self.classes = classes
        self.count = count
        self.folder = folder
        self.latest: str | None = None
        self._batches: dict[str | None, list[tuple[Tensor, Tensor]]] = {}

    def eval_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() != 0 or self.count == 0:
            return
        label = state.dataloader_label
        evaluator = next((e for e in state.evaluators if e.label == label), None)
        if evaluator is None:
            return
        spec = evaluator.dataloader
        if label not in self._batches:
            loader = cast(DataLoader, spec.dataloader)
            dataset = cast(Sequence[Any], loader.dataset)
            places = (np.arange(self.count) + 0.5) * len(dataset) / self.count
            self._batches[label] = [
                loader.collate_fn([dataset[i]]) for i in np.unique(places.astype(int)).tolist()
            ]
        photos, targets, predictions = [], [], []
        for batch in self._batches[label]:
            photos.append(batch[0][0].permute(1, 2, 0).numpy())
            target, prediction = self._predict(state, spec, batch)
            targets.append(target)
            predictions.append(prediction)
        sheet = prediction_sheet(photos, targets, predictions, self.classes)
        # With this shape and type every one of Composer's loggers takes an image.
        logger.log_images(
            np.array(sheet), name=f"pictures/{label}", channels_last=True, use_table=False
        )
        if self.folder is not None:
            data = io.BytesIO()
            sheet.save(data, "PNG")
            self.latest = _save(data.getvalue(), self.folder, "pictures/{time}.png", state)

    @staticmethod
    def _predict(state: State, spec: Any, batch: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the target and the predicted classes of a batch of one, (H, W) each."""
        batch = spec.batch_transforms(tuple(part.clone() for part in batch))
        batch = spec.microbatch_transforms(state.device.batch_to_device(batch))
        with get_precision_context(state.precision, state.precision_config):
            # The network itself: DistributedDataParallel's forward waits for the other processes.
            # Its forward: the compiled call would be compiled again for a batch of one.
            model = cast(nn.Module, state.model.module) if state.is_model_ddp else state.model
            logits = cast(nn.Module, model.module).forward(batch[0])
        size = batch[1].shape[1:]
        logits = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
        return batch[1][0].cpu().numpy(), logits.argmax(1)[0].cpu().numpy()


class Curves(Callback):
    """Keeps `curves.png`: loss, learning rate and mIoU of the whole run, across resumes.

    The numbers are part of the checkpoint (12 bytes a batch), so a run that goes on from one draws
    exactly what it has trained, wherever it goes on.

    Args:
        folder: Folder or object-store URI that `curves.png` goes into, or None.
    """

    def __init__(self, folder: str | None = None):
        self.folder = folder
        self.train: list[tuple[int, float, float]] = []  # batches done, loss, learning rate
        self.eval: list[tuple[int, float]] = []  # batches done, mIoU in percent
        self._learning_rate = float("nan")

    def batch_start(self, state: State, logger: Logger) -> None:
        self._learning_rate = float(state.optimizers[0].param_groups[0]["lr"])

    def batch_end(self, state: State, logger: Logger) -> None:
        # Composer has the loss of the batch on the host by now, to log it.
        loss = (state.total_loss_dict or {}).get("loss/train/total", float("nan"))
        self.train.append((state.timestamp.batch.value, float(loss), self._learning_rate))

    def eval_end(self, state: State, logger: Logger) -> None:
        metric = state.eval_metrics.get(state.dataloader_label or "", {}).get("MIoU")
        if metric is not None:
            self.eval.append((state.timestamp.batch.value, float(metric.compute())))
        self._draw(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._draw(state)

    def state_dict(self) -> dict[str, Any]:
        return {"train": torch.tensor(self.train), "eval": torch.tensor(self.eval)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.train = [(int(batch), loss, rate) for batch, loss, rate in state["train"].tolist()]
        self.eval = [(int(batch), miou) for batch, miou in state["eval"].tolist()]

    def _draw(self, state: State) -> None:
        if self.folder is not None and dist.get_global_rank() == 0 and self.train:
            _save(draw_curves(self.train, self.eval), self.folder, "curves.png", state)


def draw_curves(
    train: Sequence[tuple[int, float, float]], evaluations: Sequence[tuple[int, float]]
) -> bytes:
    """Loss, learning rate and mIoU over the batches, as a PNG.

    Args:
        train: Batches done, loss, and learning rate, a row a batch.
        evaluations: Batches done and mIoU in percent, a row an evaluation.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, and no pyplot
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), dpi=100, layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    batch, loss, rate = np.array(train, np.float64).reshape(-1, 3).T
    at, miou = np.array(evaluations, np.float64).reshape(-1, 2).T
    dots = dict(marker="o", markersize=4)
    if len(batch):
        window = max(1, len(loss) // 50)
        padded = np.pad(loss, (window - 1, 0), "edge")
        smooth = np.convolve(padded, np.ones(window) / window, "valid")
        few = dots if len(batch) == 1 else {}
        axes[0].plot(batch, loss, color="#b0c4de", linewidth=0.8, label="each batch", **few)
        axes[0].plot(batch, smooth, color="#1f4e79", label=f"mean of {window}")
        axes[0].set_title(f"training loss, {smooth[-1]:.4g} at the end", loc="left")
        axes[0].legend(frameon=False)
        axes[1].plot(batch, rate, color="#b8860b", **few)
        axes[1].set_ylim(0, 1.1 * max(rate.max(), 1e-12))
        axes[1].set_title(f"learning rate, {rate[-1]:.3g} at the end", loc="left")
    if len(at):
        best = int(miou.argmax())
        axes[2].plot(at, miou, color="#2e7d32", **dots)
        title = f"mIoU, {miou[-1]:.2f}% at the end, best {miou[best]:.2f}% (batch {at[best]:.0f})"
        axes[2].set_title(title, loc="left")
        axes[2].set_ylim(bottom=0)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].set_xlabel("batch")
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()


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
            _save(text.encode(), self.folder, "classes/{time}.csv", state)


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

    `evaluate.py`, `predict.py` and `export.py` read them there and need no YAML.
    """

    def __init__(self, config: Mapping[str, Any], classes: Sequence[ClassInfo]):
        self._record = {"config": json.dumps(config), "classes": classes_to_json(classes)}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._record)


def build_callbacks(config: Config, saver: Checkpoints | None) -> list[Callback]:
    """Build what watches a run: its loss, speed, learning rate and memory, and what is drawn."""
    num_classes = config.model.num_classes
    classes = class_infos(config)
    folder = config.save_folder
    callbacks: list[Callback] = [
        StopAtNonFiniteLoss(saver),
        SpeedMonitor(window_size=20),
        LRMonitor(),
    ]
    if torch.cuda.is_available():
        callbacks.append(MemoryMonitor())
    if config.pictures:
        callbacks.append(Pictures(classes, config.pictures, folder))
    if config.train_metrics_interval:
        callbacks.append(TrainMIoU(config.train_metrics_interval, num_classes))
    return [
        *callbacks,
        Curves(folder),
        ClassTable(classes, folder if config.class_table_csv else None),
        RunRecord(asdict(config), classes),
    ]


def summary(trainer: Trainer) -> str:
    """Say what a run reached and left behind, a line each."""
    lines = []
    callbacks = trainer.state.callbacks
    miou = trainer.state.eval_metric_values.get("MIoU")
    if miou is not None:
        (evaluations,) = (c.eval for c in callbacks if isinstance(c, Curves))
        first = evaluations[0][1] if len(evaluations) > 1 and evaluations[0][0] == 0 else None
        before = "" if first is None else f"{first:.2f} before, "
        lines.append(f"mIoU: {before}{miou:.2f} now")
    saver = saver_of(trainer.state)
    if saver and saver.ended:
        lines.append(f"ended early: {saver.best.metric} was no better for {saver.ended}")
    if saver and saver.best_name:
        best, path = saver.best, f"{saver.target.path}/{saver.best_name}"
        lines.append(f"best {best.metric}: {best.value:.2f} after batch {best.batch}, {path}")
    if trainer.saved_checkpoints:
        lines.append(f"checkpoint: {trainer.saved_checkpoints[-1]}")
    lines += [f"pictures: {c.latest}" for c in callbacks if isinstance(c, Pictures) and c.latest]
    return "\n".join(lines)
