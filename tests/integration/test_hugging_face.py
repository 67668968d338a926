"""Conversion of data sets in the format of the Hugging Face library `datasets`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from extras.preparation import hugging_face
from tests.support.convert_dataset import COUNT, columns, convert, expected, image_folder, masks_of  # noqa: F401
from tests.support.waits import short_measurement  # noqa: F401


def test_hugging_face_data_set_is_converted_with_class_names(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    datasets = pytest.importorskip("datasets")

    def rows(numbers: range) -> Any:
        pictures = [Image.open(image_folder / f"{number}.jpg") for number in numbers]
        labels = [Image.fromarray(expected(number)) for number in numbers]
        columns = {"pixel_values": pictures, "label": labels}
        return datasets.Dataset.from_dict(
            columns,
            features=datasets.Features(
                {"pixel_values": datasets.Image(), "label": datasets.Image()}
            ),
        )

    saved = tmp_path / "saved"
    splits = datasets.DatasetDict({"train": rows(range(5)), "validation": rows(range(5, COUNT))})
    splits.save_to_disk(str(saved))
    names = {0: "background", 1: "road", 2: "car", 3: "pole"}
    (saved / "id2label.json").write_text(json.dumps(names))
    assert convert(f"hf://{saved}", "--out", tmp_path / "out") == 0
    assert "no problems found" in capsys.readouterr().out
    converted_names, masks = masks_of(tmp_path / "out")
    assert converted_names == list(names.values()) and len(masks) == COUNT
    for number in range(COUNT):
        split, row = ("train", number) if number < 5 else ("val", number - 5)
        np.testing.assert_array_equal(masks[f"{split}/{row:08}"], expected(number))
        image_file = tmp_path / f"out/photos/{split}/{row:08}.jpg"
        assert image_file.read_bytes() == (image_folder / f"{number}.jpg").read_bytes()

    # Both splits become the validation set, and neither may overwrite the other's files.
    shared = tmp_path / "shared"
    halves = {"validation": rows(range(5)), "test": rows(range(5, COUNT))}
    datasets.DatasetDict(halves).save_to_disk(str(shared))
    options = argparse.Namespace(source=f"hf://{shared}", names=None, columns=None, ignore=set())
    hugging_face.convert_hugging_face(options, tmp_path / "both")
    image_files = sorted((tmp_path / "both/photos/val").iterdir())
    assert [file.read_bytes() for file in image_files] == [
        (image_folder / f"{number}.jpg").read_bytes() for number in range(COUNT)
    ]

    (tmp_path / "names.txt").write_text("\n".join(names.values()))
    arguments = f"hf://{saved}", "--names", tmp_path / "names.txt", "--out", tmp_path / "named"
    assert convert(*arguments) == 0
    assert masks_of(tmp_path / "named")[0] == list(names.values())
    for text in ('{"road": 1}', "[]", "{"):
        (saved / "id2label.json").write_text(text)
        capsys.readouterr()
        assert convert(f"hf://{saved}", "--out", tmp_path / "refused") == 1
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {saved}/id2label.json: cannot be read: ")
        assert not (tmp_path / "refused/photos").exists()
