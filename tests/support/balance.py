"""The classes in each training mask, and a training split in ADE20K's layout."""

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
    """Return a boolean array (images, classes): whether a class occurs in an image's mask."""
    rows = []
    for sample in list_samples(synthetic, "train"):
        values = np.unique(np.array(Image.open(sample.mask_path)))
        rows.append([label in values for label in range(1, 13)])
    return np.array(rows)


def folders(path: str, labels: Labels) -> DataSource:
    """Return the training split of the data set in ADE20K's layout at `path`."""
    return DataSource(path, "train", ade20k(labels))
