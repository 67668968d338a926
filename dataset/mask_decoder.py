"""Masks as the files hold them, read as the labels of training, through one lookup.

The lookup has 0 for a value that nothing names, and label + 1 for all others: so a mask is read and
checked in one pass, whatever it holds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch

from dataset.decoding import decode_colors, decode_mask
from dataset.description import MAX_VALUE, Description, unpack
from dataset.labels import Labels

if TYPE_CHECKING:
    from dataset.panoptic import Segments

COLORS = 2**24  # of three bytes


class UnknownValues(ValueError):
    """A mask holds values that are neither classes nor ignored."""


class Masks:
    """What the masks of a data set hold.

    Args:
        labels: What the loader's labels mean.
        values: The label that each value becomes; None: values are labels, as `labels` has them.
        in_colors: Whether values are colours, packed as `dataset.description.pack` does.
        segments: Of COCO's panoptic format: categories, which are the values, of each mask.
    """

    def __init__(
        self,
        labels: Labels,
        values: Mapping[int, int] | None = None,
        in_colors: bool = False,
        segments: Segments | None = None,
    ) -> None:
        self.labels, self.segments, self.in_colors = labels, segments, in_colors
        self.described = values is not None
        if values is None:
            loaded, known = labels.loaded(), ~labels.unknown()
            values = {value: int(loaded[value]) for value in np.flatnonzero(known).tolist()}
        self.values = values
        self._colors: torch.Tensor | None = None  # 16 MB, of which few pages are ever touched
        self._index = np.zeros(MAX_VALUE + 1, np.uint8)
        if not in_colors:
            self._index[list(values)] = np.fromiter(values.values(), np.uint8) + 1
        # Values below this are labels as they stand.
        same = self._index[:255] == np.arange(1, 256)
        self._same = int(np.argmin(np.append(same, False)))
        self.max_value = MAX_VALUE if self.described else 255

    @classmethod
    def of(cls, description: Description, split: str, root: str) -> Masks:
        """Return what a described split's masks hold.

        Raises:
            DataError: The file of the segments cannot be read.
        """
        source, segments = description.sources[split], None
        if source.segments:
            from dataset.panoptic import Segments

            segments = Segments(Path(root, source.segments))
        return cls(description.labels, description.values, description.in_colors, segments)

    def only(self, paths: Iterable[str]) -> Masks:
        """Return the same for a few masks alone, which is less to send to a process."""
        if self.segments is None:
            return self
        few = copy.copy(self)
        few.segments = self.segments.only(paths)
        return few

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_colors": None}

    def decode(self, data: bytes, path: str = "") -> np.ndarray:
        """Decode a mask.

        Args:
            data: The encoded file.
            path: Its name, by which its segments are found.

        Returns:
            np.ndarray: (H, W) uint8 labels.

        Raises:
            UnknownValues: It holds values that nothing names; the message says which.
            ValueError: It cannot be decoded; the message is one line.
        """
        if self.in_colors or self.segments:
            mask = decode_colors(data)
            found = self._look_up_colors(mask, path)
        else:
            mask = decode_mask(data, self.max_value)
            if mask.dtype == np.uint8:
                if mask.max() < self._same:
                    return mask
                found = cv2.LUT(mask, self._index[:256])
            else:
                found = _look_up(torch.from_numpy(self._index), mask)
        if found.min() == 0:
            raise UnknownValues(self._complaint(mask[found == 0], mask.size))
        found -= 1
        return found

    def _look_up_colors(self, mask: np.ndarray, path: str) -> np.ndarray:
        """Return label + 1 of each pixel, 0 where there is none."""
        if self._colors is None:
            self._colors = torch.from_numpy(np.zeros(COLORS, np.uint8))
            if self.segments is None:
                self._fill(self.values)
        table = self._table_of_segments(path) if self.segments else {}
        if table:
            self._fill(table)
        found = _look_up(self._colors, mask)
        if table:
            self._colors[list(table)] = 0
        return found

    def _fill(self, table: Mapping[int, int]) -> None:
        assert self._colors is not None
        labels = torch.tensor(list(table.values()), dtype=torch.uint8)
        self._colors[list(table)] = labels + 1

    def _table_of_segments(self, path: str) -> dict[int, int]:
        """Return the label of each segment's number; 0 is no segment, and ignored."""
        assert self.segments is not None
        table = {0: 0}
        for number, category in self.segments.of(path):
            if category not in self.values:
                raise UnknownValues(
                    f"has a segment of category {category}, which is neither a class nor ignored"
                )
            table[number] = self.values[category]
        return table

    def _complaint(self, unknown: np.ndarray, size: int) -> str:
        values = np.unique(unknown).tolist()
        kind = "label"
        if self.segments:
            kind = "segment"
        elif self.described:
            kind = "colour" if self.in_colors else "value"
        shown = [str(unpack(v)) if kind == "colour" else str(v) for v in values[:5]]
        text = ", ".join(shown) + (", …" if len(values) > 5 else "")
        share = f"{kind} {text} on {unknown.size / size:.2%} of its pixels"
        if self.described:
            return f"{share}, which is neither a class nor ignored"
        return f"{share}, but classes are {self.labels.first}..{self.labels.last}"


def _look_up(table: torch.Tensor, mask: np.ndarray) -> np.ndarray:
    """As `table[mask]`, several times as fast as NumPy does it."""
    flat = torch.from_numpy(mask.astype(np.int32, copy=False)).view(-1)
    return torch.index_select(table, 0, flat).numpy().reshape(mask.shape)
