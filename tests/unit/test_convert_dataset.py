"""Tests of convert_dataset.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from dataset.description import open_description
from tests.support.convert_dataset import (  # noqa: F401
    COUNT,
    NAMES,
    ROAD,
    SIZE,
    SOURCES,
    columns,
    convert,
    drawn,
    expected,
    image_folder,
    labelme,
    masks_of,
    shape,
    square,
    write_coco,
    write_panoptic,
    write_yolo,
)
from tests.support.run_helpers import file_limit
from tests.support.waits import short_measurement  # noqa: F401

pytest.importorskip("pycocotools")


def test_separate_validation_annotations_are_converted(image_folder: Path, tmp_path: Path) -> None:
    train = write_coco(tmp_path / "train.json", numbers=range(5))
    val = write_coco(tmp_path / "val.json", numbers=range(5, COUNT))
    arguments = ["--images", image_folder, "--val", val, "--out", tmp_path / "out"]
    assert convert(train, *arguments, "--background", "ignore") == 0
    names, masks = masks_of(tmp_path / "out")
    assert names == NAMES
    assert sorted(masks) == [f"train/{n}" for n in range(5)] + [f"val/{n}" for n in range(5, COUNT)]
    np.testing.assert_array_equal(masks["val/6"], expected(6).astype(int) - 1)
    assert (tmp_path / "out/photos/train/0.jpg").stat().st_nlink > 1  # images are hard links


def test_rotated_cvat_boxes_and_ellipses_are_converted(image_folder: Path, tmp_path: Path) -> None:
    """CVAT writes the unrotated shape and its clockwise `rotation` in degrees."""
    (tmp_path / "turned.xml").write_text(
        '<annotations><image name="0.jpg" width="64" height="48">'
        '<box label="road" xtl="4" ytl="20" xbr="28" ybr="26" rotation="30.00"/>'
        '<ellipse label="car" cx="48" cy="24" rx="12" ry="4" rotation="330"/>'
        "</image></annotations>"
    )
    arguments = ["--images", image_folder, "--out", tmp_path / "out"]
    convert(tmp_path / "turned.xml", *arguments)  # one image is too few for training
    _, description = open_description(str(tmp_path / "out/data.yaml"))
    assert description is not None
    names = [info.name for info in description.classes]
    drawn = cv2.imread(str(tmp_path / "out/masks/train/0.png"), cv2.IMREAD_UNCHANGED)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    for name, middle, degrees, inside in (
        ("road", (16, 23), 30, lambda u, v: (abs(u) < 12) & (abs(v) < 3)),
        ("car", (48, 24), -30, lambda u, v: (u / 12) ** 2 + (v / 4) ** 2 < 1),
    ):
        along = np.exp(1j * np.radians(degrees))  # first axis of the shape; y points down
        at = (x - middle[0] + 1j * (y - middle[1])) / along
        expected = inside(at.real, at.imag)
        wrong = (drawn == names.index(name)) != expected
        assert expected.sum() > 100 and wrong.sum() < 0.15 * expected.sum()


def test_image_is_found_by_its_full_file_name(image_folder: Path, tmp_path: Path) -> None:
    """A file whose name adds an extension to the image's file name is ignored."""
    folder = tmp_path / "photos"
    shutil.copytree(image_folder, folder)
    for image in image_folder.iterdir():
        cv2.imwrite(str(folder / f"{image.name}.png"), np.zeros(SIZE, np.uint8))
    source = write_coco(tmp_path / "instances.json")
    assert convert(source, "--images", folder, "--out", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out/photos/train").iterdir()) == sorted(
        path.name for path in image_folder.iterdir()
    )


def test_invalid_source_gives_a_one_line_error(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def check_error(source: Any, reason: str, *more: Any) -> None:
        arguments = [source, "--images", image_folder, "--out", tmp_path / "out", *more]
        assert convert(*arguments) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("error: ") and reason in line

    coco = write_coco(tmp_path / "instances.json")
    check_error(tmp_path / "none.json", "No such file")
    check_error(coco, "--images: cannot find the folder", "--images", tmp_path / "none")
    (tmp_path / "other.json").write_text('{"a": 1}')
    check_error(tmp_path / "other.json", "cannot be read: the key 'categories' is missing")
    (tmp_path / "other.xml").write_text("<annotation><size/></annotation>")
    check_error(tmp_path / "other.xml", "the file contains no <image>")
    for tool, name, text, reason in (
        ("labelme", "3.json", '{"shapes"', "cannot be read: Expecting"),
        (
            "labelme",
            "3.json",
            '{"imageHeight": 9, "imageWidth": 9}',
            "cannot be read: the key 'shapes' is missing",
        ),
        ("yolo", "3.txt", "0 0 0 0 1 1 x", "cannot be read: could not"),
    ):
        (tmp_path / tool).mkdir(exist_ok=True)
        folder = SOURCES[tool](tmp_path / tool)
        (folder / name).write_text(text)
        check_error(folder, f"error: {folder / name}: {reason}")
        shutil.rmtree(tmp_path / tool)
    content = json.loads(coco.read_text())
    content["images"][0]["file_name"] = "elsewhere.jpg"
    (tmp_path / "renamed.json").write_text(json.dumps(content))
    check_error(tmp_path / "renamed.json", "lists the image elsewhere.jpg, which is missing from")
    content = json.loads(coco.read_text())
    content["images"][2]["width"] = 65
    (tmp_path / "wide.json").write_text(json.dumps(content))
    check_error(
        tmp_path / "wide.json",
        "2.jpg: the image is 64x48, but its annotations are for an image of 65x48",
    )
    assert not (tmp_path / "out").exists()  # a failed conversion leaves nothing
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").touch()
    check_error(coco, "out already exists; delete it, or use a different --out")
    shutil.rmtree(tmp_path / "out")
    for key, names in (("images", "0.jpg and 1.jpg"), ("categories", "road and car")):
        content = json.loads(coco.read_text())  # merged files may have duplicate ids
        content[key][1]["id"] = content[key][0]["id"]
        (tmp_path / "twice.json").write_text(json.dumps(content))
        check_error(tmp_path / "twice.json", f"{names} have the same id {content[key][0]['id']}")


@pytest.mark.parametrize("other", ["3.png", "3.JPG"])
def test_two_images_with_the_same_mask_name_are_rejected(
    other: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Both masks would have the name 3.png."""
    shutil.copytree(image_folder, tmp_path / "photos")
    cv2.imwrite(str(tmp_path / "photos" / other.replace("JPG", "bmp")), np.zeros((48, 64, 3)))
    if other == "3.JPG":
        (tmp_path / "photos/3.bmp").rename(tmp_path / "photos/3.JPG")
    coco = json.loads(write_coco(tmp_path / "instances.json").read_text())
    twin = next(image for image in coco["images"] if image["file_name"] == "3.jpg")
    coco["images"].append(twin | {"id": 99, "file_name": other})
    shapes = [shape for shape in coco["annotations"] if shape["image_id"] == twin["id"]]
    coco["annotations"] += [
        shape | {"id": 900 + number, "image_id": 99} for number, shape in enumerate(shapes)
    ]
    (tmp_path / "twins.json").write_text(json.dumps(coco))
    arguments = [tmp_path / "twins.json", "--images", tmp_path / "photos"]
    assert convert(*arguments, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/photos/{other}" in error and "would get the same mask file" in error
    assert not (tmp_path / "out").exists()


def test_full_disk_leaves_no_dataset(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    coco = write_coco(tmp_path / "instances.json")
    with file_limit(50):
        arguments = [coco, "--images", image_folder, "--out", tmp_path / "out", "--workers", "1"]
        assert convert(*arguments) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/out/masks/train/") and "File too large" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["instances.json"]


def test_error_names_the_unknown_labelme_shape_type(
    image_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    source = labelme(tmp_path / "labelled", [shape("road", "star", square(*ROAD))])
    assert convert(source, "--images", image_folder, "--out", tmp_path / "out") == 1
    assert "unknown shape type star" in capsys.readouterr().err


def test_ambiguous_image_name_is_rejected(image_folder: Path, tmp_path: Path, capsys: Any) -> None:
    for folder in ("a", "b"):
        shutil.copytree(image_folder, tmp_path / "images" / folder)
    source = write_coco(tmp_path / "coco.json")
    assert convert(source, "--images", tmp_path / "images", "--out", tmp_path / "out") == 1
    assert "lists the image 0.jpg, which could be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [2**24, 2**25, 2**40, -1])
def test_panoptic_id_beyond_three_bytes_is_rejected(
    image_folder: Path, tmp_path: Path, capsys: Any, number: int
) -> None:
    source = write_panoptic(tmp_path / "panoptic.json")
    content = json.loads(source.read_text())
    content["annotations"][0]["segments_info"][0]["id"] = number
    source.write_text(json.dumps(content))
    assert convert(source, "--images", image_folder, "--out", tmp_path / "out") == 1
    assert (
        f"segment ID {number} does not fit into an RGB pixel; use an ID between 0 and 16777215"
        in capsys.readouterr().err
    )


def test_labelme_circle_passes_through_its_edge_point(image_folder: Path, tmp_path: Path) -> None:
    source = labelme(tmp_path / "labelled", [shape("pond", "circle", [[24, 24], [24, 36]])])
    assert convert(source, "--images", image_folder, "--out", tmp_path / "out") == 0
    rows, columns = np.indices(SIZE) + 0.5
    distance = np.hypot(rows - 24, columns - 24)
    for mask in masks_of(tmp_path / "out")[1].values():
        assert (mask[distance < 11] == 1).all()
        assert (mask[distance > 13] == 0).all()


def test_yolo_boxes_are_counted_and_left_out(
    image_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    source = write_yolo(tmp_path / "labels")
    with (source / "2.txt").open("a") as file:
        file.write("0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.2 0.2\n")
    assert convert(source, "--images", image_folder, "--out", tmp_path / "out") == 0
    line = "left out, because they have no area: 2 (2.txt: line 4, a box; 2.txt: line 5, a box)"
    assert line in capsys.readouterr().err
    np.testing.assert_array_equal(
        next(m for n, m in masks_of(tmp_path / "out")[1].items() if n.endswith("/2")), expected(2)
    )
