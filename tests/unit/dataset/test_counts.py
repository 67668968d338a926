"""Tests of dataset/counts.py."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from convert_ade20k import convert
from dataset.counts import count_classes
from dataset.description import ade20k, open_description
from dataset.labels import Labels
from dataset.matching import list_samples
from dataset.source import DataSource, ShardOptions
from errors import DataError
from tests.support.balance import folders, present  # noqa: F401
from tests.support.layouts import lay_out


def test_class_counts_match_for_folders_shards_and_descriptions(
    synthetic: str, present: np.ndarray, tmp_path: Path
) -> None:
    pixels = np.zeros(13, int)
    for sample in list_samples(synthetic, "train"):
        pixels += np.bincount(np.array(Image.open(sample.mask_path)).ravel(), minlength=13)
    convert(synthetic, str(tmp_path / "mds"), size_limit="40kb", workers=1)
    described = lay_out(synthetic, tmp_path / "merged", "merged", 12)
    root, description = open_description(str(described))
    assert description is not None
    mds, twelve = str(tmp_path / "mds"), ade20k(Labels(12))
    for counts in (
        count_classes(folders(synthetic, Labels(12)), workers=1),
        count_classes(DataSource(mds, shards=ShardOptions(), description=twelve), workers=2),
        count_classes(DataSource(root, "train", description), workers=1),
    ):
        np.testing.assert_array_equal(counts.pixels, pixels[1:])
        np.testing.assert_array_equal(counts.present, present)
    ignoring = count_classes(folders(synthetic, Labels(12, True, 5)), workers=1)
    assert ignoring.pixels[4] == 0 and ignoring.pixels[3] == pixels[4]


def test_error_names_the_mask_with_an_unknown_label(synthetic: str) -> None:
    with pytest.raises(
        DataError, match=r"ADE_train_\d+\.png: .* have labels .* classes are labels 1 to 5"
    ):
        count_classes(folders(synthetic, Labels(5)), workers=1)


def test_class_counts_match_values_computed_by_hand(tmp_path: Path) -> None:
    for split in ("training", "validation"):
        for kind, name in (("images", "a.jpg"), ("annotations", "a.png")):
            (tmp_path / kind / split).mkdir(parents=True)
            cv2.imwrite(str(tmp_path / kind / split / name), np.array([[1, 2], [0, 2]], np.uint8))
    counts = count_classes(folders(str(tmp_path), Labels(3)), workers=1)
    assert counts.pixels.tolist() == [1, 2, 0] and counts.present.tolist() == [[True, True, False]]
