"""Tests of extras/preparation/find_classes.py."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from dataset.mask_decoder import Masks
from errors import DataError
from extras.preparation import find_classes
from extras.preparation.find_classes import FileValues, read_values
from extras.preparation.suggest import suggest
from tests.support.suggest import (
    COLORED,
    N,
    blocks,
    described,
    drawn_large,
    lay_out,
    random_image,
    save,
    smooth,
)


def test_instance_masks_are_recognised_by_their_pixel_values(tmp_path: Path) -> None:
    for n in range(8):
        save(tmp_path / f"images/{n}.jpg", random_image(n))
        save(tmp_path / f"a/{n}.png", blocks(n, tuple(range(1, 9 + n % 4))))
        save(tmp_path / f"b/{n}.png", blocks(n))
    assert yaml.safe_load(suggest(str(tmp_path), 1).text)["train"]["masks"] == "b/{stem}.png"


def test_blended_pixel_values_at_edges_are_not_classes(tmp_path: Path) -> None:
    for n in range(6):
        save(tmp_path / f"i/{n}.jpg", cv2.resize(random_image(n), (256, 256)))
        save(tmp_path / f"m/{n}.png", drawn_large(n, "grey", smooth))
    raw = yaml.safe_load(suggest(str(tmp_path), 1).text)
    assert [entry["labels"] for entry in raw["classes"].values()] == [[0], [100], [200]]


def test_class_that_is_one_pixel_wide_is_found(tmp_path: Path) -> None:
    for n in range(8):
        mask = blocks(n)
        mask[5 + n, :] = 3  # a line that is one pixel wide
        save(tmp_path / f"i/{n}.jpg", random_image(n))
        save(tmp_path / f"m/{n}.png", mask)
    assert len(yaml.safe_load(suggest(str(tmp_path), 1).text)["classes"]) == 4


GREY_VALUES = [
    pytest.param((128, 255), 0, [[0], [128], [255]], [], id="rare 0 beside 128 and 255"),
    pytest.param(
        (85, 170, 255), 0, [[0], [85], [170], [255]], [], id="rare 0 and three evenly spaced levels"
    ),
    pytest.param((1, 2), 0, [[1], [2]], [0], id="rare 0 beside 1 and 2"),
    pytest.param((0, 1), 255, [[0], [1]], [255], id="rare 255 beside 0 and 1"),
]


@pytest.mark.parametrize(("values", "rare", "classes", "ignored"), GREY_VALUES)
def test_rare_mask_values_become_classes_or_are_ignored(
    values: tuple, rare: int, classes: list, ignored: list, tmp_path: Path
) -> None:
    for n in range(6):
        mask = blocks(n, values)
        mask[:2, :4] = rare
        save(tmp_path / f"i/{n}.jpg", random_image(n))
        save(tmp_path / f"m/{n}.png", mask)
    raw = yaml.safe_load(suggest(str(tmp_path), 1).text)
    assert [entry["labels"] for entry in raw["classes"].values()] == classes
    assert raw["ignore"] == ignored


def test_masks_with_different_palettes_are_read_by_colour(tmp_path: Path) -> None:
    lay_out(tmp_path, [("i/{}.jpg", "m/{}.png", N)])
    masks_by_path = {}
    for n, path in enumerate(sorted((tmp_path / "m").iterdir())):
        masks_by_path[str(path)] = mask = np.array(Image.open(path))
        order = np.roll(np.arange(3), n)  # the position of each value in this file's palette
        palette = np.zeros((3, 3), int)
        palette[order] = COLORED
        save(path, order.astype(np.uint8)[mask], palette.ravel().tolist())
    text = suggest(str(tmp_path), 1).text
    assert f"because {tmp_path}/m/000.png and {tmp_path}/m/001.png show value 0 in dif" in text
    description, samples = described(tmp_path, text)
    names = ["class_0_0_0", "class_128_64_128", "class_0_0_142"]
    masks = Masks.of(description, "train", str(tmp_path))
    for sample in [*samples["train"], *samples["val"]]:
        labels = masks.decode(Path(sample.mask_path).read_bytes())
        for value, name in enumerate(names):
            label = 1 + [c.name for c in description.classes].index(name)
            assert ((labels == label) == (masks_by_path[sample.mask_path] == value)).all()


def test_mask_values_1_and_255_become_one_class(tmp_path: Path) -> None:
    masks_by_name = {}
    for n in range(8):
        save(tmp_path / f"i/{n}.jpg", random_image(n))
        mask = blocks(n, (0, 1)).astype(bool)
        masks_by_name[f"{n}.png"] = mask
        save(tmp_path / f"m/{n}.png", mask if n % 2 else mask.astype(np.uint8) * 255)
    text = suggest(str(tmp_path), 1).text
    assert yaml.safe_load(text)["classes"] == {
        "class_0": {"labels": [0]},
        "class_255": {"labels": [1, 255]},
    }
    description, samples = described(tmp_path, text)
    masks = Masks.of(description, "train", str(tmp_path))
    for sample in [*samples["train"], *samples["val"]]:
        labels = masks.decode(Path(sample.mask_path).read_bytes())
        assert ((labels == 2) == masks_by_name[Path(sample.mask_path).name]).all()


def test_pixels_and_edge_pixels_of_each_mask_value_are_counted(tmp_path: Path) -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[:, 50:] = 9
    mask[:20, 50] = 5  # a blended edge between the values 0 and 9
    mask[99, 99] = 3  # all neighbours are 9, so this is not blended
    save(tmp_path / "a.png", mask)
    (file,) = read_values([str(tmp_path / "a.png")])
    assert file == FileValues(
        str(tmp_path / "a.png"),
        "grey",
        {0: (5000, 0, 0), 3: (1, 1, 0), 5: (20, 20, 20), 9: (4979, 0, 0)},
        {},
    )


def test_masks_with_and_without_a_palette_are_read_by_number(tmp_path: Path) -> None:
    for n in range(6):
        save(tmp_path / f"i/{n}.jpg", random_image(n))
        save(tmp_path / f"m/{n}.png", blocks(n), [0, 0, 0, 128, 64, 128] if n == 0 else None)
    text = suggest(str(tmp_path), 1).text
    note = f"{tmp_path}/m/0.png has a palette, but {tmp_path}/m/1.png has none; both are read by"
    assert note in text
    labels = [entry["labels"] for entry in yaml.safe_load(text)["classes"].values()]
    assert labels == [[0], [1], [2]]


def test_masks_with_too_many_blended_colours_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find_classes, "MOST_VALUES", 40)
    for n in range(6):
        save(tmp_path / f"i/{n}.jpg", cv2.resize(random_image(n), (256, 256)))
        save(tmp_path / f"m/{n}.png", drawn_large(n, "color", smooth))
    with pytest.raises(DataError, match=r"blurred edges, which add \d+ extra colours; export the"):
        suggest(str(tmp_path), 1)
