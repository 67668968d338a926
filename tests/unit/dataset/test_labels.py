"""Tests of dataset/labels.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset.labels import IGNORED, PADDING
from errors import DataError
from tests.support.data import batches, build, save, train  # noqa: F401


def test_labels_become_class_indices(tmp_path: Path) -> None:
    mask = np.repeat(np.array([0, 1, 2, 7, 255], np.uint8), 8)[None].repeat(40, 0)
    save(tmp_path, "val", "a", np.zeros((40, 40, 3), np.uint8), mask)

    def classes(**options: Any) -> list[int]:
        (_, target), *_ = batches(build(str(tmp_path), split="val", final_size=40, **options))
        return target[0, 0, ::8].tolist()

    assert classes(num_classes=7) == [-1, 0, 1, 6, -1]
    assert classes(num_classes=8, ignore_background=False) == [0, 1, 2, 7, -1]
    assert classes(num_classes=2, ignore_label=7) == [-1, 0, 1, -1, -1]
    assert classes(num_classes=9, ignore_label=2) == [-1, 0, -1, 6, -1]
    assert classes(num_classes=3, ignore_background=False, ignore_label=7) == [0, 1, 2, -1, -1]
    for options in ({"num_classes": 6}, {"num_classes": 7, "ignore_background": False}):
        with pytest.raises(DataError, match=r"a\.png: .* have label 7, .* labels [01] to 6"):
            classes(**options)


def test_only_padded_pixels_are_black(tmp_path: Path) -> None:
    mask = np.ones((40, 40), np.uint8)
    mask[:20] = 255
    save(tmp_path, "train", "a", np.full((40, 40, 3), 200, np.uint8), mask)
    options = dict(batch_size=1, min_resize_scale=0.5, max_resize_scale=0.5, final_size=32)
    spec = build(str(tmp_path), **options)
    raw, labels = next(iter(spec.dataloader))
    assert set(labels.unique().tolist()) == {1, IGNORED, PADDING}
    image, target = spec.microbatch_transforms((raw, labels))
    assert ((image == 0).all(1) == (labels == PADDING)).all()
    assert ((target == -1) == (labels > 9)).all()
