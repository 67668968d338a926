"""What the values in a mask mean."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PADDING = 255  # In a mask: outside the photo. Ignored, and black after normalisation.
IGNORED = 254  # In a mask: a pixel of the photo that is ignored, though label 0 may not be.


class Labels(NamedTuple):
    """Which values of a mask are classes, and which are ignored. 255 always is.

    Attributes:
        num_classes: Number of classes C.
        ignore_background: Whether label 0 is ignored, and label k is class k - 1. Otherwise label k
            is class k.
        ignore_label: A further value that is ignored.
    """

    num_classes: int = 150
    ignore_background: bool = True
    ignore_label: int | None = None

    @property
    def first(self) -> int:
        """The label of class 0."""
        return int(self.ignore_background)

    @property
    def last(self) -> int:
        """The label of class C - 1."""
        return self.first + self.num_classes - 1

    def classes(self) -> np.ndarray:
        """Return (256,) bool: labels that are classes."""
        label = np.arange(256)
        return (label >= self.first) & (label <= self.last) & (label != self.ignore_label)

    def ignored(self) -> np.ndarray:
        """Return (256,) bool: labels that are known and no class."""
        label = np.arange(256)
        zero = (label == 0) & self.ignore_background
        return (label == PADDING) | (label == self.ignore_label) | zero

    def unknown(self) -> np.ndarray:
        """Return (256,) bool: labels that a mask may not hold."""
        return ~self.classes() & ~self.ignored()

    def loaded(self) -> np.ndarray:
        """Return (256,) uint8: what a loader makes of each label, so that padding is its own."""
        label = np.arange(256, dtype=np.uint8)
        return np.where((label == PADDING) | (label == self.ignore_label), np.uint8(IGNORED), label)

    def index(self) -> np.ndarray:
        """Return (256,) int64: the class index of each label, -1 where it is no class."""
        return np.where(self.classes(), np.arange(256) - self.first, -1)
