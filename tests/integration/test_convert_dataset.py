"""Annotation files of labelling tools are converted into the expected masks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.convert_dataset import (  # noqa: F401
    CAR,
    COUNT,
    EDGE,
    NAMES,
    ROAD,
    SIZE,
    SOURCES,
    convert,
    corners,
    drawn,
    expected,
    image_folder,
    labelme,
    masks_of,
    shape,
    square,
    write_panoptic,
)
from tests.support.waits import short_measurement  # noqa: F401


@pytest.mark.parametrize("overlap", ["area", "order"])
@pytest.mark.parametrize("tool", SOURCES)
def test_converted_masks_equal_independently_drawn_masks(
    tool: str, overlap: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source, out = SOURCES[tool](tmp_path), tmp_path / "out"
    arguments = ["--images", image_folder, "--out", out, "--val", "0.4", "--overlap", overlap]
    assert convert(source, *arguments) == 0
    printed = capsys.readouterr()
    assert "training would work; no problems found" in printed.out
    assert "pixels without a shape are of class background" in printed.err
    assert ("because they have no area" in printed.err) == (tool == "labelme")
    names, masks = masks_of(out)
    assert len(masks) == COUNT and sorted(names) == sorted(["background", *NAMES])
    ours = np.array([names.index(name) for name in ["background", *NAMES]])
    for number in range(COUNT):
        drawn = expected(number, overlap == "area")
        np.testing.assert_array_equal(masks[f"train/{number}"], ours[drawn])


def test_converted_coco_panoptic_masks_equal_drawn_masks(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = write_panoptic(tmp_path / "panoptic.json")
    arguments = ["--images", image_folder, "--val", source, "--out"]
    assert convert(source, *arguments, tmp_path / "out") == 0
    assert "pixels without a shape are ignored" in capsys.readouterr().err
    names, masks = masks_of(tmp_path / "out")
    assert names == NAMES and len(masks) == 2 * COUNT
    for number in range(COUNT):
        for split in ("train", "val"):
            np.testing.assert_array_equal(
                masks[f"{split}/{number}"], expected(number).astype(int) - 1
            )
    assert convert(source, *arguments, tmp_path / "with", "--background", "other") == 0
    names, masks = masks_of(tmp_path / "with")
    assert names == ["other", *NAMES]
    np.testing.assert_array_equal(masks["train/3"], expected(3))


def yolo_line(kind: int, box: tuple[int, int, int]) -> str:
    shares = (square(*box) / SIZE[::-1]).ravel()
    return f"{kind} {' '.join(f'{share:.8f}' for share in shares)}\n"


@pytest.mark.parametrize("source_kind", ["folder", "labels", "data.yaml", "names"])
@pytest.mark.parametrize("layout", ["ultralytics", "roboflow"])
def test_yolo_folder_layouts_are_converted(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, layout: str, source_kind: str
) -> None:
    root = tmp_path / "set"
    for number in range(COUNT):
        split = "train" if number < 5 else "val" if layout == "ultralytics" else "valid"
        folders = {
            "ultralytics": (f"images/{split}", f"labels/{split}"),
            "roboflow": (f"{split}/images", f"{split}/labels"),
        }[layout]
        for folder in folders:
            (root / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(image_folder / f"{number}.jpg", root / folders[0] / f"{number}.jpg")
        text = yolo_line(0, ROAD) + yolo_line(1, CAR) if number else ""  # image 0 has no annotation
        (root / folders[1] / f"{number}.txt").write_text(text)
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nnames: [road, car]\n")
    (root / "README.roboflow.txt").write_text("This data set was exported on a Monday\n")
    (root / "train.txt").write_text("./images/train/0.jpg\n./images/train/1.jpg\n")
    has_labels = layout == "ultralytics" and source_kind in ("labels", "names")
    source = root / {"data.yaml": "data.yaml"}.get(source_kind, "labels" if has_labels else "")
    more = ["--names", root / "data.yaml"] if source_kind == "names" else []
    out = tmp_path / "out"
    assert convert(source, "--images", root, "--out", out, *more) == 0
    left_out = capsys.readouterr().err
    if not has_labels:
        assert "README.roboflow.txt: a text file without labels" in left_out
    names, masks = masks_of(out)
    assert names == ["background", "road", "car"]
    labelled = drawn((ROAD, 1), (CAR, 2))
    for split, numbers in {"train": range(5), "val": range(5, COUNT)}.items():
        stems = sorted(path.stem for path in (out / "photos" / split).rglob("*.jpg"))
        assert stems == [str(number) for number in numbers]
    assert len(masks) == COUNT
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, np.zeros(SIZE) if name.endswith("/0") else labelled)


@pytest.mark.parametrize(
    ("shapes", "names", "mask"),
    [
        pytest.param(
            [
                shape("road", "polygon", square(*ROAD)),
                shape("_background_", "polygon", square(*CAR)),
                shape("__ignore__", "polygon", square(*EDGE)),
            ],
            ["background", "road"],
            drawn((ROAD, 1), (CAR, 0), (EDGE, 255)),
            id="reserved names",
        ),
        pytest.param(
            [
                shape("road", "rectangle", square(*ROAD)),
                shape("car", "rotation", square(*CAR)),
                shape("car", "linestrip", [[0, 0], [3, 3]]),
            ],
            ["background", "car", "road"],
            drawn((ROAD, 2), (CAR, 1)),
            id="four-corner rectangle, rotated box and line",
        ),
        pytest.param(
            [
                shape("road", "rectangle", [square(*ROAD)[2], square(*ROAD)[0]]),
                shape("car", "polygon", [[1, 1], [2, 2]]),
            ],
            ["background", "road"],
            drawn((ROAD, 1)),
            id="box from lower corner, polygon of two points",
        ),
    ],
)
def test_labelme_shapes_are_drawn_into_masks(
    image_folder: Path,
    tmp_path: Path,
    shapes: list[dict[str, Any]],
    names: list[str],
    mask: np.ndarray,
) -> None:
    source = labelme(tmp_path / "labelled", shapes)
    assert convert(source, "--images", image_folder, "--out", tmp_path / "out") == 0
    found_names, masks = masks_of(tmp_path / "out")
    assert found_names == names
    for one in masks.values():
        np.testing.assert_array_equal(one, np.where(mask == 255, -1, mask.astype(int)))


NO_OUTLINE = "annotation 7: no outline of at least three points"


@pytest.mark.parametrize(
    ("change", "names", "left_out"),
    [
        pytest.param({"segmentation": [[1, 1]]}, ["road", "car"], [NO_OUTLINE], id="single point"),
        pytest.param(
            {"segmentation": [[1, 1, 9, 1, 9, 9], [1, 1]]},
            ["road", "car"],
            ["annotation 7: 1 of its 2 polygons"],
            id="polygon and single point",
        ),
        pytest.param({"segmentation": [1, 1, 9, 1, 9, 9]}, ["road", "car"], [], id="flat list"),
        pytest.param(
            {"segmentation": [[1, 1, 9, 1, 9]]},
            ["road", "car"],
            [NO_OUTLINE],
            id="odd number of coordinates",
        ),
        pytest.param(
            {"segmentation": [[1, 1, 9, 1, 9, 1e9]]},
            ["road", "car"],
            [NO_OUTLINE],
            id="coordinate far outside the image",
        ),
        pytest.param({"root": True}, ["road", "car"], [], id="unused parent category"),
        pytest.param({"windows": True}, ["road", "car"], [], id="Windows path separators"),
        pytest.param(
            {"category_id": 9},
            "annotation 7: category 9 is not listed under categories",
            [],
            id="unlisted category",
        ),
        pytest.param(
            {"image_id": 99},
            "annotation 7: image 99 is not listed under images",
            [],
            id="unlisted image",
        ),
    ],
)
def test_unusual_coco_files_are_converted_or_rejected(
    image_folder: Path,
    tmp_path: Path,
    capsys: Any,
    change: dict[str, Any],
    names: Any,
    left_out: Any,
) -> None:
    separator = "\\" if change.pop("windows", False) else "/"
    images = [
        {"id": n, "file_name": f"images{separator}{n}.jpg", "height": SIZE[0], "width": SIZE[1]}
        for n in range(COUNT)
    ]
    categories = [
        {"id": 1, "name": "road", "supercategory": "all"},
        {"id": 2, "name": "car", "supercategory": "all"},
    ]
    if change.pop("root", False):
        categories.insert(0, {"id": 0, "name": "all", "supercategory": "none"})
    squares = [(ROAD, 1), (CAR, 2)]
    annotations = [
        {"id": 10 * n + k, "image_id": n, "category_id": k, "segmentation": [corners_of(box)]}
        for n in range(COUNT)
        for box, k in squares
    ]
    more = {"id": 7, "image_id": 0, "category_id": 1, "segmentation": [corners_of((40, 40, 4))]}
    annotations.append({**more, **change})
    source = tmp_path / "coco.json"
    source.write_text(
        json.dumps({"images": images, "categories": categories, "annotations": annotations})
    )
    status = convert(source, "--images", image_folder, "--out", tmp_path / "out")
    errors = capsys.readouterr().err
    if isinstance(names, str):
        assert status == 1
        assert names in errors
        return
    assert status == 0
    found_names, masks = masks_of(tmp_path / "out")
    assert found_names == ["background", *names]
    for line in left_out:
        assert line in errors
    for name, mask in masks.items():
        if not name.endswith("/0"):
            np.testing.assert_array_equal(mask, drawn((ROAD, 1), (CAR, 2)))


def corners_of(box: tuple[int, int, int]) -> list[float]:
    return [float(value) for value in square(*box).ravel()]


CVAT_LABELS = "".join(
    f"<label><name>{name}</name><type>{kind}</type></label>"
    for name, kind in {
        "road": "polygon",
        "rainy": "tag",
        "knee": "points",
        "leg": "skeleton",
    }.items()
)


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        pytest.param('<tag label="rainy"/>', ["background", "road"], id="tag"),
        pytest.param('<points label="knee" points="1,1"/>', ["background", "road"], id="points"),
        pytest.param('<skeleton label="leg"/>', ["background", "road"], id="skeleton"),
        pytest.param(
            '<polygon label="" points="1,1;2,1;2,2"/>',
            "3.jpg: a polygon has no label",
            id="shape without label",
        ),
        pytest.param(
            None,
            "the file contains video tracks; export the task as CVAT for images",
            id="video tracks",
        ),
    ],
)
def test_unusual_cvat_files_are_converted_or_rejected(
    image_folder: Path, tmp_path: Path, capsys: Any, body: Any, outcome: Any
) -> None:
    points = ";".join(f"{x},{y}" for x, y in square(*ROAD))
    road = f'<polygon label="road" points="{points}" z_order="0"/>'
    images = "".join(
        f'<image id="{n}" name="{n}.jpg" width="{SIZE[1]}" height="{SIZE[0]}">{road}'
        f"{body if n == 3 else ''}</image>"
        for n in range(COUNT)
    )
    if body is None:
        images = f'<track id="0" label="road">{road}</track>'
    source = tmp_path / "cvat.xml"
    source.write_text(f"<annotations><meta>{CVAT_LABELS}</meta>{images}</annotations>")
    status = convert(source, "--images", image_folder, "--out", tmp_path / "out")
    if isinstance(outcome, str):
        assert status == 1
        assert outcome in capsys.readouterr().err
        return
    assert status == 0
    names, masks = masks_of(tmp_path / "out")
    assert names == outcome
    for mask in masks.values():
        np.testing.assert_array_equal(mask, drawn((ROAD, 1)))


@pytest.mark.parametrize(
    ("values", "names", "more", "classes", "note"),
    [
        pytest.param([0, 255], None, [], [0, 255], "value 255 is a class (", id="binary mask"),
        pytest.param(
            [0, 127, 255],
            None,
            [],
            [0, 127, 255],
            "to ignore it, add --ignore 255",
            id="three values",
        ),
        pytest.param(
            [0, 1, 255],
            None,
            ["--ignore", "255"],
            [0, 1],
            "value 255 is ignored (",
            id="ignored by option",
        ),
        pytest.param(
            [0, 1, 9],
            {0: "a", 1: "b", 9: "void"},
            [],
            [0, 1],
            "value 9 is ignored (",
            id="ignored by the name void",
        ),
    ],
)
def test_ignored_values_in_hugging_face_masks_are_no_classes(
    image_folder: Path,
    tmp_path: Path,
    capsys: Any,
    values: list[int],
    names: dict[int, str] | None,
    more: list[str],
    classes: list[int],
    note: str,
) -> None:
    datasets = pytest.importorskip("datasets")
    mask = np.select([drawn((ROAD, 1), (CAR, 2)) == k for k in range(len(values))], values)
    mask[:, 40:] = values[-1] if len(values) == 2 else values[0]
    rows = datasets.Dataset.from_dict(
        {
            "image": [Image.open(image_folder / f"{n}.jpg") for n in range(COUNT)],
            "label": [Image.fromarray(mask.astype(np.uint8))] * COUNT,
        },
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Image()}),
    )
    rows.save_to_disk(str(tmp_path / "saved"))
    if names:
        (tmp_path / "saved/id2label.json").write_text(json.dumps(names))
    assert convert(f"hf://{tmp_path}/saved", "--out", tmp_path / "out", *more) == 0
    assert note in capsys.readouterr().err
    _, masks = masks_of(tmp_path / "out")
    expected_index = np.full(mask.shape, -1)
    for index, value in enumerate(classes):
        expected_index[mask == value] = index
    for converted in masks.values():
        np.testing.assert_array_equal(converted, expected_index)


@pytest.mark.parametrize("overlap", ["area", "order"])
def test_z_order_decides_overlap_of_cvat_shapes(
    image_folder: Path, tmp_path: Path, overlap: str
) -> None:
    # The small box comes first in the file but has the higher z_order, so it must be on top.
    shapes = ""
    for label, (left, top, side), level in (("car", CAR, 5), ("road", ROAD, 2)):
        sides = f'xtl="{left}" ytl="{top}" xbr="{left + side}" ybr="{top + side}"'
        shapes += f'<box label="{label}" {sides} z_order="{level}"/>'
    images = "".join(
        f'<image id="{n}" name="{n}.jpg" width="{SIZE[1]}" height="{SIZE[0]}">{shapes}</image>'
        for n in range(COUNT)
    )
    labels = "<label><name>road</name></label><label><name>car</name></label>"
    source = tmp_path / "cvat.xml"
    source.write_text(f"<annotations><meta>{labels}</meta>{images}</annotations>")
    arguments = [source, "--images", image_folder, "--out", tmp_path / "out", "--overlap", overlap]
    assert convert(*arguments) == 0
    for mask in masks_of(tmp_path / "out")[1].values():
        np.testing.assert_array_equal(mask, drawn((ROAD, 1), (CAR, 2)))
