"""The meaning of mask values: classes, ignored labels and padding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Label of the padding around an image. The loss and the metrics ignore the padding.
PADDING = 255

# Label of ignored pixels inside an image. It is not 0, because label 0 may be a class.
IGNORED = 254


class Labels(NamedTuple):
    """The mask values that stand for classes, and the mask values that are ignored.

    Value 255 is always ignored.

    Attributes:
        num_classes: Number of classes C.
        ignore_background: Whether label 0 is ignored and label k is class k - 1. Otherwise, label k
            is class k.
        ignore_label: Additional value to ignore, or None.
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
        """Return a (256,) bool array that is True for labels that denote classes."""
        label = np.arange(256)
        return (label >= self.first) & (label <= self.last) & (label != self.ignore_label)

    def known(self) -> np.ndarray:
        """Return a (256,) bool array that is True for class labels and for ignored labels."""
        label = np.arange(256)
        zero = (label == 0) & self.ignore_background
        return self.classes() | (label == PADDING) | (label == self.ignore_label) | zero

    def loaded(self) -> np.ndarray:
        """Return a (256,) uint8 table that maps labels in files to the loader's labels.

        The loader uses label 255 only for padding, so ignored pixels in a file get label 254.
        """
        label = np.arange(256, dtype=np.uint8)
        return np.where((label == PADDING) | (label == self.ignore_label), np.uint8(IGNORED), label)

    def index(self) -> np.ndarray:
        """Return a (256,) int64 table that maps class labels to class indices, and others to -1."""
        return np.where(self.classes(), np.arange(256) - self.first, -1)
