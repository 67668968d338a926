"""A reader for segment categories in COCO's panoptic JSON format."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from errors import DataError

MAX_SEGMENTS = 2**24  # COCO encodes a segment ID in the three colour bytes of a pixel.


class Segments:
    """A table of the segments in each mask and their categories, in COCO's panoptic format.

    Args:
        path: Path of the JSON file.

    Raises:
        DataError: The file cannot be read or is not in COCO's panoptic format.
    """

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.places: dict[str, tuple[int, int]] = {}
        numbers: list[tuple[int, int]] = []
        try:
            with open(path, encoding="utf-8") as file:
                annotations = json.load(file)["annotations"]
            for annotation in annotations:
                first = len(numbers)
                numbers += [(s["id"], s["category_id"]) for s in annotation["segments_info"]]
                self.places[os.path.basename(annotation["file_name"])] = first, len(numbers)
            self.numbers = np.array(numbers, np.int64).reshape(-1, 2)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(
                f"{path}: cannot be read as JSON in COCO's panoptic format; check the file"
            ) from error
        ids = self.numbers[:, 0]
        if wrong := ids[(ids < 0) | (ids >= MAX_SEGMENTS)].tolist():
            raise DataError(
                f"{path}: segment ID {wrong[0]} does not fit into an RGB pixel; use an ID between "
                f"0 and {MAX_SEGMENTS - 1}"
            )

    def only(self, paths: Iterable[str]) -> Segments:
        """Return a smaller table that contains only the given masks.

        Args:
            paths: Paths of the masks to keep.
        """
        names = {os.path.basename(path) for path in paths} & self.places.keys()
        few = copy.copy(self)
        few.places, parts, end = {}, [self.numbers[:0]], 0
        for name in names:
            part = self.numbers[slice(*self.places[name])]
            parts.append(part)
            few.places[name] = end, end + len(part)
            end += len(part)
        few.numbers = np.concatenate(parts)
        return few

    def of(self, path: str) -> list[tuple[int, int]]:
        """Return the ID and the category of each segment in a mask.

        Args:
            path: Path of the mask. Only the file name is used.

        Raises:
            ValueError: The JSON file does not list the mask.
        """
        name = os.path.basename(path)
        if name not in self.places:
            raise ValueError(f"{self.path} does not list this mask; add its segments")
        first, end = self.places[name]
        return [(number, category) for number, category in self.numbers[first:end].tolist()]
