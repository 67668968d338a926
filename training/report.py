"""The page `report.html` with the results of a run, for users without a logging service."""

from __future__ import annotations

import base64
import datetime
import functools
import html
import itertools
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any, cast

import composer
import numpy as np
import torch
import yaml
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from files import encode_image
from segmentation.classes import ClassInfo
from segmentation.metrics import MIoU, class_table, confusion_matrix_of_predictions
from training.config import network_label
from training.error_analysis import ErrorAnalysis, draw_confusion, image_name
from training.pictures import Curves, Pictures, evaluation_data, save_to_run
from training.precision import devices
from training.schema import Config

PAGE = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))


class Report(Callback):
    """A callback that writes the results of a run to a single HTML file.

    The file is written after each evaluation and at the end of training. All images are embedded,
    so that a single file contains everything. Results from before a resume come from `curves`, so
    the report always covers the whole run.

    Args:
        config: Config of the run.
        classes: Names and colours of the classes.
        folder: Folder or object-store URI for `report.html`.
        curves: Callback that draws the curves. The list of callbacks must contain `curves` before
            this callback.
        pictures: Callback that draws validation images, or None.
    """

    def __init__(
        self,
        config: Config,
        classes: Sequence[ClassInfo],
        folder: str,
        curves: Curves,
        pictures: Pictures | None,
    ) -> None:
        self.config, self.classes, self.folder = config, classes, folder
        self.curves, self.pictures = curves, pictures
        self.latest: str | None = None
        self._table = self._confusion = self._worst = ""
        self._analysis: ErrorAnalysis | None = None

    def eval_start(self, state: State, logger: Logger) -> None:
        if self.config.pictures:
            # Use the image's index as its name for now, because looking up a file name may read a
            # shard. Later, the report looks up the names of the drawn images only.
            self._analysis = ErrorAnalysis(self.classes, str, self.config.pictures)

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        if self._analysis is None:
            return
        images, targets = state.batch
        model = cast(Any, state.model.module if state.is_model_ddp else state.model)
        # The metrics share these predictions, so that the logits are upsampled only once.
        predictions = model.score(state.outputs, targets).prediction
        transform = cast(Any, evaluation_data(state)).microbatch_transforms
        counts = [
            confusion_matrix_of_predictions(prediction, target, len(self.classes))
            for target, prediction in zip(targets, predictions, strict=True)
        ]
        # Copy all counts in one go, because each copy makes the CPU wait for the GPU.
        batch = zip(images, targets, predictions, torch.stack(counts).cpu(), strict=True)
        for image, target, prediction, matrix in batch:
            # `dataset.sampler.EvalSampler` gives the samples to the ranks in turn, so the rank
            # determines the index of this image.
            number = len(self._analysis.scores) * dist.get_world_size() + dist.get_global_rank()
            # The sampler repeats a few samples so that all ranks get the same number. Skip the
            # repeats.
            if number >= len(cast(Any, state.dataloader).dataset):
                break
            pixels = functools.partial(_undo_normalisation, image, transform)
            self._analysis.add(number, pixels, target, prediction, matrix)

    def eval_end(self, state: State, logger: Logger) -> None:
        if self._analysis is not None:
            dataset = cast(Any, state.dataloader).dataset
            self._worst = _figures(self._analysis, functools.partial(image_name, dataset))
            self._analysis = None  # Free the memory used by the images.
        if dist.get_global_rank() != 0:
            return
        metric = state.eval_metrics.get(state.dataloader_label or "", {}).get("MIoU")
        if isinstance(metric, MIoU) and metric.total_matrix is not None:
            matrix = metric.total_matrix
            self._table = _table(class_table(matrix, self.classes), self.classes)
            alt = "Share of each class's pixels that is predicted as each class"
            heading = "Confusion matrix: masks in rows, predictions in columns"
            drawn = draw_confusion(matrix.cpu().numpy(), self.classes)
            self._confusion = _image(heading, encode_image(".png", drawn), "png", alt)
        self._write(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            self._write(state)

    def _write(self, state: State) -> None:
        curves = pictures = ""
        if self.curves.drawn:
            alt = "Loss, learning rate and mIoU over the batches"
            curves = _image("Curves", self.curves.drawn, "png", alt)
        if self.pictures and self.pictures.sheet:
            alt = "Validation images, their masks, the predictions, and where they differ"
            sheet = encode_image(".jpg", self.pictures.sheet, quality=90)
            pictures = _image("Newest pictures", sheet, "jpeg", alt)
        page = PAGE.substitute(
            title=html.escape(state.run_name),
            facts=_facts(self.config, self.curves, state),
            curves=curves,
            pictures=pictures,
            classes=self._table,
            confusion=self._confusion,
            worst=self._worst,
            config=html.escape(yaml.safe_dump(asdict(self.config), sort_keys=False)),
        )
        self.latest = save_to_run(page.encode(), self.folder, "report.html", state)


def _facts(config: Config, curves: Curves, state: State) -> str:
    """Return the main facts about a run and its results as items of an HTML description list."""
    time, facts = state.timestamp, {}
    if curves.eval:
        facts["mIoU"] = _miou(curves.eval)
    facts["Progress"] = (
        f"batch {time.batch.value}, epoch {time.epoch.value}; to {config.max_duration}"
    )
    facts["Recipe"] = config.recipe_name or "none"
    facts["Network"] = network_label(config)
    facts["Data"] = str(config.train_dataset.path)
    seconds = time.total_wct.total_seconds()
    if seconds:
        facts["Training time"] = str(datetime.timedelta(seconds=round(seconds)))
        facts["Images per second"] = f"{time.sample.value / seconds:.1f}, including loading"
    facts["Machine"] = devices(dist.get_world_size())
    facts["Software"] = (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"Composer {composer.__version__}"
    )
    facts["Written"] = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    items = [f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items()]
    return "\n".join(items)


def _miou(evaluations: Sequence[tuple[int, float]]) -> str:
    """Return the newest and the best mIoU as text, or "-" for a missing value."""
    scored = [one for one in evaluations if not math.isnan(one[1])]
    if not scored:
        return "-"
    batch, best = max(scored, key=lambda one: one[1])
    now = evaluations[-1][1]
    return f"{'-' if math.isnan(now) else f'{now:.2f}%'}; best {best:.2f}% after batch {batch}"


def _image(heading: str, data: bytes, kind: str, alt: str) -> str:
    return f"<h2>{heading}</h2>\n{_img(data, kind, alt)}"


def _img(data: bytes, kind: str, alt: str) -> str:
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img src="{source}" alt="{alt}">'


def _undo_normalisation(image: Tensor, transform: Any) -> np.ndarray:
    """Undo the normalisation of an image (3, H, W); return it as (H, W, 3) uint8."""
    pixels = image / transform.scale[0] + transform.mean[0]
    return pixels.round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()


def _figures(analysis: ErrorAnalysis, name: Callable[[int], str]) -> str:
    """Return HTML that shows the images with the lowest mIoU across all ranks, worst first."""
    own = []
    for place, score, sheet in analysis.pictures(analysis.gather(), height=240):
        caption = html.escape(f"{name(score.index)}: mIoU {score.miou:.2f}%")
        image = _img(encode_image(".jpg", sheet, quality=90), "jpeg", caption)
        own.append((place, f"<figure>{image}<figcaption>{caption}</figcaption></figure>"))
    figures = sorted(itertools.chain.from_iterable(dist.all_gather_object(own)))
    images = [text for _, text in figures]
    return "\n".join(["<h2>Images with the lowest mIoU</h2>", *images]) if images else ""


def _table(found: tuple[list[str], list[list[Any]]], classes: Sequence[ClassInfo]) -> str:
    """Return the class table as HTML, with column titles that sort the table when clicked."""
    columns, rows = found
    head = "".join(f'<th scope="col"><button>{name}</button></th>' for name in columns)
    lines = []
    for index, (info, (name, *numbers)) in enumerate(zip(classes, rows, strict=True)):
        color = "#{:02x}{:02x}{:02x}".format(*info.color)
        swatch = f'<span class="swatch" style="background: {color}"></span>'
        cells = f'<td data-value="{index}">{swatch}{html.escape(name)}</td>'
        for column, number in zip(columns[1:], numbers, strict=True):
            cells += _cell(number, column != "pixels")
        lines.append(f"<tr>{cells}</tr>")
    body = "\n".join(lines)
    return (
        "<h2>Classes, at the newest evaluation</h2>\n"
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    )


def _cell(number: float | None, is_percent: bool) -> str:
    if number is None:  # Show "-" for a class that does not occur in the data.
        return '<td data-value="-1">-</td>'
    if not is_percent:
        return f'<td data-value="{number}">{number:,}</td>'
    share = f'class="bar" style="--share: {number:.1f}%"'
    return f'<td {share} data-value="{number:.6f}">{number:.2f}</td>'
