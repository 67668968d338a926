"""Readers for COCO, LabelMe, CVAT and YOLO annotations."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import yaml
from PIL import Image

from dataset.paths import visible_files
from errors import DataError
from extras.preparation.annotations import (
    BACKGROUND_NAME,
    IGNORED_NAME,
    Annotated,
    Annotations,
    Shape,
    find_images,
    is_sound,
    load_pycocotools,
    reading,
)

# Number of vertices of the polygon that approximates a circle or an ellipse.
CORNERS = 128
RESERVED = (IGNORED_NAME, BACKGROUND_NAME)
# Annotation types of LabelMe and CVAT that have no area.
WITHOUT_AREA = {"point", "points", "line", "linestrip", "polyline", "skeleton", "tag", "cuboid"}


def read_annotations(
    source: str, names: dict[int, str] | None = None, images: Path | None = None
) -> Annotations:
    """Read COCO instances, CVAT's XML for images, or a folder of LabelMe or YOLO files.

    Args:
        source: Path of the file or folder. For YOLO, this can also be the path of data.yaml.
        names: Class names, indexed by number, for YOLO files without a data.yaml.
        images: Folder of the images, used to tell YOLO's label files from other text files.

    Raises:
        DataError: The source is missing or has an unknown format.
    """
    path = Path(source)
    with reading(path):
        found = _read(path, names, images)
        found = found._replace(classes=[name for name in found.classes if name not in RESERVED])
        if not all(isinstance(name, str) for name in found.classes):
            raise ValueError("a class has no name; give every class a name")
    return found


def _read(path: Path, names: dict[int, str] | None, images: Path | None) -> Annotations:
    if path.is_dir():
        files = [file for _, file in visible_files(path) if file.suffix == ".json"]
        if files:
            return _labelme(files, path)
        return _yolo(path, names, images)
    if path.suffix.lower() in (".yaml", ".yml") and path.is_file():
        return _yolo(path.parent, names, images)
    if path.suffix.lower() == ".xml":
        return _cvat(ElementTree.fromstring(path.read_bytes()))
    return _coco(json.loads(path.read_text(encoding="utf-8")))


def _coco(found: dict[str, Any]) -> Annotations:
    """Read COCO's instances: https://cocodataset.org/#format-data."""
    names = _by_id(found["categories"], "name")
    sizes = {image["id"]: (image["height"], image["width"]) for image in found["images"]}
    shapes: dict[int, list[Shape]] = {number: [] for number in _by_id(found["images"], "file_name")}
    skipped, used = [], set()
    for place, annotation in enumerate(found["annotations"]):
        where = f"annotation {annotation.get('id', place)}"
        image, category = annotation["image_id"], annotation["category_id"]
        if image not in shapes:
            raise DataError(f"{where}: image {image} is not listed under images; add it there")
        if category not in names:
            raise DataError(
                f"{where}: category {category} is not listed under categories; add it there"
            )
        used.add(category)
        outline = annotation["segmentation"]
        if isinstance(outline, list):
            # A flat list is a single polygon.
            parts = [outline] if outline and not isinstance(outline[0], list) else outline
            outline = [part for part in parts if is_sound(part, sizes[image])]
            if outline and len(outline) < len(parts):
                lost = len(parts) - len(outline)
                skipped.append(f"{where}: {lost} of its {len(parts)} polygons")
        if outline:
            shapes[image].append(Shape(names[category], outline))
        else:
            skipped.append(f"{where}: no outline of at least three points within its image")
    # Roboflow exports the root of its category tree as an additional category without shapes.
    roots = {category.get("supercategory") for category in found["categories"]}
    classes = [name for number, name in names.items() if number in used or name not in roots]
    images = [
        Annotated(image["file_name"].replace("\\", "/"), sizes[image["id"]], shapes[image["id"]])
        for image in found["images"]
    ]
    return Annotations(images, classes, skipped)


def _by_id(entries: list[dict[str, Any]], key: str) -> dict[int, Any]:
    """Return the value of a key in each COCO entry, indexed by the entry's unique ID."""
    found: dict[int, Any] = {}
    for entry in entries:
        if found.setdefault(entry["id"], entry[key]) != entry[key]:
            raise ValueError(
                f"{found[entry['id']]} and {entry[key]} have the same id {entry['id']}; change one "
                "of them"
            )
    return found


def _labelme(files: list[Path], root: Path) -> Annotations:
    """Read LabelMe's JSON, one file per image: https://github.com/wkentaro/labelme."""
    images, skipped = [], []
    for file in files:
        with reading(file):
            found = json.loads(file.read_text(encoding="utf-8"))
            shapes, size = [], (found["imageHeight"], found["imageWidth"])
            for shape in found["shapes"]:
                kind, points = shape.get("shape_type") or "polygon", shape["points"]
                # LabelMe stores a mask as a PNG of the rectangle between two points.
                if kind == "mask":
                    picture = Image.open(io.BytesIO(base64.b64decode(shape["mask"])))
                    left, top = map(int, points[0])
                    runs = _run_lengths(np.asarray(picture) > 0, left, top, size)
                    shapes.append(Shape(shape["label"], runs))
                    continue
                outline = _outline(kind, points)
                if outline:
                    shapes.append(Shape(shape["label"], [outline]))
                else:
                    skipped.append(f"{file.name}: {shape['label']}, a {kind}")
            # The image path is relative to the folder of the JSON file.
            name = Path(found["imagePath"].replace("\\", "/")).name
            path = (file.parent.relative_to(root) / name).as_posix()
            images.append(Annotated(path, size, shapes))
    return Annotations(images, sorted({s.name for i in images for s in i.shapes}), skipped)


def _outline(kind: str, points: list[list[float]]) -> list[float] | None:
    """Convert a LabelMe or X-AnyLabeling shape to a polygon; return None if it has no area."""
    if kind == "rectangle" and len(points) == 2:
        (left, top), (right, bottom) = points
        return [left, top, right, top, right, bottom, left, bottom]
    if kind == "circle":
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        return _ellipse(x, y, radius, radius)
    if kind in ("polygon", "rectangle", "rotation"):
        return [float(v) for point in points for v in point] if len(points) > 2 else None
    if kind not in WITHOUT_AREA:
        raise ValueError(f"unknown shape type {kind}")
    return None


def _ellipse(x: float, y: float, width: float, height: float) -> list[float]:
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    return np.stack([x + width * np.cos(angles), y + height * np.sin(angles)], 1).ravel().tolist()


def _turned(outline: list[float], degrees: float) -> list[float]:
    """Rotate a box or an ellipse clockwise about its centre."""
    if not degrees:
        return outline
    points, angle = np.reshape(outline, (-1, 2)), math.radians(degrees)
    middle, (sin, cos) = points.mean(0), (math.sin(angle), math.cos(angle))
    return ((points - middle) @ [[cos, sin], [-sin, cos]] + middle).ravel().tolist()


def _cvat(root: ElementTree.Element) -> Annotations:
    """Read CVAT's XML for images: https://docs.cvat.ai/docs/manual/advanced/xml_format/."""
    images, skipped = [], []
    for image in root.iter("image"):
        size, where = (int(image.attrib["height"]), int(image.attrib["width"])), image.get("name")
        shapes = []
        for element in image:
            outline = _cvat_outline(element.tag, element.attrib, size)
            if outline is None:
                if element.tag != "tag":  # A tag describes the complete image and has no shape.
                    skipped.append(f"{where}: {element.get('label')}, a {element.tag}")
                continue
            if not element.get("label"):
                raise ValueError(f"{where}: a {element.tag} has no label; add a label")
            level = int(element.get("z_order", 0))
            shapes.append(Shape(element.attrib["label"], outline, level))
        images.append(Annotated(image.attrib["name"].replace("\\", "/"), size, shapes))
    if not images:
        is_video = root.find(".//track") is not None
        reason = "contains video tracks" if is_video else "contains no <image> elements"
        raise ValueError(f"the file {reason}; export the task as CVAT for images 1.1")
    # CVAT also lists the parts of a skeleton as labels. These have a `parent` element and are not
    # classes.
    areas = [
        label.findtext("name")
        for label in root.iter("label")
        if label.findtext("type") not in WITHOUT_AREA and label.find("parent") is None
    ]
    drawn = sorted({shape.name for annotated in images for shape in annotated.shapes})
    classes = [name for name in areas if name]
    classes += [name for name in drawn if name not in classes]
    return Annotations(images, classes, skipped)


def _cvat_outline(
    kind: str, values: dict[str, str], size: tuple[int, int]
) -> list[list[float]] | dict[str, Any] | None:
    """Convert a CVAT shape to polygons or run lengths; return None if it has no area."""
    if kind == "polygon":
        return [[float(v) for v in values["points"].replace(";", ",").split(",")]]
    degrees = float(values.get("rotation", 0))
    if kind == "box":
        left, top, right, bottom = (float(values[name]) for name in ("xtl", "ytl", "xbr", "ybr"))
        return [_turned([left, top, right, top, right, bottom, left, bottom], degrees)]
    if kind == "ellipse":
        ellipse = _ellipse(*(float(values[name]) for name in ("cx", "cy", "rx", "ry")))
        return [_turned(ellipse, degrees)]
    if kind != "mask":
        return None
    # CVAT's run lengths go along the rows of a box, whereas COCO's go down the columns of the
    # image.
    runs = [int(run) for run in values["rle"].split(",")]
    width, height, left, top = (int(values[name]) for name in ("width", "height", "left", "top"))
    if min(runs) < 0 or sum(runs) != width * height or width * height > size[0] * size[1]:
        raise ValueError(
            f"the run lengths of a mask do not add up to its box of {width}x{height} pixels; "
            "export the task again"
        )
    inside = np.repeat(np.arange(len(runs)) % 2, runs).reshape(height, width)
    return _run_lengths(inside, left, top, size)


def _run_lengths(inside: np.ndarray, left: int, top: int, size: tuple[int, int]) -> dict[str, Any]:
    """Encode an area within a box of the image as COCO run lengths."""
    whole, (height, width) = np.zeros(size, np.uint8, order="F"), inside.shape
    whole[top : top + height, left : left + width] = inside
    return load_pycocotools().encode(whole)


def _yolo(root: Path, names: dict[int, str] | None, images: Path | None) -> Annotations:
    """Read YOLO's polygons, one text file per image.

    The format is described at https://docs.ultralytics.com/datasets/segment/. The data.yaml with
    the class names may be in the folder itself or up to two levels above it.
    """
    classes = _yolo_names(root) if names is None else names
    stems = {Path(name).stem for name, _ in find_images(images)} if images else set()
    annotated, skipped = [], []
    for file in [file for _, file in visible_files(root) if file.suffix == ".txt"]:
        with reading(file):
            text = file.read_text(encoding="utf-8")
            if file.stem not in stems and not _is_yolo(text):
                skipped.append(f"{file.relative_to(root)}: a text file without labels")
                continue
            shapes = []
            for number, line in enumerate(text.splitlines(), 1):
                if not line.strip():
                    continue
                kind, *values = line.split()
                if len(values) < 6:  # YOLO describes a box with four numbers.
                    skipped.append(f"{file.relative_to(root)}: line {number}, a box")
                    continue
                if int(kind) not in classes:
                    raise DataError(
                        f"{file}: class {kind} has no name; add its name to those of the other "
                        f"{len(classes)} classes"
                    )
                shapes.append(Shape(classes[int(kind)], [[float(value) for value in values]]))
        annotated.append(Annotated(file.relative_to(root).with_suffix("").as_posix(), None, shapes))
    if not annotated:
        raise DataError(
            f"{root}: found neither LabelMe JSON files nor YOLO text files; check the path"
        )
    return Annotations(annotated, list(classes.values()), skipped)


def _is_yolo(text: str) -> bool:
    """Return whether every line of a text file starts with a class and continues with numbers."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    try:
        numbers = [[int(kind), *map(float, values)] for kind, *values in lines]
    except ValueError:
        return False
    return bool(numbers)


def _yolo_names(root: Path) -> dict[int, str]:
    for folder in (root, root.parent, root.parent.parent):
        for config in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
            with reading(config):
                found = yaml.safe_load(config.read_text(encoding="utf-8"))
                if isinstance(found, dict) and "names" in found:
                    return by_number(found["names"])
    raise DataError(
        f"{root}: neither this folder nor its parents have a data.yaml with class names; give the "
        "names with --names"
    )


def by_number(names: Any) -> dict[int, str]:
    """Return YOLO's class names, indexed by class number.

    Args:
        names: A list of names, or a mapping from numbers to names.
    """
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    return dict(sorted((int(number), str(name)) for number, name in pairs))
