"""Tests of dataset/panoptic.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from dataset.panoptic import Segments
from errors import DataError


def write(folder: Path, *segments: tuple[int, int], name: str = "a.png") -> Path:
    info = [{"id": number, "category_id": category} for number, category in segments]
    file = folder / "panoptic.json"
    file.write_text(json.dumps({"annotations": [{"file_name": name, "segments_info": info}]}))
    return file


def test_panoptic_segments_are_found_by_the_mask_file_name(tmp_path: Path) -> None:
    segments = Segments(write(tmp_path, (7, 1), (2**24 - 1, 90)))
    assert segments.of("some/folder/a.png") == [(7, 1), (2**24 - 1, 90)]
    with pytest.raises(ValueError, match="does not list this mask; add its segments"):
        segments.of("b.png")


def test_panoptic_segments_can_be_limited_to_the_given_masks(tmp_path: Path) -> None:
    annotations = [
        {"file_name": f"{i}.png", "segments_info": [{"id": i, "category_id": 10 * i}] * i}
        for i in range(4)
    ]
    file = tmp_path / "panoptic.json"
    file.write_text(json.dumps({"annotations": annotations}))
    segments = Segments(file)
    part = segments.only(["x/3.png", "1.png", "missing.png"])
    assert part.segments.keys() == {"1.png", "3.png"}
    for name in ("1.png", "3.png"):
        assert part.of(name) == segments.of(name)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        pytest.param(None, "No such file", id="missing file"),
        pytest.param("[", "COCO's panoptic format", id="not JSON"),
        pytest.param({"images": []}, "COCO's panoptic format", id="JSON in another format"),
        pytest.param(
            {"annotations": [{"file_name": "a"}]},
            "panoptic format",
            id="annotation without segments",
        ),
    ],
)
def test_error_names_the_invalid_panoptic_file(tmp_path: Path, content: Any, error: str) -> None:
    file = tmp_path / "panoptic.json"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=f"panoptic.json.*{error}"):
        Segments(file)


@pytest.mark.parametrize("number", [-1, 2**24])
def test_segment_id_beyond_24_bits_is_rejected(tmp_path: Path, number: int) -> None:
    with pytest.raises(DataError, match=f"segment ID {number} "):
        Segments(write(tmp_path, (number, 1)))
