"""What the values in a mask mean."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PADDING = 255  # In a mask: outside the photo. Ignored, and black after normalisation.
IGNORED = 254  # In a mask: a pixel of the photo that is ignored, though label 0 may not be.


class Labels(NamedTuple):
    """What the values in a mask mean; see :func:`data.build_ade20k_dataspec`."""

    num_classes: int = 150
    ignore_background: bool = True
    ignore_label: int | None = None

    def classes(self) -> np.ndarray:
        """(256,) bool: labels that are classes, the first of them being class index 0."""
        label = np.arange(256)
        first = int(self.ignore_background)
        inside = (label >= first) & (label < first + self.num_classes)
        return inside & (label != self.ignore_label)

    def ignored(self) -> np.ndarray:
        """(256,) bool: labels that are known and no class."""
        label = np.arange(256)
        zero = (label == 0) & self.ignore_background
        return (label >= IGNORED) | (label == self.ignore_label) | zero
