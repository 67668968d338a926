"""Tests of segmentation/drawing.py."""

import numpy as np
import pytest

from segmentation.classes import (
    PAPER,
    WRONG,
    ClassInfo,
    load_classes,
)
from segmentation.drawing import (
    INK,
    VideoOverlay,
    colorize,
    draw_legend,
    draw_overlay,
    prediction_sheet,
    tint,
)

NAMES = ["sky", "road", "Straßenlaterne", "tree"]


def test_masks_are_drawn_in_class_colours():
    classes = load_classes(NAMES, 4)
    mask = np.array([[0, 3, -1, 255]])
    expected = [classes[0].color, classes[3].color, (0, 0, 0), (0, 0, 0)]
    assert colorize(mask, classes)[0].tolist() == [list(color) for color in expected]
    # Unlabelled pixels show the image, and a line separates two classes.
    image = np.full((4, 8, 3), 100, np.uint8)
    mask = np.full((4, 8), -1)
    assert (tint(image, mask, classes) == 100).all()
    mask[:, :4], mask[:, 4:] = 0, 1
    tinted = tint(image, mask, classes, alpha=0.5)
    assert (tinted[:, 4] == 255).all()
    assert np.abs(tinted[0, 0] - (100 + np.array(classes[0].color)) / 2).max() <= 1


def test_legend_is_sorted_by_area():
    classes = load_classes(NAMES, 4)
    mask = np.repeat([2, 0, 3], [60, 39, 1])[None]  # class 1 does not occur
    panel = np.array(draw_legend([mask], classes, 100))
    places = {}
    for index in range(4):
        rows = np.where((panel == classes[index].color).all(2).any(1))[0]
        places[index] = rows.min() if len(rows) else None
    assert places[1] is None
    assert places[2] < places[0] < places[3]


@pytest.mark.parametrize("height", [3, 30, 400, 3000])
@pytest.mark.parametrize("count", [1, 7, 150])
def test_legend_text_is_not_cut_off(height: int, count: int):
    classes = [ClassInfo(f"a class with a rather long name, {i}", (0, 0, 0)) for i in range(count)]
    panel = np.array(draw_legend([np.arange(count)[None]], classes, height))
    assert panel.shape[0] >= height
    for edge in (panel[:2], panel[-2:], panel[:, :2], panel[:, -2:]):
        assert (edge == PAPER).all()
    # Each entry has its own box, and boxes do not overlap.
    assert (panel == 0).all(2).sum() > 50 * count


def test_legend_groups_tiny_classes():
    classes = load_classes(None, 150)
    mask = np.zeros((200, 200), int)
    mask[0, :100] = np.arange(100)
    few = draw_legend([mask], classes, 400)
    all_of_one = draw_legend([mask * 0], classes, 400)
    assert few.width < 2 * all_of_one.width + 60 and few.height == 400


@pytest.mark.parametrize("shape", [(30, 40), (2, 500), (1, 1), (480, 640), (2000, 3000)])
def test_overlay_can_be_drawn_at_any_size(shape: tuple[int, int]):
    classes = load_classes(NAMES, 4)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    prediction = np.zeros(shape, np.uint8)
    prediction[: shape[0] // 2] = 2
    overlay = draw_overlay(image, prediction, classes)
    factor = max(1, 320 // max(shape))
    assert overlay.width > shape[1] * factor and overlay.height >= shape[0] * factor
    assert max(overlay.size) >= 320
    assert (np.array(overlay)[-1, -2:] == PAPER).all()


def test_prediction_sheet_marks_wrong_pixels():
    classes = load_classes(NAMES, 4)
    image = np.full((240, 240, 3), 128, np.uint8)
    target = np.zeros((240, 240), int)
    target[:, :60] = -1
    prediction = np.zeros((240, 240), int)
    prediction[:120] = 1

    def share_wrong(prediction: np.ndarray) -> float:
        sheet = np.array(prediction_sheet([image], [target], [prediction], classes))
        panel = sheet[22:262, 3 * 246 : 3 * 246 + 240]
        assert (panel[:, :60] == 0).all()  # unlabelled pixels
        return float((panel == WRONG).all(2).mean())

    assert share_wrong(prediction) == 0.375
    assert share_wrong(np.zeros((240, 240), int)) == 0
    two = prediction_sheet([image] * 2, [target] * 2, [prediction] * 2, classes)
    assert two.height == 2 * 262


@pytest.mark.parametrize(("side", "is_named"), [(200, True), (12, False)])
def test_large_region_shows_its_class_name(side: int, is_named: bool):
    classes = [ClassInfo("floor", (10, 20, 30)), ClassInfo("door", (200, 120, 90))]
    mask = np.zeros((320, 320), int)
    mask[60 : 60 + side, 60 : 60 + side] = 1
    picture = np.array(draw_overlay(np.full((320, 320, 3), 128, np.uint8), mask, classes))
    inside = picture[63 : 57 + side, 63 : 57 + side]  # without the outline
    colors = {tuple(color) for color in inside.reshape(-1, 3).tolist()}
    assert ({PAPER, INK} <= colors) is is_named
    assert (len(colors) == 1) is not is_named


def test_long_video_legend_counts_the_omitted_classes():
    pages = []
    for count in (100, 101):
        classes = [ClassInfo(f"class {i:03}", (0, i, 0)) for i in range(count)]
        mask = np.arange(320 * 320).reshape(320, 320) % count
        pages.append(VideoOverlay(classes, 320, 320)(np.zeros((320, 320, 3), np.uint8), mask))
    legends = [page[:, 320:] for page in pages]
    assert legends[0].shape == legends[1].shape == (320, legends[0].shape[1], 3)
    differs = np.where((legends[0] != legends[1]).any(2).any(1))[0]
    # The two legends show the same classes, so only the number in the last line differs.
    assert differs.min() > 240 and differs.max() < 320
