"""A Segmenter with random weights, variants of it, and an image to segment."""

from __future__ import annotations

import copy
from typing import Any

import cv2
import numpy as np
import pytest

from predict import Segmenter
from tests.support.artifacts import random_weights


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(random_weights())


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """An image with smooth colours, 45 pixels high and 60 wide."""
    small = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return cv2.resize(small, (60, 45), interpolation=cv2.INTER_CUBIC)


def variant(segmenter: Segmenter, **attributes: Any) -> Segmenter:
    """Return a copy of a Segmenter with some attributes replaced."""
    other = copy.copy(segmenter)
    vars(other).update(attributes)
    return other
