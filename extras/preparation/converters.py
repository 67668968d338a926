"""Converters that turn annotations from labelling tools or COCO into a data set for training."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import yaml

from dataset.labels import IGNORED, Labels
from dataset.mask_decoder import Masks
from dataset.panoptic import Segments
from dataset.workers import chunked, map_chunks
from errors import DataError, one_line
from extras.preparation.annotation_formats import by_number, read_annotations
from extras.preparation.annotations import (
    BACKGROUND_NAME,
    IGNORED_NAME,
    MALFORMED,
    Annotated,
    Annotations,
    Shape,
    draw,
    find_images,
    image_size,
    reading,
)
from files import explain_output, write_file

BACKGROUND = "background"

SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "test": "val"}


class Converted(NamedTuple):
    """The result of a conversion.

    Attributes:
        values: Mask value of each class except the background, indexed by name.
        notes: Lines to print, for example about images that were left out.
        ignored: Mask values to ignore.
    """

    values: dict[str, int]
    notes: list[str]
    ignored: list[int]


def link(image: Path, target: Path) -> None:
    """Add an image to the data set as a hard link, or as a copy if that is not possible.

    Args:
        image: Path of the image.
        target: Path in the data set.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(image.resolve(), target)
    except OSError:
        with explain_output(target):
            shutil.copy2(image, target)


def write_mask(mask: np.ndarray, target: Path) -> None:
    """Write a mask as a PNG.

    Args:
        mask: (H, W) labels.
        target: Path of the PNG file.
    """
    write_file(target, cv2.imencode(".png", mask)[1].tobytes())


def draw_masks(
    jobs: list[tuple[Path, Annotated, Path]], values: dict[str, int], by_area: bool
) -> None:
    """Draw and write the masks of annotated images.

    Args:
        jobs: Tuples of the image's path, its shapes, and the path of its mask.
        values: Mask value of each class.
        by_area: Whether smaller shapes cover larger ones.

    Raises:
        DataError: An image cannot be read, or its shapes do not match its size.
    """
    for image, annotated, target in jobs:
        try:
            size = image_size(image)
            if annotated.size and annotated.size != size:
                width, height = annotated.size[::-1]
                raise ValueError(
                    f"the image is {size[1]}x{size[0]}, but its annotations are for an image of "
                    f"{width}x{height}; check --images"
                )
            shapes = annotated.shapes
            if annotated.size is None:
                shapes = [_in_pixels(shape, size) for shape in shapes]
            mask = draw(shapes, size, values, by_area)
        except (OSError, *MALFORMED) as error:
            raise DataError(f"{image}: {one_line(error)}") from error
        write_mask(mask, target)


def _in_pixels(shape: Shape, size: tuple[int, int]) -> Shape:
    """Convert YOLO's coordinates, which are fractions of the image size, to pixels."""
    height, width = size
    parts = [np.array(part) for part in shape.outline]
    for part in parts:
        part[0::2] *= width
        part[1::2] *= height
    return shape._replace(outline=[part.tolist() for part in parts])


def read_panoptic(jobs: list[tuple[Path, Path]], masks: Masks) -> None:
    """Convert panoptic masks to class masks.

    Args:
        jobs: Tuples of the path of a panoptic mask and the path of the new mask.
        masks: Decoder for the panoptic masks.

    Raises:
        DataError: A mask cannot be read.
    """
    for mask, target in jobs:
        try:
            labels = masks.decode(mask.read_bytes(), str(mask))
        except (OSError, ValueError) as error:
            raise DataError(f"{mask}: {error}") from error
        write_mask(labels, target)


def add_images(
    names: Iterable[str], images: Path, source: str, out: Path, split: str, exact: bool = False
) -> Iterator[tuple[Path, Path]]:
    """Add images to a split of the new data set; yield each image's path and its mask's path.

    Args:
        names: Names of the images in the annotations.
        images: Folder of the images.
        source: Name of the annotations, for error messages.
        out: Folder of the new data set.
        split: 'train' or 'val'.
        exact: Whether the folders in a name must match the image's folders; see `image_finder`.

    Raises:
        DataError: An image is missing or listed twice, or two images would get the same mask.
    """
    find = image_finder(images, source, exact)
    inputs: dict[str, Path] = {}
    for name in names:
        image = find(name)
        place = image.relative_to(images)
        mask = out / "masks" / split / place.with_suffix(".png")
        # Some file systems ignore case, so paths that differ only in case count as equal.
        other = inputs.get(str(mask).casefold())
        if other == image:
            raise DataError(f"{source} lists the image {name} twice; remove one entry")
        if other:
            raise DataError(f"{image} and {other} would get the same mask file; rename one of them")
        inputs[str(mask).casefold()] = image
        link(image, out / "photos" / split / place)
        yield image, mask


def read_names(path: str) -> dict[int, str]:
    """Read class names, indexed by class number, from a file.

    Args:
        path: Text file with one name per line, YOLO's data.yaml, or id2label.json.

    Raises:
        DataError: The file cannot be read, or it is a YAML or JSON file without names.
    """
    with reading(Path(path)):
        text = Path(path).read_text(encoding="utf-8-sig")
        if path.lower().endswith((".yaml", ".yml")):
            return by_number(yaml.safe_load(text)["names"])
        if path.lower().endswith(".json"):
            return {int(value): str(name) for value, name in json.loads(text).items()}
        return by_number([line.strip() for line in text.splitlines() if line.strip()])


def convert_annotations(options: argparse.Namespace, out: Path) -> Converted:
    """Convert the training annotations, and the validation annotations if there are any.

    Args:
        options: Command-line options.
        out: Folder of the new data set.

    Raises:
        DataError: The annotations cannot be read or do not match the images.
    """
    names = read_names(options.names) if options.names else None
    folders = {"train": Path(options.images), "val": Path(options.val_images or options.images)}
    found = {"train": read_annotations(options.source, names, folders["train"])}
    notes = []
    if options.val_source:
        found["val"] = read_annotations(options.val_source, names, folders["val"])
    else:
        found, notes = by_split(found["train"])
    classes = list(dict.fromkeys(name for split in found.values() for name in split.classes))
    first = int(options.background in classes)
    classes.sort(key=lambda name: name != options.background)
    values = {name: place + 1 - first for place, name in enumerate(classes)}
    if len(classes) >= IGNORED:
        raise DataError(
            f"{options.source}: found {len(classes)} classes, but at most {IGNORED - 1} are "
            "possible; merge some of the classes"
        )
    drawn = {IGNORED_NAME: 255, BACKGROUND_NAME: 0, **values}
    tasks = []
    for split, read in found.items():
        names = [annotated.image for annotated in read.images]
        places = add_images(names, folders[split], options.source, out, split)
        jobs = [(image, one, mask) for one, (image, mask) in zip(read.images, places, strict=True)]
        tasks += [(part, drawn, options.overlap == "area") for part in chunked(jobs)]
    map_chunks(draw_masks, tasks, options.workers, "convert", " images")
    skipped = [line for read in found.values() for line in read.skipped]
    if skipped:
        listed = "; ".join(skipped[:3]) + ("; ..." if len(skipped) > 3 else "")
        notes.append(f"left out, because they have no area: {len(skipped)} ({listed})")
    order = "later shapes cover earlier ones"
    if options.overlap == "area":
        order = "smaller shapes cover larger ones"
    shapes = [shape.name for read in found.values() for one in read.images for shape in one.shapes]
    ignored = [255] if IGNORED_NAME in shapes else []
    return Converted(values, [f"where shapes overlap, {order}", *notes], ignored)


def by_split(read: Annotations) -> tuple[dict[str, Annotations], list[str]]:
    """Split annotations by a word in their paths, as in YOLO's labels/train and labels/val.

    Args:
        read: Annotations of all splits.

    Returns:
        The annotations of each split, and notes about images in neither split. If one of the splits
        is missing, all annotations are in `train`.
    """
    groups: dict[str, list[Annotated]] = defaultdict(list)
    for annotated in read.images:
        words = [part.lower() for part in Path(annotated.image).parts[:-1]]
        groups[next((word for word in words if word in SPLITS), "no split")].append(annotated)
    val = next((word for word in ("val", "valid", "validation", "test") if word in groups), None)
    if "train" not in groups or val is None:
        return {"train": read}, []
    others = {word: found for word, found in groups.items() if word not in ("train", val)}
    notes = [
        f"{len(found)} images of {word} are left out, such as {found[0].image}"
        for word, found in others.items()
    ]
    train, validation = (read._replace(images=groups[word]) for word in ("train", val))
    return {"train": train, "val": validation._replace(skipped=[])}, notes


def image_finder(images: Path, source: str, exact: bool = False) -> Callable[[str], Path]:
    """Return a function that finds an image in a folder by its name in the annotations.

    The function raises DataError if no image or several images match the name.

    Args:
        images: Folder of the images.
        source: Name of the annotations, for error messages.
        exact: Whether the folders in a name must match the image's folders. Otherwise, an image in
            another folder is found if its file name is unique.
    """
    paths = dict(find_images(images))
    by_parts: dict[str, set[Path]] = {}
    if not exact:
        for name, path in paths.items():
            for key in {_without_kind(name), Path(name).name}:
                by_parts.setdefault(key, set()).add(path)

    def find(name: str) -> Path:
        whole = paths.get(os.path.normpath(name))
        if whole is not None:
            return whole
        for key in (_without_kind(name), Path(name).name):
            found = by_parts.get(key, set())
            if len(found) == 1:
                return next(iter(found))
            if found:
                first, second, *_ = sorted(found)
                raise DataError(
                    f"{source} lists the image {name}, which could be {first} or {second}; rename "
                    "one of them"
                )
        raise DataError(
            f"{source} lists the image {name}, which is missing from {images}; check --images"
        )

    return find


def _without_kind(name: str) -> str:
    """Remove folders such as `images` and `labels` from a path."""
    parts = [part for part in Path(name).parts if part not in ("images", "labels", "photos", ".")]
    return "/".join(parts)


def convert_panoptic(options: argparse.Namespace, out: Path) -> Converted:
    """Convert COCO's panoptic JSON and PNG files.

    Args:
        options: Command-line options.
        out: Folder of the new data set.

    Raises:
        DataError: A file cannot be read, or an image is missing.
    """
    tasks, values, categories = [], {}, {}
    for split in ("train", "val") if options.val_source else ("train",):
        source = Path(options.source if split == "train" else options.val_source)
        images = Path(options.images if split == "train" else options.val_images or options.images)
        with reading(source):
            found = json.loads(source.read_text(encoding="utf-8"))
            for category in found["categories"]:
                values.setdefault(str(category["name"]), len(values) + 1)
                categories[int(category["id"])] = values[str(category["name"])]
            files = [str(annotation["file_name"]) for annotation in found["annotations"]]
        folder = Path(options.masks or source.with_suffix(""))
        names = [os.path.splitext(file)[0] for file in files]
        # Require the exact folder. An image in another folder could have the same file name and the
        # same size, so the mistake would go unnoticed.
        places = add_images(names, images, str(source), out, split, exact=True)
        jobs = [(folder / file, mask) for file, (_, mask) in zip(files, places, strict=True)]
        masks = Masks(Labels(max(len(values), 2)), categories, segments=Segments(source))
        tasks += [(part, masks.only(str(mask) for mask, _ in part)) for part in chunked(jobs)]
    map_chunks(read_panoptic, tasks, options.workers, "convert", " images")
    return Converted(values, [], [])
