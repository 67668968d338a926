"""Annotation files in the formats of labelling tools, and the masks expected from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

import convert_dataset
from dataset.description import open_description
from dataset.mask_decoder import Masks
from dataset.matching import list_splits, require

SIZE = (48, 64)  # height and width
NAMES = ["road", "car", "pole"]
COUNT = 8


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        small = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number}.jpg"), cv2.resize(small, SIZE[::-1]))
    return folder


def scene(number: int) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Return three random boxes (left, top, right, bottom) of different sizes that may overlap."""
    rng = np.random.default_rng(number)
    boxes = []
    for name, size in (("road", 30), ("car", 14), ("pole", 6)):
        left, top = rng.integers(0, (SIZE[1] - size, SIZE[0] - size)).tolist()
        boxes.append((name, (left, top, left + size, top + size)))
    # The smallest box comes first, so it is hidden if boxes are drawn in the order of the file.
    return boxes[::-1]


def expected(number: int, by_area: bool = True) -> np.ndarray:
    """Return the expected mask of a scene, in which 0 is the background."""
    mask = np.zeros(SIZE, np.uint8)
    boxes = scene(number)
    for name, (left, top, right, bottom) in boxes[::-1] if by_area else boxes:
        mask[top:bottom, left:right] = 1 + NAMES.index(name)
    return mask


def corners(box: tuple[int, int, int, int]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right, top, right, bottom, left, bottom]


def columns(mask: np.ndarray) -> list[int]:
    """Return COCO's run-length encoding of a mask: column-major, starting with the run of zeros."""
    runs, last = [0], 0
    for value in mask.T.ravel().tolist():
        if value != last:
            runs.append(0)
            last = value
        runs[-1] += 1
    return runs


def box_mask(box: tuple[int, int, int, int]) -> np.ndarray:
    left, top, right, bottom = box
    mask = np.zeros(SIZE, np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def write_coco(file: Path, run_lengths: bool = False, numbers: range = range(COUNT)) -> Path:
    height, width = SIZE
    annotations = []
    for number in numbers:
        for name, box in scene(number):
            outline: Any = [corners(box)]
            if run_lengths:
                outline = {"size": list(SIZE), "counts": columns(box_mask(box))}
            entry = {"image_id": number, "category_id": 10 + NAMES.index(name)}
            annotations.append(entry | {"segmentation": outline, "iscrowd": int(run_lengths)})
    images = [{"id": n, "file_name": f"{n}.jpg", "height": height, "width": width} for n in numbers]
    categories = [{"id": 10 + k, "name": name} for k, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    return file


def write_labelme(folder: Path) -> Path:
    folder.mkdir()
    for number in range(COUNT):
        shapes = [
            {"label": name, "shape_type": "rectangle", "points": [box[:2], box[2:]]}
            if name == "car"
            else {"label": name, "points": np.reshape(corners(box), (-1, 2)).tolist()}
            for name, box in scene(number)
        ] + [{"label": "road", "shape_type": "point", "points": [[1, 1]]}]
        content = {"imagePath": f"..\\photos\\{number}.jpg", "imageData": None, "shapes": shapes}
        content |= {"imageHeight": SIZE[0], "imageWidth": SIZE[1]}
        (folder / f"{number}.json").write_text(json.dumps(content))
    return folder


def write_cvat(file: Path) -> Path:
    """Write a CVAT file with a polygon, a box and a run-length encoded mask for each image."""
    images = []
    for number in range(COUNT):
        shapes = []
        for level, (name, box) in enumerate(scene(number)):
            left, top, right, bottom = box
            more = f'label="{name}" z_order="{level}"'
            if name == "road":
                points = ";".join(f"{x},{y}" for x, y in np.reshape(corners(box), (-1, 2)))
                shapes.append(f'<polygon points="{points}" {more}/>')
            elif name == "car":
                sides = f'xtl="{left}" ytl="{top}" xbr="{right}" ybr="{bottom}"'
                shapes.append(f"<box {sides} {more}/>")
            else:
                place = f'left="{left - 1}" top="{top}" width="{right - left + 1}"'
                row = f"1,{right - left}"
                runs = ",".join([row] * (bottom - top))
                shapes.append(f'<mask rle="{runs}" {place} height="{bottom - top}" {more}/>')
        attributes = f'id="{number}" name="{number}.jpg" width="{SIZE[1]}" height="{SIZE[0]}"'
        images.append(f"<image {attributes}>{''.join(shapes)}</image>")
    labels = "".join(f"<label><name>{name}</name></label>" for name in NAMES)
    file.write_text(f"<annotations><meta>{labels}</meta>{''.join(images)}</annotations>")
    return file


def write_yolo(folder: Path) -> Path:
    folder.mkdir()
    (folder / "data.yaml").write_text(yaml.safe_dump({"names": dict(enumerate(NAMES))}))
    for number in range(COUNT):
        lines = []
        for name, box in scene(number):
            shares = np.reshape(corners(box), (-1, 2)) / SIZE[::-1]
            values = " ".join(f"{share:.10f}" for share in shares.ravel())
            lines.append(f"{NAMES.index(name)} {values}\n")
        (folder / f"{number}.txt").write_text("".join(lines))
    return folder


def write_panoptic(file: Path) -> Path:
    folder = file.with_suffix("")
    folder.mkdir()
    annotations = []
    for number in range(COUNT):
        labels = expected(number)
        numbers = np.array([0, 70000 + number, 300, 7])
        ids = numbers[labels]
        picture = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], 2).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png")
        infos = [
            {"id": int(numbers[k]), "category_id": 10 + k - 1}
            for k in np.unique(labels).tolist()
            if k
        ]
        annotations.append({"file_name": f"{number}.png", "segments_info": infos})
    categories = [{"id": 10 + k, "name": name} for k, name in enumerate(NAMES)]
    file.write_text(json.dumps({"annotations": annotations, "categories": categories}))
    return file


def masks_of(out: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the class names, and the class indices of each mask, with -1 for ignored pixels."""
    root, description = open_description(str(out / "data.yaml"))
    assert description is not None
    index_by_name = {}
    for split in ("train", "val"):
        masks = Masks.of(description, split, root)
        for sample in require(list_splits(description, split, root)[split]):
            content = Path(sample.mask_path).read_bytes()
            name = f"{Path(sample.image_path).parent.name}/{Path(sample.image_path).stem}"
            index_by_name[name] = masks.labels.index()[masks.decode(content, sample.mask_path)]
    return [info.name for info in description.classes], index_by_name


def convert(*arguments: Any) -> int:
    return convert_dataset.main([*map(str, arguments), "--workers", "1"])


SOURCES = {
    "coco": lambda folder: write_coco(folder / "instances.json"),
    "coco-rle": lambda folder: write_coco(folder / "instances.json", run_lengths=True),
    "labelme": lambda folder: write_labelme(folder / "labelled"),
    "cvat": lambda folder: write_cvat(folder / "annotations.xml"),
    "yolo": lambda folder: write_yolo(folder / "labels"),
}


def square(left: int, top: int, side: int) -> np.ndarray:
    """Return the corners of a square as an array of shape (4, 2)."""
    return np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) * side + (left, top)


def drawn(*squares: tuple[tuple[int, int, int], int]) -> np.ndarray:
    """Draw squares of the given values into a mask; later squares cover earlier ones."""
    mask = np.zeros(SIZE, np.uint8)
    for (left, top, side), value in squares:
        mask[top : top + side, left : left + side] = value
    return mask


ROAD, CAR, EDGE = (4, 4, 30), (8, 8, 12), (24, 24, 8)


def labelme(folder: Path, shapes: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for number in range(COUNT):
        content = {"imagePath": f"{number}.jpg", "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
        (folder / f"{number}.json").write_text(json.dumps({**content, "shapes": shapes}))
    return folder


def shape(label: str, kind: str, points: Any) -> dict[str, Any]:
    return {"label": label, "shape_type": kind, "points": np.asarray(points).tolist()}
