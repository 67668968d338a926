"""Pixel counts per class in a split, and the images that contain each class."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dataset.mask_decoder import Masks
from dataset.source import Chunk, DataSource
from dataset.workers import map_chunks
from errors import DataError


class Counts(NamedTuple):
    """Statistics about the classes in a split's masks.

    Attributes:
        pixels: (C,) int64 array with the number of pixels of each class.
        present: (samples, C) bool array that marks the classes in each sample, in data set order.
    """

    pixels: np.ndarray
    present: np.ndarray


def count_classes(source: DataSource, workers: int | None = None) -> Counts:
    """Count the classes in every mask of a split, in parallel, with a progress bar on stderr.

    Args:
        source: The split to count.
        workers: Number of processes, or None for one process per core.

    Returns:
        The number of pixels of each class, and the classes that occur in each image.

    Raises:
        DataError: A mask cannot be read or contains a value that is not a class.
    """
    parts = map_chunks(_count, source.chunks(), workers, f"count {source.split}", " masks")
    counts = np.concatenate(parts)
    return Counts(counts.sum(0), counts > 0)


def _count(chunk: Chunk, masks: Masks) -> np.ndarray:
    """Return the number of pixels per class in each mask, (samples, C) int64."""
    labels, counts = masks.labels, []
    for name, data in chunk.masks():
        try:
            counts.append(np.bincount(masks.decode(data, name).ravel(), minlength=256))
        except ValueError as error:
            raise DataError(f"{name}: {error}") from error
    return np.array(counts, np.int64).reshape(-1, 256)[:, labels.first : labels.last + 1]
