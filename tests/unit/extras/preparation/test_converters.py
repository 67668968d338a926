"""Tests of extras/preparation/converters.py; test_convert_dataset.py converts full datasets."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from errors import DataError
from extras.preparation.converters import convert_panoptic, link, read_names, write_mask


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        pytest.param("names.txt", "road\n\ncar\n", {0: "road", 1: "car"}, id="lines"),
        pytest.param("names.json", '{"1": "car", "0": "road"}', {0: "road", 1: "car"}, id="JSON"),
        pytest.param("data.yaml", "names: [road, car]", {0: "road", 1: "car"}, id="list"),
        pytest.param(
            "data.yaml", "names: {3: road, 1: car}", {3: "road", 1: "car"}, id="numbered names"
        ),
    ],
)
def test_class_names_are_read_from_files(
    tmp_path: Path, name: str, text: str, expected: object
) -> None:
    (tmp_path / name).write_text(text)
    assert read_names(str(tmp_path / name)) == expected


@pytest.mark.parametrize(("largest", "mode"), [(255, "L"), (256, "I;16")])
def test_masks_use_8_bits_if_the_labels_fit(tmp_path: Path, largest: int, mode: str) -> None:
    mask = np.array([[0, largest]], np.uint8 if largest < 256 else np.uint16)
    write_mask(mask, tmp_path / "out" / "mask.png")
    with Image.open(tmp_path / "out" / "mask.png") as image:
        assert image.mode == mode and np.array_equal(np.array(image), mask)


def test_image_is_copied_if_it_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"image")
    link(tmp_path / "a.jpg", tmp_path / "out" / "a.jpg")
    assert (tmp_path / "out" / "a.jpg").read_bytes() == b"image"

    def refuse(*paths: object) -> None:
        raise OSError("hard links are not supported")

    monkeypatch.setattr("os.link", refuse)
    link(tmp_path / "a.jpg", tmp_path / "other" / "a.jpg")
    assert (tmp_path / "other" / "a.jpg").read_bytes() == b"image"


def test_panoptic_image_is_not_taken_from_another_folder(tmp_path: Path) -> None:
    image, source = tmp_path / "photos/seq2/0001.jpg", tmp_path / "panoptic.json"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(image)
    segments = {"file_name": "seq1/0001.png", "segments_info": []}
    content = {"categories": [{"id": 1, "name": "road"}], "annotations": [segments]}
    source.write_text(json.dumps(content))
    options = argparse.Namespace(
        source=str(source),
        val_source=None,
        images=str(tmp_path / "photos"),
        val_images=None,
        masks=None,
        workers=1,
    )
    with pytest.raises(DataError, match="lists the image seq1/0001, which is missing from"):
        convert_panoptic(options, tmp_path / "out")
    assert not (tmp_path / "out").exists()
