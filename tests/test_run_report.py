"""A run's report.html: all on one page, and nothing in it but what the run says."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from artifacts import finished_run
from PIL import Image

from segmentation.classes import load_classes
from segmentation.metrics import MIoU, class_table
from training.callbacks import build_callbacks
from training.config import resolve
from training.report import Report, _table

pytestmark = pytest.mark.trains
CLASSES = Path(__file__).parent.parent / "yamls" / "demo_classes.txt"


class Page(HTMLParser):
    """What a page holds: texts by tag, the cells of its rows, its images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self.images: list[Image.Image] = []
        self.links: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")
        elif tag == "img":
            source = str(dict(attrs)["src"])
            data = base64.b64decode(re.sub("^data:image/(png|jpeg);base64,", "", source))
            self.images.append(Image.open(io.BytesIO(data)))
        if tag not in ("meta", "img"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")
        self.links += [str(value) for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            self.texts[tag][-1] += data
        if "td" in self._open:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def run() -> tuple[Any, str]:
    return finished_run()


def test_everything_is_on_the_page(run: tuple[Any, str]) -> None:
    trainer, folder = run
    (report,) = (c for c in trainer.state.callbacks if isinstance(c, Report))
    assert report.latest == f"{folder}/report.html"
    page = Page(Path(report.latest).read_text(encoding="utf-8"))
    assert page.texts["h1"] == [trainer.state.run_name]
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    miou = trainer.state.eval_metric_values["MIoU"]
    assert facts["mIoU"].startswith(f"{miou:.2f}%; best ")
    assert facts["Progress"].startswith(f"batch {trainer.state.timestamp.batch.value}, ")
    assert facts["Images a second"].endswith("loading included")
    # The curves and the newest picture, whole and inside.
    drawn = [Image.open(io.BytesIO(report.curves.drawn or b"")).size]
    assert report.pictures is not None and report.pictures.sheet is not None
    drawn.append(report.pictures.sheet.size)
    assert [image.size for image in page.images] == drawn
    for image in page.images:
        image.load()
    assert all(link.startswith("data:image/") for link in page.links)
    written = yaml.safe_load(page.texts["pre"][0])
    assert written["model"]["num_classes"] == 12 and written["save_folder"]


def test_the_table_has_the_scores_of_the_newest_evaluation(run: tuple[Any, str]) -> None:
    trainer, folder = run
    page = Page(Path(folder, "report.html").read_text(encoding="utf-8"))
    metric = trainer.state.eval_metrics["eval"]["MIoU"]
    assert isinstance(metric, MIoU) and metric.total_matrix is not None
    _, rows = class_table(metric.total_matrix, load_classes(str(CLASSES), 12))
    expected = [
        [name, *("-" if v is None else f"{v:.2f}" for v in shares), f"{pixels:,}"]
        for name, *shares, pixels in rows
    ]
    assert page.rows[0] == [] and page.rows[1:] == expected  # the first has the titles


def test_a_name_is_text_whatever_it_is() -> None:
    name = "<script>alert(1)</script>&"
    classes = load_classes([name, "b"], 2)
    text = _table((["class", "IoU", "pixels"], [[name, 1.5, 2], ["b", None, 0]]), classes)
    page = Page(text)
    assert "script" not in page.texts
    assert page.rows[1:] == [[name, "1.50", "2"], ["b", "-", "0"]]


@pytest.mark.parametrize("is_train", [True, False])
def test_an_evaluation_alone_leaves_the_page(tiny: dict[str, Any], is_train: bool) -> None:
    config = resolve(tiny | {"save_folder": "runs/x"})
    config.is_train = is_train
    built = build_callbacks(config, None)
    assert any(isinstance(callback, Report) for callback in built) == is_train


@pytest.mark.parametrize("save_folder", ["runs/x", "s3://bucket/x"])
def test_an_evaluation_alone_leaves_pictures_and_tables(
    tiny: dict[str, Any], save_folder: str
) -> None:
    """Each name of a training run's first evaluation is one of an evaluation alone as well."""
    config = resolve(tiny | {"save_folder": save_folder, "pictures": 2, "class_table_csv": True})
    folders = []
    for config.is_train in (True, False):
        built = build_callbacks(config, None)
        folders.append({vars(c)["folder"] for c in built if vars(c).get("folder")})
    assert folders == [{save_folder}, {f"{save_folder}/evaluation"}]
