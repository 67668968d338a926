"""Tests of extras/preparation/verify.py."""

from __future__ import annotations

import pytest

from dataset.description import ade20k
from dataset.labels import Labels
from dataset.source import DataSource, check_labels
from errors import DataError
from tests.support.report import cut, original, path, sample, wrong_label  # noqa: F401
from tests.support.waits import short_measurement  # noqa: F401


def test_label_check_before_training_finds_bad_masks(path):
    def source(labels: Labels) -> DataSource:
        return DataSource(str(path), "train", ade20k(labels))

    check_labels(source(Labels(12)))
    check_labels(source(Labels(13, False)))
    check_labels(source(Labels(11, ignore_label=12)))
    with pytest.raises(DataError, match=r"\.png: .* have label 12, .* labels 1 to 11; set"):
        check_labels(source(Labels(11)))
    with pytest.raises(DataError, match=r"have label 12, .* labels 0 to 11; set"):
        check_labels(source(Labels(12, False)))
    image, mask = sample(path, 24)
    wrong_label(image, mask)
    with pytest.raises(DataError, match=f"{mask}: .* of its pixels have label 77, .*; set model"):
        check_labels(source(Labels(12)), max_masks=4)  # the check always includes the last mask
    cut(mask, 0.5)
    with pytest.raises(DataError, match=f"{mask}: cannot be decoded"):
        check_labels(source(Labels(12)))
