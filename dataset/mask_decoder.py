"""A decoder that reads mask files and translates their values to training labels.

A single lookup table both translates mask values and detects unknown values. The table stores 0 for
unknown values and label + 1 for known values, so one pass over the mask is enough.
"""

from __future__ import annotations

import copy
import functools
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

COLORS = 2**24  # Number of 24-bit colours.


class UnknownValues(ValueError):
    """An error for a mask with values that are neither class labels nor ignored labels."""


class Masks:
    """A decoder for the masks of a data set.

    Args:
        labels: The meaning of the labels that the decoder returns.
        values: Label of each mask value, or None if the values are already labels.
        in_colors: Whether the values are colours, encoded by `dataset.description.pack`.
        segments: Categories of each mask's segments, from a file in COCO's panoptic format. If
            `segments` is not None, the keys of `values` are categories.
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
            loaded, known = labels.loaded().tolist(), np.flatnonzero(labels.known()).tolist()
            values = {value: loaded[value] for value in known}
        self.values = values
        self._index = _make_table(MAX_VALUE + 1, {} if in_colors else values)
        # Find the smallest mask value that differs from its label. A mask needs no translation if
        # all its values are smaller.
        same = self._index[:255] == np.arange(1, 256)
        self._same = int(np.argmin(np.append(same, False)))
        self.max_value = MAX_VALUE if self.described else 255

    @classmethod
    def of(cls, description: Description, split: str, root: str) -> Masks:
        """Return a decoder for the masks of a split, given the data set's description.

        Args:
            description: Description of the data set.
            split: 'train' or 'val'.
            root: Folder of the data set.

        Raises:
            DataError: The JSON file of the segments cannot be read.
        """
        source, segments = description.sources[split], None
        if source.segments:
            from dataset.panoptic import Segments

            segments = Segments(Path(root, source.segments))
        return cls(description.labels, description.values, description.in_colors, segments)

    def only(self, paths: Iterable[str]) -> Masks:
        """Return a smaller decoder for the given masks, which is faster to send to another process.

        Args:
            paths: Paths of the masks.
        """
        if self.segments is None:
            return self
        few = copy.copy(self)
        few.segments = self.segments.only(paths)
        return few

    @functools.cached_property
    def _colors(self) -> np.ndarray:
        """A table of label + 1 for each colour. It takes 16 MB, so it is made only on first use."""
        return _make_table(COLORS, {} if self.segments else self.values)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_colors"}

    def decode(self, data: bytes, path: str = "") -> np.ndarray:
        """Decode a mask to labels.

        Args:
            data: Content of the mask file.
            path: Path of the mask file, used to look up its segments.

        Returns:
            np.ndarray: (H, W) uint8 labels.

        Raises:
            UnknownValues: The mask contains unknown values, which the error message lists.
            ValueError: The mask cannot be decoded.
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
                found = _look_up(self._index, mask)
        if found.min() == 0:
            raise UnknownValues(self._complaint(mask[found == 0], mask.size))
        found -= 1
        return found

    def _look_up_colors(self, mask: np.ndarray, path: str) -> np.ndarray:
        """Return label + 1 for each pixel, or 0 for pixels with an unknown value."""
        if not self.segments:
            return _look_up(self._colors, mask)
        table = self._table_of_segments(path)
        self._colors[list(table)] = np.fromiter(table.values(), np.uint8) + 1
        found = _look_up(self._colors, mask)
        self._colors[list(table)] = 0
        return found

    def _table_of_segments(self, path: str) -> dict[int, int]:
        """Return the label of each segment ID. ID 0 marks pixels without a segment."""
        assert self.segments is not None
        table = {0: 0}
        for number, category in self.segments.of(path):
            if category not in self.values:
                raise UnknownValues(
                    f"has a segment of category {category}, which the description does not name; "
                    "list it under classes or ignore"
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
        kind = f"{kind}s" if len(values) > 1 else kind
        share = f"{unknown.size / size:.2%} of its pixels have {kind} {text}"
        if self.described:
            return f"{share}, which the description does not name; list it under classes or ignore"
        return f"{share}, but the classes are labels {self.labels.first} to {self.labels.last}"


def _make_table(size: int, labels: Mapping[int, int]) -> np.ndarray:
    """Return a uint8 table with label + 1 for each value that has a label, and 0 elsewhere."""
    table = np.zeros(size, np.uint8)
    table[list(labels)] = np.fromiter(labels.values(), np.uint8) + 1
    return table


def _look_up(table: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return `table[mask]`, but compute it several times faster than NumPy does."""
    flat = torch.from_numpy(mask.astype(np.int32, copy=False)).view(-1)
    return torch.index_select(torch.from_numpy(table), 0, flat).numpy().reshape(mask.shape)
