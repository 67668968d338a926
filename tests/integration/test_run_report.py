"""A run's report.html contains its curves, pictures, scores and config in one file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from segmentation.classes import load_classes
from segmentation.metrics import MIoU, class_table
from tests.support.paths import ROOT
from tests.support.run_report import Page, run  # noqa: F401
from training.callbacks import build_callbacks
from training.config import resolve
from training.error_analysis import draw_confusion
from training.report import Report

pytestmark = pytest.mark.usefixtures("small_network")

CLASSES = ROOT / "yamls" / "demo_classes.txt"


def test_run_report_contains_scores_curves_pictures_and_config(run: tuple[Any, str]) -> None:
    trainer, folder = run
    (report,) = (c for c in trainer.state.callbacks if isinstance(c, Report))
    assert report.latest == f"{folder}/report.html"
    page = Page(Path(report.latest).read_text(encoding="utf-8"))
    assert page.texts["h1"] == [trainer.state.run_name]
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    miou = trainer.state.eval_metric_values["MIoU"]
    assert facts["mIoU"].startswith(f"{miou:.2f}%; best ")
    assert facts["Progress"].startswith(f"batch {trainer.state.timestamp.batch.value}, ")
    assert facts["Images per second"].endswith("including loading")
    # The page embeds the curves, the newest picture and the confusion matrix.
    image_sizes = [Image.open(io.BytesIO(report.curves.drawn or b"")).size]
    assert report.pictures is not None and report.pictures.sheet is not None
    image_sizes.append(report.pictures.sheet.size)
    metric = trainer.state.eval_metrics["eval"]["MIoU"]
    image_sizes.append(draw_confusion(metric.total_matrix.numpy(), report.classes).size)
    assert [image.size for image in page.images[:3]] == image_sizes
    # Then follow the two validation images with the lowest mIoU, the lowest first.
    captions = [text.partition(": mIoU ") for text in page.texts["figcaption"]]
    assert len(page.images) == 3 + len(captions) == 5
    assert all(Path(name).is_file() and "/validation/" in name for name, _, _ in captions)
    worst = [float(score.rstrip("%")) for _, _, score in captions]
    assert worst == sorted(worst) and worst[0] < miou
    for image in page.images:
        image.load()
    assert all(link.startswith("data:image/") for link in page.links)
    written = yaml.safe_load(page.texts["pre"][0])
    assert written["model"]["num_classes"] == 12 and written["save_folder"]


@pytest.mark.parametrize("is_train", [True, False])
def test_evaluation_alone_writes_no_report(tiny: dict[str, Any], is_train: bool) -> None:
    config = resolve(tiny | {"save_folder": "runs/x"})
    config.is_train = is_train
    built = build_callbacks(config, None)
    assert any(isinstance(callback, Report) for callback in built) == is_train


@pytest.mark.parametrize("save_folder", ["runs/x", "s3://bucket/x"])
def test_evaluation_alone_keeps_pictures_and_tables_of_the_run(
    tiny: dict[str, Any], save_folder: str
) -> None:
    """Each evaluation has its own folder, because the names of its files do not change."""
    config = resolve(tiny | {"save_folder": save_folder, "pictures": 2, "class_table_csv": True})
    folders = []
    for config.is_train in (True, False):
        built = build_callbacks(config, None)
        folders.append({vars(c)["folder"] for c in built if vars(c).get("folder")})
    assert folders == [{save_folder}, {f"{save_folder}/evaluation"}]


def test_table_in_report_has_scores_of_newest_evaluation(run: tuple[Any, str]) -> None:
    trainer, folder = run
    page = Page(Path(folder, "report.html").read_text(encoding="utf-8"))
    metric = trainer.state.eval_metrics["eval"]["MIoU"]
    assert isinstance(metric, MIoU) and metric.total_matrix is not None
    _, rows = class_table(metric.total_matrix, load_classes(str(CLASSES), 12))
    expected = [
        [name, *("-" if v is None else f"{v:.2f}" for v in shares), f"{pixels:,}"]
        for name, *shares, pixels in rows
    ]
    assert page.rows[0] == [] and page.rows[1:] == expected  # the first row has the column titles
