"""The page `report.html` with the results of a run, for users without a logging service."""

from __future__ import annotations

import base64
import datetime
import html
import io
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

import composer
import torch
import yaml
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from PIL import Image

from segmentation.classes import ClassInfo
from segmentation.metrics import MIoU, class_table
from training.config import network_label
from training.pictures import Curves, Pictures, save_to_run
from training.precision import devices
from training.schema import Config

PAGE = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))


class Report(Callback):
    """A callback that writes the results of a run to a single HTML file.

    The file is written after each evaluation and at the end of training. All images are embedded,
    so the file needs no other files. Earlier evaluations come from `curves`, so a resumed run
    reports its complete history.

    Args:
        config: Config of the run.
        classes: Names and colours of the classes.
        folder: Folder or object-store URI for `report.html`.
        curves: Callback that draws the curves. It must precede this callback in the list of
            callbacks.
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
        self._table = ""

    def eval_end(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() != 0:
            return
        metric = state.eval_metrics.get(state.dataloader_label or "", {}).get("MIoU")
        if isinstance(metric, MIoU) and metric.total_matrix is not None:
            self._table = _table(class_table(metric.total_matrix, self.classes), self.classes)
        self._write(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            self._write(state)

    def _write(self, state: State) -> None:
        curves, sheet = self.curves.drawn, self.pictures.sheet if self.pictures else None
        parts = {
            "title": html.escape(state.run_name),
            "facts": _facts(self.config, self.curves, state),
            "curves": "",
            "pictures": "",
            "classes": self._table,
            "config": html.escape(yaml.safe_dump(asdict(self.config), sort_keys=False)),
        }
        if curves:
            alt = "Loss, learning rate and mIoU over the batches"
            parts["curves"] = _image("Curves", curves, "png", alt)
        if sheet is not None:
            alt = "Validation images, their masks, the predictions, and where they differ"
            parts["pictures"] = _image("Newest pictures", _jpeg(sheet), "jpeg", alt)
        page = PAGE.substitute(parts)
        self.latest = save_to_run(page.encode(), self.folder, "report.html", state)


def _facts(config: Config, curves: Curves, state: State) -> str:
    """Return facts about a run and its results, as the items of an HTML description list."""
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
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<h2>{heading}</h2>\n<img src="{source}" alt="{alt}">'


def _jpeg(sheet: Image.Image) -> bytes:
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=90)
    return data.getvalue()


def _table(found: tuple[list[str], list[list[Any]]], classes: Sequence[ClassInfo]) -> str:
    """Return the class table as HTML; a click on a column title sorts the table."""
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
