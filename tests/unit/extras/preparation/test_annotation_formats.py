"""Tests of extras/preparation/annotation_formats.py."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from errors import DataError
from extras.preparation import converters
from extras.preparation.annotation_formats import read_annotations
from tests.support.convert_dataset import (  # noqa: F401
    COUNT,
    NAMES,
    convert,
    corners,
    expected,
    image_folder,
    masks_of,
    scene,
    shape,
    write_labelme,
    write_yolo,
)
from tests.support.waits import short_measurement  # noqa: F401


def test_labelme_masks_are_converted(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """LabelMe's AI tools store a mask image for a box, given by two inclusive corners."""
    source = write_labelme(tmp_path / "labelled")
    for number in range(COUNT):
        file = source / f"{number}.json"
        content = json.loads(file.read_text())
        (pole, *_) = content["shapes"]
        left, top, right, bottom = dict(scene(number))["pole"]
        picture = io.BytesIO()
        Image.fromarray(np.ones((bottom - top, right - left), np.uint8)).save(picture, "PNG")
        pole["mask"] = base64.b64encode(picture.getvalue()).decode()
        pole |= {"shape_type": "mask", "points": [[left, top], [right - 1.0, bottom - 1.0]]}
        content["shapes"][2]["shape_type"] = None  # old files give polygons no shape type
        file.write_text(json.dumps(content))
    assert convert(source, "--images", image_folder, "--out", tmp_path / "out") == 0
    assert f"because they have no area: {COUNT} (" in capsys.readouterr().err
    names, masks = masks_of(tmp_path / "out")
    ours = np.array([names.index(name) for name in ["background", *NAMES]])
    for number in range(COUNT):
        np.testing.assert_array_equal(masks[f"train/{number}"], ours[expected(number)])
    content["shapes"][0]["mask"] = "none"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"7\.json: cannot identify image file"):
        read_annotations(str(source))


def test_yolo_classes_are_ordered_by_number(image_folder: Path, tmp_path: Path) -> None:
    source = write_yolo(tmp_path / "labels")
    for line in (source / "0.txt").read_text().splitlines():
        with (source / "1.txt").open("a") as file:
            file.write(f"{int(line[0]) + 3}{line[1:]}\n")
    with (source / "1.txt").open("a") as file:
        file.write("\n \n")  # blank lines are ignored
    (source / "data.yaml").write_text("names: {4: bus, 5: sign, 2: pole, 0: road, 3: lane, 1: car}")
    annotations = read_annotations(str(source))
    assert annotations.classes == ["road", "car", "pole", "lane", "bus", "sign"]
    names = [shape.name for shape in annotations.images[1].shapes]
    assert names == [name for name, _ in scene(1)] + ["sign", "bus", "lane"]
    # Windows programs save files with this encoding and these line ends.
    (tmp_path / "names.txt").write_text("\ufeffroad\r\ncar\r\n")
    assert converters.read_names(str(tmp_path / "names.txt")) == {0: "road", 1: "car"}
    assert list(converters.read_names(str(source / "data.yaml"))) == [0, 1, 2, 3, 4, 5]
    for number in ("-1", "6"):
        (source / "1.txt").write_text(f"{number} 0 0 0 1 1 1")
        with pytest.raises(
            DataError,
            match=f"1.txt: class {number} has no name; "
            "add its name to those of the other 6 classes",
        ):
            read_annotations(str(source))
