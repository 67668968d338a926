"""Types for the shapes that labelling tools export, and functions that draw them as masks.

COCO's own library, pycocotools, draws the shapes. It draws the polygons of all tools in the same
way, and needs only NumPy. No other library reads COCO's compressed run lengths.

Two other libraries were considered. The library datumaro reads just as many formats, but it
installs a second OpenCV over the existing one. The library supervision reads neither LabelMe nor
CVAT. This project's readers for LabelMe, CVAT and YOLO need only a few lines each.
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

# Largest allowed coordinate of an outline, as a multiple of the image's longer side.
BEYOND = 16
# Label names that LabelMe uses for ignored pixels and for pixels without a class.
IGNORED_NAME, BACKGROUND_NAME = "__ignore__", "_background_"
# Exceptions that parsing a malformed file can raise.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
MALFORMED += (yaml.YAMLError, ElementTree.ParseError)


class Shape(NamedTuple):
    """A labelled area in an image.

    Attributes:
        name: Name of the class.
        outline: Polygons, each [x1, y1, x2, y2, ...] in pixels, or run lengths in COCO's format.
        level: Drawing order. Shapes with a higher level cover those with a lower level.
    """

    name: str
    outline: list[list[float]] | dict[str, Any]
    level: int = 0


class Annotated(NamedTuple):
    """An image and the shapes on it.

    Attributes:
        image: Path of the image, relative to the image folder.
        size: Height and width, or None if the file does not give them.
        shapes: Shapes on the image.
    """

    image: str
    size: tuple[int, int] | None
    shapes: list[Shape]


class Annotations(NamedTuple):
    """The contents of one annotation file or folder.

    Attributes:
        images: All annotated images.
        classes: Names of the classes in the tool's order, without the names in `RESERVED`.
        skipped: A line of text for each file or shape that was left out, such as a point.
    """

    images: list[Annotated]
    classes: list[str]
    skipped: list[str]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert any error raised while reading an annotation file to a one-line DataError.

    Args:
        path: Path of the file or folder.

    Raises:
        DataError: The file cannot be read or has an unknown format.
    """
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        # Pillow's OSError for a damaged image has no strerror, so use its message.
        reason = error.strerror or one_line(error)
        raise DataError(f"{error.filename or path}: {reason}") from error
    except KeyError as error:
        raise DataError(
            f"{path}: cannot be read: the key {error} is missing; export the file again"
        ) from error
    except MALFORMED as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error


def is_sound(part: list[float], size: tuple[int, int]) -> bool:
    """Return whether a polygon has at least three points, all in or near the image.

    Args:
        part: Coordinates [x1, y1, x2, y2, ...] in pixels.
        size: Height and width of the image.
    """
    numbers = all(isinstance(value, int | float) for value in part)
    if not numbers or len(part) < 6 or len(part) % 2:
        return False
    return bool(np.abs(np.asarray(part, float)).max() < BEYOND * max(size))


def image_size(path: Path) -> tuple[int, int]:
    """Return the height and width of an image after its EXIF rotation.

    Args:
        path: Path of the image.
    """
    with Image.open(path) as image:
        # Pillow has already applied the EXIF orientation of a TIFF.
        turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) >= 5
        width, height = image.size
    return (width, height) if turned else (height, width)


def load_pycocotools() -> Any:
    """Import and return `pycocotools.mask`.

    Raises:
        DataError: pycocotools is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise DataError(
            "convert_dataset.py needs pycocotools; run make install WITH=convert"
        ) from error
    return mask


def draw(
    shapes: list[Shape], size: tuple[int, int], labels: dict[str, int], by_area: bool
) -> np.ndarray:
    """Draw an image's shapes as a mask.

    Args:
        shapes: Shapes in the order of the file.
        size: Height and width of the image.
        labels: Mask value of each class, indexed by name.
        by_area: Whether smaller shapes cover larger ones. Otherwise, shapes with higher levels
            cover those with lower levels, and later shapes cover earlier shapes.

    Returns:
        np.ndarray: (H, W) uint8, 0 for pixels outside all shapes.

    Raises:
        DataError: pycocotools is missing.
        ValueError: An outline does not match the image size.
    """
    coco = load_pycocotools()
    drawn = []
    for shape in shapes:
        runs = shape.outline
        if isinstance(runs, dict):
            if tuple(runs["size"]) != size:
                raise ValueError(
                    f"the run lengths are for an image of size {runs['size']}, but the image has "
                    f"size {list(size)}; export the annotations again"
                )
            if isinstance(runs["counts"], list):
                if sum(runs["counts"]) != size[0] * size[1] or min(runs["counts"]) < 0:
                    raise ValueError(
                        f"the run lengths do not add up to the image size {list(size)}; export the "
                        "annotations again"
                    )
                runs = coco.frPyObjects(runs, *size)
        else:
            for part in runs:
                if not is_sound(part, size):
                    raise ValueError(
                        f"an outline with {len(part) // 2} points has too few points or is far "
                        "outside the image; redraw or delete it"
                    )
            runs = coco.merge(coco.frPyObjects(runs, *size))
        drawn.append((coco.area(runs), shape.level, runs, labels[shape.name]))
    drawn.sort(key=(lambda one: -int(one[0])) if by_area else (lambda one: one[1]))
    mask = np.zeros(size, np.uint8)
    for _, _, runs, label in drawn:
        mask[coco.decode(runs) > 0] = label
    return mask


def find_images(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and the path of each image in a folder.

    Names are paths relative to the folder. The function yields all images twice: first with names
    without the extension, then with names that include it.

    Args:
        folder: Folder to search.
    """
    images = [
        (name, path)
        for name, path in visible_files(folder)
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    yield from images
    yield from ((f"{name}{path.suffix}", path) for name, path in images)
