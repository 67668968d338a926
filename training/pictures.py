"""Callbacks that draw predictions for some validation images, and training curves.

Neither callback makes a training step wait for the GPU. Only the first rank writes files.
"""

from __future__ import annotations

import functools
import gc
import io
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from composer.core import Callback, DataSpec, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist, maybe_create_object_store_from_uri, parse_uri
from composer.utils.object_store import ObjectStore
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from errors import OutputError, UserError
from files import encode_image, is_remote, write_file
from segmentation.classes import ClassInfo

log = logging.getLogger(__name__)


def save_file(data: bytes, folder: str, name: str) -> str | None:
    """Write a file to a folder or an object store, where it appears only once it is complete.

    If the file cannot be written, log a warning and let training continue, because the run is more
    important than the file.

    Args:
        data: Content of the file.
        folder: Folder, or URI of an object store.
        name: Path of the file below `folder`.

    Returns:
        The path of the file, or None if it was not written.
    """
    path = os.path.join(folder, name)
    try:
        if is_remote(folder):
            store = _store(*parse_uri(folder)[:2], os.environ.get("S3_ENDPOINT_URL"))
            with tempfile.NamedTemporaryFile() as file:
                file.write(data)
                file.flush()
                store.upload_object(parse_uri(path)[2], file.name)
        else:
            write_file(path, data)
    except (OutputError, UserError) as error:
        log.warning("%s", error)
        return None
    except Exception as error:  # Object stores raise many different exceptions.
        log.warning("cannot write %s: %s", path, error)
        return None
    return path


@functools.lru_cache(maxsize=8)
def _store(backend: str, bucket: str, endpoint: str | None) -> ObjectStore:
    """Return the client of an object store.

    Clients are cached, because each S3 client takes 12 MB of memory.
    """
    store = maybe_create_object_store_from_uri(f"{backend}://{bucket}/")
    assert store is not None
    return store


def save_to_run(data: bytes, folder: str, name: str, state: State) -> str | None:
    """Write a run's file, replacing `{time}` in its name with the epoch and the batch."""
    time = f"ep{state.timestamp.epoch.value}-ba{state.timestamp.batch.value}"
    return save_file(data, folder, name.format(time=time))


def evaluation_data(state: State) -> DataSpec | None:
    """Return the data of the current evaluation, or None if its evaluator is not found."""
    label = state.dataloader_label
    return next((e.dataloader for e in state.evaluators if e.label == label), None)


class Pictures(Callback):
    """A callback that draws some validation images with their masks and predictions.

    The callback draws a picture at each evaluation. The images are spread evenly over the
    validation set and are the same each time. The first rank segments these images with the weights
    being evaluated. With EMA, these are the averaged weights, which the model contains from
    `EVAL_START` on.

    Args:
        classes: Names and colours of the classes.
        count: Number of images.
        folder: Folder or object-store URI in which to write `pictures/ep{epoch}-ba{batch}.png`, or
            None to only send the picture to the loggers.

    Attributes:
        latest: Path of the newest picture, or None.
        sheet: Newest picture, or None.
    """

    def __init__(self, classes: Sequence[ClassInfo], count: int = 4, folder: str | None = None):
        self.classes = classes
        self.count = count
        self.folder = folder
        self.latest: str | None = None
        self.sheet: Image.Image | None = None
        self._batches: dict[str | None, list[tuple[Tensor, Tensor]]] = {}

    def eval_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() != 0 or self.count == 0:
            return
        label, spec = state.dataloader_label, evaluation_data(state)
        if spec is None:
            return
        if label not in self._batches:
            loader = cast(DataLoader, spec.dataloader)
            dataset = cast(Sequence[Any], loader.dataset)
            places = (np.arange(self.count) + 0.5) * len(dataset) / self.count
            self._batches[label] = [
                loader.collate_fn([dataset[i]]) for i in np.unique(places.astype(int)).tolist()
            ]
        from segmentation.drawing import prediction_sheet

        parts = [self._predict(state, spec, batch) for batch in self._batches[label]]
        images, targets, predictions = zip(*parts, strict=True)
        self.sheet = sheet = prediction_sheet(images, targets, predictions, self.classes)
        # All of Composer's loggers accept a uint8 array of shape (H, W, 3).
        logger.log_images(
            np.array(sheet), name=f"pictures/{label}", channels_last=True, use_table=False
        )
        if self.folder is not None:
            data = encode_image(".png", sheet)
            self.latest = save_to_run(data, self.folder, "pictures/{time}.png", state)

    @staticmethod
    def _predict(state: State, spec: Any, batch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Segment a batch of one image; return the (H, W, 3) image, its target and prediction."""
        image = batch[0][0].permute(1, 2, 0).numpy()
        batch = spec.batch_transforms(tuple(part.clone() for part in batch))
        batch = spec.microbatch_transforms(state.device.batch_to_device(batch))
        with get_precision_context(state.precision, state.precision_config):
            # Bypass DistributedDataParallel, which would wait for the other ranks. Call `forward`
            # directly, because a compiled network would be compiled again for a batch of one image.
            model = cast(nn.Module, state.model.module) if state.is_model_ddp else state.model
            logits = cast(nn.Module, model.module).forward(batch[0])
        size = batch[1].shape[1:]
        logits = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
        return image, batch[1][0].cpu().numpy(), logits.argmax(1)[0].cpu().numpy()


class Curves(Callback):
    """A callback that writes `curves.png` with the loss, learning rate and mIoU of the run.

    Checkpoints contain all values (12 bytes per batch), so a resumed run draws the complete curves.

    Args:
        folder: Folder or object-store URI for `curves.png`, or None.

    Attributes:
        drawn: Content of `curves.png` on the first rank, or None.
    """

    def __init__(self, folder: str | None = None):
        self.folder = folder
        # One entry per batch: its number, the loss and the learning rate.
        self.train: list[tuple[int, float, float]] = []
        # One entry per evaluation: the batch number and the mIoU in percent.
        self.eval: list[tuple[int, float]] = []
        self.drawn: bytes | None = None
        # Numbers of batches and evaluations when the curves were last drawn.
        self._drawn_values = (0, 0)
        self._learning_rate = float("nan")

    def batch_start(self, state: State, logger: Logger) -> None:
        self._learning_rate = float(state.optimizers[0].param_groups[0]["lr"])

    def batch_end(self, state: State, logger: Logger) -> None:
        # Composer has already copied the loss to the CPU, so reading it does not wait for the GPU.
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
            # Draw the curves again only if there are new batches or evaluations.
            values = len(self.train), len(self.eval)
            if self.drawn is None or values != self._drawn_values:
                with _collected():
                    self.drawn = draw_curves(self.train, self.eval)
                self._drawn_values = values
            save_to_run(self.drawn, self.folder, "curves.png", state)


@contextmanager
def _collected() -> Iterator[None]:
    """Free the reference cycles that this context creates, such as matplotlib figures of 5 MB each.

    Python's automatic garbage collection runs so late that about 100 MB would pile up. This context
    collects only young objects, which is a hundred times faster than a full collection.
    """
    was_enabled = gc.isenabled()
    # Turn off automatic garbage collection. It would move these objects to an older generation, but
    # the collection below frees only the youngest.
    gc.disable()
    try:
        yield
    finally:
        gc.collect(0)
        if was_enabled:
            gc.enable()


def draw_curves(
    train: Sequence[tuple[int, float, float]], evaluations: Sequence[tuple[int, float]]
) -> bytes:
    """Plot the loss, the learning rate and the mIoU against the number of batches.

    Args:
        train: Rows with the number of batches done, the loss and the learning rate.
        evaluations: Rows with the number of batches done and the mIoU in percent.

    Returns:
        The content of a PNG file.
    """
    # Import matplotlib only when it is needed, and without pyplot, because the import takes half a
    # second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
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
    if len(at) and not np.isnan(miou).all():
        best = int(np.nanargmax(miou))
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
