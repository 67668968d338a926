"""Functions that name the classes in a suggested description and format them as YAML lines."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import yaml

from dataset.description import pack, unpack
from dataset.paths import visible_files
from errors import DataError
from extras.preparation.find_classes import MOST_CLASSES, VOC_BORDER, WHITE, Values, list_some

# Black, white or label 0 may mean "ignore" if it covers less than this fraction of the pixels.
RARE = 0.2
IGNORED_NAMES = {"void", "ignore", "ignored", "unlabeled", "unlabelled", "unknown", "border"}
# Meaning of the column headings in class tables.
_COLUMNS = {"r": "r", "red": "r", "g": "g", "green": "g", "b": "b", "blue": "b"}
_COLUMNS |= dict.fromkeys(("name", "class", "label", "class name", "category"), "name")
_COLUMNS |= dict.fromkeys(("pixel value", "pixel", "value", "id", "index"), "value")
_COLUMNS |= dict.fromkeys(("label id", "class id"), "value")


def find_names(root: Path, values: Values) -> tuple[dict[int, str], str]:
    """Find a file with a table that gives the class name of each mask value or colour.

    The known formats are `class_dict.csv`, `_classes.csv`, `labelmap.txt` and `label_colors.txt`.
    For masks with a palette, a table of colours also works.

    Args:
        root: Folder of the data set.
        values: Values of the masks.

    Returns:
        The class name of each mask value, and the path of the table.
    """
    best: tuple[dict[int, str], str] = {}, ""
    needed = values.pixels.keys() - values.edges.keys()
    for _, path in visible_files(root):
        if path.suffix.lower() not in (".csv", ".txt", ".tsv"):
            continue
        by_color, by_value = _read_table(path)
        by_palette = {v: by_color[c] for v, c in values.colors.items() if c in by_color}
        tables = [by_color] if values.in_colors else [by_value, by_palette]
        for names in tables:
            count = len(names.keys() & needed)
            if 2 * count > len(needed) and count > len(best[0].keys() & needed):
                best = names, path.relative_to(root).as_posix()
    return best


def _read_table(path: Path) -> tuple[dict[int, str], dict[int, str]]:
    """Return a table's class names, indexed by colour and by value; other files have none."""
    by_color: dict[int, str] = {}
    by_value: dict[int, str] = {}
    place: dict[str, int] = {}  # Column index of each heading.
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines()[:2000]:
        cells = _cells(line)
        headings = [cell.lower().replace("_", " ") for cell in cells]
        header = {_COLUMNS[cell]: n for n, cell in enumerate(headings) if cell in _COLUMNS}
        if "name" in header and len(header) > 1 and not by_color and not by_value:
            place = header
            continue
        # CVAT's label files contain lines such as `road:128,64,128::`.
        cvat = re.fullmatch(r"([^:]+):(\d+),(\d+),(\d+)(:.*)?", line.strip())
        if cvat:
            row = dict(zip(("name", "r", "g", "b"), cvat.groups()))
        elif place and max(place.values()) < len(cells):
            row = {column: cells[n] for column, n in place.items()}
        else:
            row = _guess_columns(cells)
        name = row.get("name", "")
        numbers = {k: int(v) for k, v in row.items() if k != "name" and v.isascii() and v.isdigit()}
        if not name:
            continue
        if numbers.keys() >= {"r", "g", "b"} and max(numbers[c] for c in "rgb") < 256:
            by_color.setdefault(pack(*(numbers[c] for c in "rgb")), name)
        if "value" in numbers:
            by_value.setdefault(numbers["value"], name)
    return by_color, by_value


def _cells(line: str) -> list[str]:
    """Split a line of a class table into cells."""
    for separator in ("\t", ";", ","):
        if separator in line:
            cells = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
            cells = [cell.strip() for cell in cells]
            # CamVid's class table contains lines such as `64 128 64<tabs>Animal`.
            if separator == "\t":
                cells = [p for c in cells if c for p in (c.split() if c[0].isdigit() else [c])]
            return cells
    return [part for part in re.split(r"\s+(?=\d+(?:\s|$))|(?<=\d)\s+", line.strip()) if part]


def _guess_columns(cells: list[str]) -> dict[str, str]:
    """Parse a row of a table without headings: a name, and a mask value or an RGB colour."""
    numbers = [n for n, cell in enumerate(cells) if cell.isascii() and cell.isdigit()]
    names = [n for n in range(len(cells)) if n not in numbers and cells[n]]
    if len(names) != 1 or cells[names[0]].startswith("#"):
        return {}
    row = {"name": cells[names[0]]}
    if len(numbers) == 3:
        return row | dict(zip("rgb", (cells[n] for n in numbers)))
    return row | {"value": cells[numbers[0]]} if len(numbers) == 1 else {}


def class_lines(root: Path, values: Values) -> list[str]:
    """Return the description's lines for `classes` and `ignore`.

    Args:
        root: Folder of the data set.
        values: Values of the masks.

    Raises:
        DataError: There are too few or too many classes.
    """
    names, table = find_names(root, values)
    ignored = _ignored_values(values, names)
    by_name: dict[str, list[int]] = defaultdict(list)
    unnamed = False
    for value in sorted(values.pixels.keys() - {*ignored, *values.edges}):
        of = values.same.get(value, value)
        text = values.label(of).strip("[]").replace(", ", "_")
        unnamed |= of not in names
        by_name[names.get(of) or f"class_{text}"].append(value)
    if not 2 <= len(by_name) <= MOST_CLASSES:
        raise DataError(
            f"{root}: a description needs 2 to {MOST_CLASSES} classes, but the masks have "
            f"{len(by_name)}; merge or add classes, or check whether the values are object IDs"
        )

    lines = [*values.notes]
    if table:
        lines.append(f"# The names come from {table}.")
        absent = sorted({n for v, n in names.items() if v not in values.pixels} - by_name.keys())
        if absent:
            lines.append(f"# No mask has {list_some(absent)}.")
    if unnamed:
        lines.append("# To do: replace names such as class_1.")
    lines.append("classes:")
    for name, found in by_name.items():
        labels = ", ".join(map(values.label, found))
        lines.append(f"  {quoted_name(name)}: {{labels: [{labels}]}} # {values.share(found)}")
    if values.edges:
        files = {path for paths in values.edges.values() for path in paths}
        shown = [Path(path).relative_to(root).as_posix() for path in sorted(files)]
        lines += [
            f"# A guess: {len(values.edges)} values are suspected edges, blurred when the mask was",
            f"# scaled or smoothed. They have {values.share(values.edges)}, in {len(files)} files: "
            f"{list_some(shown)}.",
        ]
    labels = ", ".join(map(values.label, [*ignored, *values.edges]))
    guesses = ", ".join(f"{values.label(v)} has {values.share([v])}" for v in ignored)
    note = f" # A guess: {guesses}" if guesses else ""
    return [*lines, f"ignore: [{labels}]{note}"]


def _ignored_values(values: Values, names: dict[int, str]) -> list[int]:
    """Return the values that probably mean "no class": rare values that are black or white.

    A name in a class table overrides this guess. If the grey levels are spread out, such as 0, 128
    and 255, the values 0 and 255 count as classes.
    """
    pixels = {v: n for v, n in values.pixels.items() if v not in values.edges}
    total = sum(pixels.values())
    by_name = [v for v in sorted(pixels) if names.get(v, "").lower() in IGNORED_NAMES]
    if values.in_colors:
        levels = {unpack(v) for v in pixels}
        is_grey = all(len(set(level)) == 1 for level in levels)
        numbers = {level[0] for level in levels} if is_grey else {1, 2}
        empty = {0, VOC_BORDER} | ({WHITE} if 0 not in pixels or is_grey else set())
    else:
        numbers, empty = set(pixels), {0, 255}
    inner = sorted(numbers - {0, 255})
    counted = 1 in numbers or any(b - a == 1 for a, b in pairwise(inner))
    rare = [v for v in sorted(pixels) if v in empty and pixels[v] < RARE * total]
    rare = [v for v in rare if v not in names]
    if not counted or values.same or len(pixels) - len(rare) - len(by_name) < 2:
        rare = []
    return sorted({*rare, *by_name}) if len(pixels) - len(by_name) >= 2 else rare


def quoted_name(name: str) -> str:
    """Quote a class name for YAML if necessary.

    Args:
        name: Name of the class.
    """
    is_plain = re.fullmatch(r"[A-Za-z][\w ]*", name) and yaml.safe_load(f"{name}: 0") == {name: 0}
    return name if is_plain else quoted(name)


def quoted(text: str) -> str:
    """Quote a string for YAML.

    Args:
        text: The string.
    """
    # Let PyYAML quote the string, because JSON's escapes for characters above U+FFFF are not valid
    # in YAML.
    return yaml.safe_dump(text, default_style='"', width=10**6, allow_unicode=True).strip()
