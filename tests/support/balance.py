"""Fixtures for the tests of rare classes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dataset.description import ade20k
from dataset.labels import Labels
from dataset.matching import list_samples
from dataset.source import DataSource


@pytest.fixture(scope="module")
def present(synthetic: str) -> np.ndarray:
    """Return for each image and class if the class is in the mask, counted one mask at a time."""
    rows = []
    for sample in list_samples(synthetic, "train"):
        values = np.unique(np.array(Image.open(sample.mask_path)))
        rows.append([label in values for label in range(1, 13)])
    return np.array(rows)


def folders(path: str, labels: Labels) -> DataSource:
    """Return the training split of a data set in ADE20K's layout."""
    return DataSource(path, "train", ade20k(labels))
