"""What the classes are called, and their colours.

classes = load_classes(None, 150)    # ADE20K's names and colours
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import cv2
import numpy as np

from errors import ClassError

ADE20K_CSV = Path(__file__).with_name("ade20k_classes.csv")
PAPER, WRONG = (255, 255, 255), (230, 25, 75)  # of pictures: no class is like them


class ClassInfo(NamedTuple):
    """One class: its name and its RGB colour."""

    name: str
    color: tuple[int, int, int]


def load_classes(source: str | Sequence[str] | None, num_classes: int) -> list[ClassInfo]:
    """Return the names and colours of the classes a model predicts.

    Args:
        source: A text file with a name a line; a CSV with the columns `name` or
            `name,red,green,blue` (with that header line or none); a list of names; or `None`:
            ADE20K's 150 classes, the same after an `other` where there are 151, and plain numbers
            for any other count.
        num_classes: How many classes the model predicts; entry i is class index i.

    Raises:
        ClassError: The file is missing or malformed, or holds another number of classes.
    """
    if source is None:
        if num_classes in (150, 151):
            return [ClassInfo("other", (0, 0, 0))] * (num_classes - 150) + _read(ADE20K_CSV)
        source = [f"class {i}" for i in range(num_classes)]
    where = source if isinstance(source, str) else "the list of class names"
    if isinstance(source, str):
        classes = _read(Path(source))
    else:
        colors = distinct_colors(len(source))
        classes = [ClassInfo(str(name), color) for name, color in zip(source, colors)]
    if len(classes) != num_classes:
        raise ClassError(
            f"{where} names {len(classes)} classes, but the model predicts {num_classes}; "
            "give one name a line, in the order of the class indices"
        )
    return classes


def _read(path: Path) -> list[ClassInfo]:
    try:
        rows = [row for row in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise ClassError(f"cannot read the class names in {path}: {error}") from error
    if rows and rows[0][:4] in (["name"], ["name", "red", "green", "blue"]):
        rows = rows[1:]
    colors = distinct_colors(len(rows))
    classes = []
    for row, color in zip(rows, colors):
        name, rgb = row[0].strip(), row[1:4]
        if len(rgb) == 3 and all(value.strip().isdigit() and int(value) < 256 for value in rgb):
            color = (int(rgb[0]), int(rgb[1]), int(rgb[2]))
        elif rgb:
            raise ClassError(
                f"{path}: {','.join(row)!r} is neither 'name' nor 'name,red,green,blue'"
            )
        classes.append(ClassInfo(name, color))
    return classes


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """`count` colours, each as far as can be from those before it, and from black, white and red.

    Distances are Euclidean in CIELAB, where equal ones look about equally large.
    """
    steps = np.arange(0, 256, 17)
    colors = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    lab = _lab(colors)
    distance = np.min([_squared_distance(lab, c) for c in _lab([PAPER, (0, 0, 0), WRONG])], axis=0)
    distance[(lab[:, 0] < 40) | (lab[:, 0] > 92)] = 0
    chosen = []
    for _ in range(count):
        chosen.append(distance.argmax())
        distance = np.minimum(distance, _squared_distance(lab, lab[chosen[-1]]))
    return [tuple(color) for color in colors[chosen].tolist()]


def _lab(colors: np.ndarray | Sequence[tuple[int, int, int]]) -> np.ndarray:
    """RGB (N, 3) in CIELAB; whole numbers, so that every machine finds the same distances."""
    rgb = np.array([colors], np.float32) / 255
    return np.rint(cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)[0]).astype(np.int64)


def _squared_distance(colors: np.ndarray, color: np.ndarray) -> np.ndarray:
    return ((colors - color) ** 2).sum(1)


def classes_to_json(classes: Sequence[ClassInfo]) -> str:
    """Return the classes as files carry them: `[{"name": ..., "color": [r, g, b]}, ...]`."""
    return json.dumps([{"name": c.name, "color": list(c.color)} for c in classes])


def classes_from_json(text: str) -> list[ClassInfo]:
    """Return what `classes_to_json` wrote.

    Raises:
        ClassError: The text is not of that form.
    """
    try:
        return [
            ClassInfo(str(c["name"]), cast("tuple[int, int, int]", tuple(map(int, c["color"]))))
            for c in json.loads(text)
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ClassError(f"class names in the file's metadata are malformed: {error}") from error
