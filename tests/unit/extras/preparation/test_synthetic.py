"""Tests of extras/preparation/synthetic.py."""

import hashlib
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from extras.preparation.synthetic import TEXTURES, make, scene, texture


@pytest.mark.parametrize("name", TEXTURES)
def test_texture_values_are_between_0_and_1(name: str) -> None:
    pattern = texture(name, 64, np.random.default_rng(0))
    assert pattern.shape == (64, 64) and pattern.dtype == np.float32
    assert pattern.min() >= 0 and pattern.max() <= 1
    assert (pattern.std() > 0) == (name != "plain")


def test_synthetic_scene_labels_are_between_0_and_12() -> None:
    image, mask = scene(96, np.random.default_rng(3))
    assert image.shape == (96, 96, 3) and image.dtype == np.uint8
    assert mask.shape == (96, 96) and mask.max() <= len(TEXTURES)
    assert len(np.unique(mask)) > 3


def test_synthetic_scenes_are_reproducible_from_a_seed(tmp_path: Path) -> None:
    make(str(tmp_path), training=3, validation=2, size=48)
    digest = hashlib.sha1()
    for path in sorted(tmp_path.rglob("*.png")):
        digest.update(path.name.encode() + cv2.imread(str(path), -1).tobytes())
    assert digest.hexdigest() == "084680c5a6d42580c4763d9014d56a6af3bd9d3d"


def test_complete_synthetic_dataset_is_not_rewritten(tmp_path: Path) -> None:
    make(str(tmp_path), training=1, validation=1, size=32)
    (mask,) = tmp_path.rglob("*train*.png")
    os.utime(mask, (1, 1))
    make(str(tmp_path), training=1, validation=1, size=32)
    assert mask.stat().st_mtime == 1
    make(str(tmp_path), training=1, validation=1, size=32, seed=1)
    assert mask.stat().st_mtime != 1
