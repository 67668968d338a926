"""Tests of training/error_analysis.py."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segmentation.classes import load_classes
from segmentation.metrics import confusion_matrix_of_predictions
from training.error_analysis import COLUMNS, ErrorAnalysis, draw_confusion, scores_as_csv

CLASSES = load_classes(["road", "car", "tree"], 3)


def analyse(keep: int = 0) -> ErrorAnalysis:
    """Score four 10 x 10 predictions: correct, half correct, unlabelled and wrong."""
    analysis = ErrorAnalysis(CLASSES, lambda index: f"images/{index}.png", keep)
    image = np.zeros((10, 10, 3), np.uint8)
    road, car, none = (torch.full((10, 10), value) for value in (0, 1, -1))
    half = road.clone()
    half[:5] = 1
    for index, target, prediction in (
        (0, road, road),
        (3, car, road),
        (1, road, half),
        (2, none, road),
    ):
        counts = confusion_matrix_of_predictions(prediction, target, 3)
        analysis.add(index, lambda: image, target, prediction, counts)
    return analysis


def test_image_scores_match_values_computed_by_hand() -> None:
    scores = analyse().gather()
    assert [score.index for score in scores] == [0, 1, 2, 3]
    assert [score.miou for score in scores] == [100, 25, None, 0]
    assert [score.accuracy for score in scores] == [100, 50, None, 0]
    assert [score.pixels for score in scores] == [100, 100, 0, 100]
    assert [score.confusion for score in scores] == [
        None,
        (0, 1, 50, 50.0),
        None,
        (1, 0, 100, 100.0),
    ]


def test_scores_file_has_a_row_per_image() -> None:
    rows = list(csv.reader(scores_as_csv(analyse().gather(), CLASSES).splitlines()))
    assert rows == [
        list(COLUMNS),
        ["images/0.png", "100.0000", "100.0000", "100", "", "", ""],
        ["images/1.png", "25.0000", "50.0000", "100", "road", "car", "50.0000"],
        ["images/2.png", "", "", "0", "", "", ""],
        ["images/3.png", "0.0000", "0.0000", "100", "car", "road", "100.0000"],
    ]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (1, ["01_3.jpg"]),
        (2, ["01_3.jpg", "02_1.jpg"]),
        (9, ["01_3.jpg", "02_1.jpg", "03_0.jpg"]),
    ],
)
def test_images_with_the_lowest_scores_are_drawn(
    tmp_path: Path, keep: int, expected: list[str]
) -> None:
    analysis = analyse(keep)
    analysis.draw(analysis.gather(), tmp_path / "worst")
    assert sorted(path.name for path in (tmp_path / "worst").iterdir()) == expected
    with Image.open(tmp_path / "worst" / "01_3.jpg") as sheet:
        assert sheet.height >= 360 and sheet.width > 4 * 360


@pytest.mark.parametrize("count", [2, 12, 150])
def test_drawn_confusion_matrix_is_normalised_by_rows(count: int):
    classes = load_classes([f"class {i}" for i in range(count)], count)
    matrix = np.eye(count, dtype=int)
    matrix[1] = 0
    matrix[1, 0] = 7  # Class 1 is always predicted as class 0.
    page = np.array(draw_confusion(matrix, classes)).astype(int)
    cell = max(16, min(48, 960 // count))
    left, top = page.shape[1] - cell // 2 - cell * count, cell // 2

    def shade(row: int, column: int) -> list[int]:
        return page[top + row * cell + 2, left + column * cell + 2].tolist()

    assert shade(0, 0) == shade(1, 0) == [8, 48, 107]
    assert shade(1, 1) == shade(0, 1) == [255, 255, 255]
