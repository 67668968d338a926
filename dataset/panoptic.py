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
        # Maps each mask's file name to the IDs and categories of its segments, an array of shape
        # (segments, 2).
        self.segments: dict[str, np.ndarray] = {}
        try:
            with open(path, encoding="utf-8") as file:
                annotations = json.load(file)["annotations"]
            for annotation in annotations:
                pairs = [(s["id"], s["category_id"]) for s in annotation["segments_info"]]
                name = os.path.basename(annotation["file_name"])
                self.segments[name] = np.array(pairs, np.int64).reshape(-1, 2)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(
                f"{path}: cannot be read as JSON in COCO's panoptic format; check the file"
            ) from error
        ids = np.concatenate([np.empty((0, 2), np.int64), *self.segments.values()])[:, 0]
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
        names = {os.path.basename(path) for path in paths} & self.segments.keys()
        few = copy.copy(self)
        few.segments = {name: self.segments[name] for name in names}
        return few

    def of(self, path: str) -> list[tuple[int, int]]:
        """Return the ID and the category of each segment in a mask.

        Args:
            path: Path of the mask. Only the file name is used.

        Raises:
            ValueError: The JSON file does not list the mask.
        """
        name = os.path.basename(path)
        if name not in self.segments:
            raise ValueError(f"{self.path} does not list this mask; add its segments")
        return [(number, category) for number, category in self.segments[name].tolist()]
