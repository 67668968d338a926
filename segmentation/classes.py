"""Names and colours of the classes.

`load_classes(None, 150)` returns ADE20K's names and colours.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeGuard, cast

import cv2
import numpy as np

from errors import ClassError

ADE20K_CSV = Path(__file__).with_name("ade20k_classes.csv")
# Colours that drawings use for the background and for wrong pixels. Every class colour differs from
# both.
PAPER, WRONG = (255, 255, 255), (230, 25, 75)


class ClassInfo(NamedTuple):
    """The name and the RGB colour of one class."""

    name: str
    color: tuple[int, int, int]


Classes = Sequence[ClassInfo]  # Ordered by class index.


def load_classes(source: str | Sequence[str] | None, num_classes: int) -> list[ClassInfo]:
    """Return the names and colours of a model's classes.

    Args:
        source: Source of the names, in one of these forms:
            - a text file with one name per line;
            - a CSV file with the columns `name` or `name,red,green,blue`, with or without that
              header;
            - a list of names;
            - None, which means ADE20K's 150 classes. With 151 classes, the class `other` precedes
              ADE20K's classes. With any other number of classes, the names are numbers.
        num_classes: Number of classes that the model predicts. Entry i of the result is the name
            and colour of class index i.

    Raises:
        ClassError: The file is missing or malformed, or has the wrong number of classes.
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
            "give one name per line, in the order of the class indices"
        )
    return classes


def _read(path: Path) -> list[ClassInfo]:
    try:
        rows = [row for row in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise ClassError(f"cannot read the class names in {path}: {error}") from error
    if rows and rows[0][:4] in (["name"], ["name", "red", "green", "blue"]):
        rows = rows[1:]
    classes = []
    for row, color in zip(rows, distinct_colors(len(rows))):
        name, rgb = row[0].strip(), row[1:4]
        if len(rgb) == 3 and all(value.strip().isdigit() and int(value) < 256 for value in rgb):
            color = (int(rgb[0]), int(rgb[1]), int(rgb[2]))
        elif rgb:
            raise ClassError(
                f"{path}: got {','.join(row)!r}; expected 'name' or 'name,red,green,blue'"
            )
        classes.append(ClassInfo(name, color))
    return classes


def match_classes(
    classes: Classes | None, others: Classes | None, where: str, others_where: str
) -> list[int] | None:
    """Match two lists of classes by name, for example a data set's and a checkpoint's classes.

    The comparison ignores case, and treats spaces, `_` and `-` between words as equal.

    Args:
        classes: The first list, in the order of the class indices, or None if it is not known.
        others: The second list, or None if it is not known.
        where: Source of the first list, for the error message.
        others_where: Source of the second list, for the error message.

    Returns:
        For each class in `classes`, its index in `others`. None if both lists have the same order,
        or if a list is unknown or contains only numbers ("class 0", "12").

    Raises:
        ClassError: The lists contain different names. The message shows the first difference.
    """
    if not are_named(classes) or not are_named(others):
        return None
    if len(classes) != len(others):
        counts = f"{len(classes)} classes, but {others_where} has {len(others)}"
        raise ClassError(f"{where} has {counts}")
    keys, other_keys = ([class_key(info.name) for info in infos] for infos in (classes, others))
    if keys == other_keys:
        return None
    different = first_difference(classes, others, where, others_where)
    if set(keys) != set(other_keys):
        raise ClassError(different)
    if len(set(keys)) < len(keys):
        twice = next(info.name for info, key in zip(classes, keys) if keys.count(key) > 1)
        raise ClassError(
            f"the name {twice} occurs twice, so the classes cannot be matched by name "
            f"({different}); rename one of them"
        )
    return [other_keys.index(key) for key in keys]


def first_difference(classes: Classes, others: Classes, where: str, others_where: str) -> str:
    """Describe the first class that is missing from the other list or has a different index there.

    Args:
        classes: The first list, in the order of the class indices.
        others: The second list.
        where: Source of the first list, for the message.
        others_where: Source of the second list, for the message.
    """
    other_keys = [class_key(info.name) for info in others]
    pairs = list(enumerate(zip(classes, others)))
    missing = [i for i, (info, _) in pairs if class_key(info.name) not in other_keys]
    moved = [i for i, (info, other) in pairs if class_key(info.name) != class_key(other.name)]
    place = (missing or moved)[0]
    return (
        f"{where}: class {place} is {classes[place].name}, "
        f"but in {others_where} it is {others[place].name}"
    )


def are_named(classes: Classes | None) -> TypeGuard[Classes]:
    """Return whether any class has a proper name instead of a number such as "class 0" or "12".

    Args:
        classes: The classes, or None if they are not known.
    """
    number = re.compile(r"(class|label|category)?[ _-]?\d+", re.IGNORECASE)
    return any(not number.fullmatch(info.name.strip()) for info in classes or ())


def rename_classes(
    source: str | Sequence[str] | None,
    num_classes: int,
    recorded: Classes | None,
    recorded_where: str = "the checkpoint",
) -> list[ClassInfo]:
    """Return the classes with the names and colours that the user chose.

    Args:
        source: Names and colours (see `load_classes`), or None to keep the recorded names.
        num_classes: Number of classes.
        recorded: Names and colours from the checkpoint or the description, or None.
        recorded_where: Source of the recorded names, for the error message.

    Raises:
        ClassError: `load_classes` failed, or a name belongs to a different class in `recorded`.
            In the second case, the list is in the wrong order, and every drawing would be labelled
            wrongly.
    """
    if source is None and recorded is not None:
        return list(recorded)
    classes = load_classes(source, num_classes)
    if source is None or not are_named(classes) or not are_named(recorded):
        return classes
    keys = [class_key(info.name) for info in recorded]
    for place, info in enumerate(classes):
        key = class_key(info.name)
        if key in keys and keys[place] != key:
            where = source if isinstance(source, str) else "the list of class names"
            raise ClassError(
                f"{where}: class {place} is {info.name}, but in {recorded_where} it is "
                f"{recorded[place].name}; give the names in the order of the class indices"
            )
    return list(classes)


def class_key(name: str) -> str:
    """Return a normalised class name, so that different spellings compare equal.

    Args:
        name: Name of the class.
    """
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def label_warning(
    occurs: Sequence[bool],
    classes: Classes,
    masks: str,
    unlabelled: float | None = None,
    hint: str = "",
) -> str | None:
    """Return a warning if some classes never occur or if most pixels have no class, otherwise None.

    Args:
        occurs: For each class, whether any pixel belongs to it.
        classes: The classes.
        masks: Noun for a mask in the warning, such as "validation mask".
        unlabelled: Fraction of the pixels without a class, 0 to 1, or None if it is not known.
        hint: Advice to add if most pixels have no class.
    """
    missing = [info.name for info, there in zip(classes, occurs, strict=True) if not there]
    parts = []
    if len(missing) == len(classes):
        parts.append(f"no {masks} has a labelled pixel")
    elif missing:
        parts.append(f"no {masks} has {name_classes(missing)}")
    if len(missing) == len(classes) - 1:
        (only,) = (info.name for info, there in zip(classes, occurs) if there)
        parts.append(f"every labelled pixel is {name_classes([only])}")
    mostly = unlabelled is not None and unlabelled > 0.5
    if mostly and len(missing) < len(classes):
        parts.append(f"{unlabelled:.0%} of the pixels have no class")
    if hint and (mostly or len(missing) == len(classes)):
        parts.append(hint)
    return "; ".join(parts) or None


def name_classes(names: Sequence[str], most: int = 5) -> str:
    """Format names for a sentence, such as "class pole" or "the classes pole, car and 3 more".

    Args:
        names: Names of the classes.
        most: Maximum number of names to show.
    """
    # Remove the word "class", because the message would otherwise say "class class 7".
    names = [name.removeprefix("class ") for name in names]
    if len(names) == 1:
        return f"class {names[0]}"
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"the classes {', '.join(names[:most])}{rest}"


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """Return colours that differ from each other and from black, white and red.

    Each colour is as far as possible from all previous colours. The distance is Euclidean in
    CIELAB, where equal distances look roughly equal to the eye.

    Args:
        count: Number of colours.
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
    """Convert RGB (N, 3) to CIELAB.

    The values are rounded to integers, so that all machines compute the same distances.
    """
    rgb = np.array([colors], np.float32) / 255
    return np.rint(cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)[0]).astype(np.int64)


def _squared_distance(colors: np.ndarray, color: np.ndarray) -> np.ndarray:
    return ((colors - color) ** 2).sum(1)


def classes_to_json(classes: Classes) -> str:
    """Return the classes as JSON: `[{"name": ..., "color": [r, g, b]}, ...]`.

    Args:
        classes: The classes, in the order of the class indices.
    """
    return json.dumps([{"name": c.name, "color": list(c.color)} for c in classes])


def classes_from_json(text: str) -> list[ClassInfo]:
    """Return the classes from JSON text written by `classes_to_json`.

    Args:
        text: The JSON text.

    Raises:
        ClassError: The text does not have the expected form.
    """
    try:
        return [
            ClassInfo(str(c["name"]), cast("tuple[int, int, int]", tuple(map(int, c["color"]))))
            for c in json.loads(text)
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ClassError(
            f"the class names in the file's metadata are malformed: {error}"
        ) from error
