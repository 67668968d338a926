"""Tests of training/report.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from segmentation.classes import load_classes
from segmentation.metrics import MIoU, class_table
from tests.support.paths import ROOT
from tests.support.run_report import Page, run  # noqa: F401
from training.report import _table

CLASSES = ROOT / "yamls" / "demo_classes.txt"


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
