"""Shapes on images, as any labelling tool writes them, and masks drawn from them.

Shapes are drawn by pycocotools, COCO's own library: one rule for polygons of every tool, and the
only reader of COCO's compressed run lengths. It has no dependencies but NumPy. (datumaro reads as
many formats, but installs a second OpenCV over the one that is here; supervision leaves LabelMe and
CVAT out.) Reading LabelMe, CVAT and YOLO takes a few lines each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import yaml
from PIL import Image

from dataset.paths import IMAGE_SUFFIXES, visible_files
from errors import DataError, one_line

BEYOND = 16  # times a photo's longer side: no outline goes further, whatever a file says
# LabelMe's names for pixels that are ignored, and for those of no class.
IGNORED_NAME, BACKGROUND_NAME = "__ignore__", "_background_"
# What reading raises where a file's parts are of other types than its format says.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
MALFORMED += (yaml.YAMLError, ElementTree.ParseError)


class Shape(NamedTuple):
    """An area of a class.

    Attributes:
        name: The class.
        outline: Polygons, [x1, y1, x2, y2, ...] each in pixels, or COCO's run lengths.
        level: Shapes of a higher one lie on those of a lower one.
    """

    name: str
    outline: list[list[float]] | dict[str, Any]
    level: int = 0


class Annotated(NamedTuple):
    """A photo, by its path below the folder of photos, and the shapes on it."""

    photo: str
    size: tuple[int, int] | None  # height and width, where the file says
    shapes: list[Shape]


class Annotations(NamedTuple):
    """The content of a tool's file or folder.

    Attributes:
        photos: All of them.
        classes: Their names, in the tool's order, without those in `RESERVED`.
        skipped: A line on each shape or file that was left out, such as points and lines.
    """

    photos: list[Annotated]
    classes: list[str]
    skipped: list[str]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say in a line, as a DataError, what is wrong with a file of annotations that is read."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        reason = error.strerror or one_line(error)  # without one where a picture is none
        raise DataError(f"{error.filename or path}: {reason}") from error
    except KeyError as error:
        raise DataError(f"{path}: {error} is missing: not of a format that is known") from error
    except MALFORMED as error:
        raise DataError(f"{path}: not of a format that is known ({one_line(error)})") from error


def is_sound(part: list[float], size: tuple[int, int]) -> bool:
    """Return whether a polygon has three points or more, all in or near the image."""
    numbers = all(isinstance(value, int | float) for value in part)
    if not numbers or len(part) < 6 or len(part) % 2:
        return False
    return bool(np.abs(np.asarray(part, float)).max() < BEYOND * max(size))


def photo_size(path: Path) -> tuple[int, int]:
    """Return height and width of a photo as a viewer shows it."""
    with Image.open(path) as image:
        # Pillow has turned a TIFF itself.
        turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) >= 5
        width, height = image.size
    return (width, height) if turned else (height, width)


def _pycocotools() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise DataError(
            "convert_dataset.py needs pycocotools: make install WITH=convert"
        ) from error
    return mask


def draw(
    shapes: list[Shape], size: tuple[int, int], labels: dict[str, int], by_area: bool
) -> np.ndarray:
    """Draw shapes over each other.

    Args:
        shapes: In the file's order.
        size: Height and width.
        labels: The value of each class.
        by_area: Whether smaller ones lie on larger ones; otherwise higher levels on lower ones, and
            later ones on earlier ones.

    Returns:
        np.ndarray: (H, W) uint8, 0 where there is none.

    Raises:
        DataError: pycocotools is missing.
        ValueError: An outline is not of this size.
    """
    coco = _pycocotools()
    drawn = []
    for shape in shapes:
        runs = shape.outline
        if isinstance(runs, dict):
            if tuple(runs["size"]) != size:
                raise ValueError(f"run lengths of {runs['size']} on a photo of {list(size)}")
            if isinstance(runs["counts"], list):
                if sum(runs["counts"]) != size[0] * size[1] or min(runs["counts"]) < 0:
                    raise ValueError(f"run lengths do not fill {list(size)}")
                runs = coco.frPyObjects(runs, *size)
        else:
            for part in runs:
                if not is_sound(part, size):
                    raise ValueError(f"an outline of {len(part) // 2} points, or far outside")
            runs = coco.merge(coco.frPyObjects(runs, *size))
        drawn.append((coco.area(runs), shape.level, runs, labels[shape.name]))
    drawn.sort(key=(lambda one: -int(one[0])) if by_area else (lambda one: one[1]))
    mask = np.zeros(size, np.uint8)
    for _, _, runs, label in drawn:
        mask[coco.decode(runs) > 0] = label
    return mask


def find_photos(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield photos by their path below a folder, first without extension, and then with it."""
    photos = [
        (name, path)
        for name, path in visible_files(folder)
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    yield from photos
    yield from ((f"{name}{path.suffix}", path) for name, path in photos)
