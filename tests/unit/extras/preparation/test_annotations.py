"""Tests of extras/preparation/annotations.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from matplotlib.path import Path as Outline
from PIL import Image

from dataset.decoding import decode_image
from extras.preparation.annotations import Shape, draw, image_size, is_sound
from tests.support.convert_dataset import SIZE, shape  # noqa: F401
from tests.support.waits import short_measurement  # noqa: F401


def test_polygon_masks_match_matplotlib_except_at_the_outline() -> None:
    """COCO's rule and a point-in-polygon test differ only for pixels that the outline touches."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
        points = np.array([32, 24]) + 20 * np.stack([np.cos(angles), np.sin(angles)], 1)
        mask = draw([Shape("a", [points.ravel().tolist()])], SIZE, {"a": 1}, True)
        y, x = np.mgrid[: SIZE[0], : SIZE[1]]
        centers = np.stack([x.ravel() + 0.5, y.ravel() + 0.5], 1)
        inside = Outline(points).contains_points(centers).reshape(SIZE)
        edge = np.zeros(SIZE, np.uint8)
        shifted = np.round((points - 0.5) * 256).astype(np.int32)
        cv2.polylines(edge, [shifted], True, 1, thickness=2, shift=8)
        edge = cv2.dilate(edge, np.ones((3, 3), np.uint8))
        assert inside.sum() > 200
        np.testing.assert_array_equal(mask[edge == 0], inside[edge == 0])


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_image_size_includes_the_exif_rotation(
    suffix: str, orientation: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = tmp_path / f"image{suffix}"
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(image, exif=exif)
    assert image_size(image) == decode_image(image.read_bytes()).shape[:2]


def test_outline_far_outside_the_image_is_not_drawn() -> None:
    with pytest.raises(ValueError, match="is far outside the image; redraw or delete it"):
        draw([Shape("a", [[0, 0, 2e9, 0, 9, 9]])], SIZE, {"a": 1}, True)


@pytest.mark.parametrize(
    ("outline", "is_drawn"),
    [
        pytest.param([0, 0, 9, 0, 9, 9], True, id="inside the image"),
        pytest.param([-50, 0, 9, 0, 9, 60], True, id="near the image"),
        pytest.param([0, 0, 2e9, 0, 9, 9], False, id="far outside"),
        pytest.param([0, 0, 9, 0], False, id="two points"),
        pytest.param([0, 0, 9, 0, 9, 9, 1], False, id="odd number of coordinates"),
        pytest.param([0, 0, float("nan"), 0, 9, 9], False, id="NaN coordinate"),
        pytest.param([0, 0, "9", 0, 9, 9], False, id="text coordinate"),
    ],
)
def test_only_valid_outlines_near_the_image_are_drawn(outline: list[Any], is_drawn: bool) -> None:
    assert is_sound(outline, (10, 10)) == is_drawn
