"""Functions that find the values in masks and decide how to interpret them."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from dataset.decoding import decode_colors, decode_mask
from dataset.description import MAX_VALUE, pack, unpack
from dataset.labels import IGNORED
from dataset.workers import chunked, map_chunks
from errors import DataError
from extras.preparation.file_names import read_error

MOST_CLASSES = IGNORED - 1
# Maximum number of distinct values across all masks.
MOST_VALUES = 4000
# Thresholds for values that come only from blurred edges. Nearly all pixels with such a value are
# on thin lines, between smaller and larger values. In addition, either the value is rare and occurs
# in few files, or all masks are blurred and many such values together cover few pixels.
EDGE_FILES, EDGE_SHARE = 0.1, 0.005
EDGE_VALUES, EDGE_SHARE_OF_MANY, EDGE_SHARE_OF_ALL = 8, 0.01, 0.1
# To save time, values that cover more than this fraction of a mask are not examined.
EDGE_SHARE_OF_FILE = 0.05
WHITE, VOC_BORDER = 0xFFFFFF, 0xC0E0E0


class FileValues(NamedTuple):
    """The values of one mask.

    Attributes:
        path: Path of the file.
        kind: `bit`, `grey`, `palette` or `color`.
        values: Three pixel counts for each value: all pixels, pixels on thin lines, and pixels on
            thin lines whose value is between those of their neighbours.
        palette: Packed colour of each palette index in use.
        error: Reason why the file cannot be read, or an empty string.
    """

    path: str
    kind: str
    values: dict[int, tuple[int, int, int]]
    palette: dict[int, int]
    error: str = ""


class Values(NamedTuple):
    """The values of all masks, and how to interpret them.

    Attributes:
        in_colors: Whether the values are packed colours.
        pixels: Number of pixels of each value.
        edges: Values that probably come from blurred edges, and the files with these values.
        colors: Palette colour of each value.
        same: For each redundant value, the value with the same meaning.
        notes: Comment lines for the description.
    """

    in_colors: bool
    pixels: dict[int, int]
    edges: dict[int, list[str]]
    colors: dict[int, int]
    same: dict[int, int]
    notes: list[str]

    def label(self, value: int) -> str:
        """Format a value as it appears in a data set's description.

        Args:
            value: A mask value or a packed colour.
        """
        return str(list(unpack(value)) if self.in_colors else value)

    def share(self, values: Iterable[int]) -> str:
        """Return a string with the percentage of pixels that have one of these values.

        Args:
            values: Mask values or packed colours.
        """
        count = sum(self.pixels[value] for value in values)
        return f"{count / sum(self.pixels.values()):.3%} of the pixels"


def read_values(paths: list[str]) -> list[FileValues]:
    """Read the values of masks.

    Args:
        paths: Paths of the masks.
    """
    return [_read_file(path) for path in paths]


def _read_file(path: str) -> FileValues:
    try:
        data = Path(path).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            mode, palette = image.mode, image.getpalette("RGB") or []
        in_colors = mode not in ("1", "L", "LA", "P", "PA") and not mode.startswith("I")
        mask = decode_colors(data) if in_colors else decode_mask(data, MAX_VALUE)
    except (ValueError, OSError) as error:
        return FileValues(path, "", {}, {}, read_error(error))
    values, counts = np.unique(mask, return_counts=True)
    if len(values) > MOST_VALUES:
        what = "colours" if in_colors else "values"
        reason = f"contains {len(values)} {what}, which are too many for labels"
        return FileValues(path, "", {}, {}, reason)
    rare = values[counts < EDGE_SHARE_OF_FILE * mask.size]
    thin = _thin_pixels(mask, in_colors, rare)
    found = {v: (n, *thin.get(v, (0, 0))) for v, n in zip(values.tolist(), counts.tolist())}
    used = {}
    if mode in ("P", "PA"):
        palette = [*palette, *[0] * (768 - len(palette))]
        used = {v: pack(*palette[3 * v : 3 * v + 3]) for v in found}
        kind = "palette"
    else:
        kind = "bit" if mode == "1" else "color" if in_colors else "grey"
    return FileValues(path, kind, found, used)


def _thin_pixels(mask: np.ndarray, in_colors: bool, rare: np.ndarray) -> dict[int, tuple[int, int]]:
    """Count the pixels of each rare value on thin lines, and how many of these look blurred.

    A pixel is on a thin line if one of its four neighbours has a different value. A pixel looks
    blurred if its value is between its neighbours' values.
    """
    if not len(rare):
        return {}
    channels = [mask]
    if in_colors:
        channels = [(mask >> shift & 255).astype(np.uint8) for shift in (0, 8, 16)]
    on_line, between = np.zeros(mask.shape, bool), np.zeros(mask.shape, bool)
    cross, square = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)), np.ones((7, 7), np.uint8)
    for channel in channels:
        # A pixel is on a line or an edge if one of its four neighbours has a different value.
        on_line |= cv2.morphologyEx(channel, cv2.MORPH_GRADIENT, cross) > 0
        # On a blurred edge, at least one channel's value is between the values of its neighbours.
        least, most = cv2.erode(channel, square), cv2.dilate(channel, square)
        between |= (least < channel) & (channel < most)
    on_line &= np.isin(mask, rare)
    lines = Counter(mask[on_line].tolist())
    both = Counter(mask[on_line & between].tolist())
    return {value: (count, both[value]) for value, count in lines.items()}


def count_values(paths: list[str], workers: int) -> Values:
    """Count the values of all masks and decide how to read them.

    Args:
        paths: Paths of the masks.
        workers: Number of processes.

    Raises:
        DataError: Masks cannot be read, differ in type, or have too many values or only one.
    """
    chunks = [(part,) for part in chunked(paths)]
    parts = map_chunks(read_values, chunks, workers, "read", " masks")
    files: list[FileValues] = [file for part in parts for file in part]
    if broken := [file for file in files if file.error]:
        raise DataError(
            f"{broken[0].path}: {broken[0].error} ({len(broken)} of {len(files)} masks cannot be "
            "read); copy or export them again"
        )
    files, in_colors, notes = _choose_reading(files)

    pixels: Counter[int] = Counter()
    where: dict[int, list[str]] = defaultdict(list)
    colors: dict[int, int] = {}
    for file in files:
        for value, (count, _, _) in file.values.items():
            pixels[value] += count
            where[value].append(file.path)
        colors.update(file.palette)
    edges = _suspect_edges(files, pixels, where)
    same = _same_values(files, in_colors)
    if same:
        notes.append(
            "# A guess: masks contain either 0 and 1 or 0 and 255, so 1 and 255 mean the same."
        )
    if len(edges) > MOST_VALUES // 4:
        raise DataError(
            f"masks such as {paths[0]} have blurred edges, which add {len(edges)} extra "
            f"{'colours' if in_colors else 'values'}; export the masks without smoothing"
        )
    return Values(
        in_colors, dict(pixels), {v: where[v] for v in sorted(edges)}, colors, same, notes
    )


def _suspect_edges(
    files: list[FileValues], pixels: Counter[int], where: dict[int, list[str]]
) -> set[int]:
    """Return the values that probably come from blurred edges."""
    on_line: Counter[int] = Counter()
    between: Counter[int] = Counter()
    for file in files:
        for value, counts in file.values.items():
            on_line[value] += counts[1]
            between[value] += counts[2]
    total, most = sum(pixels.values()), max(1, EDGE_FILES * len(files))
    share = {value: count / total for value, count in pixels.items()}
    thin = [value for value, count in pixels.items() if between[value] >= 0.9 * count]
    many = [value for value in thin if share[value] < EDGE_SHARE_OF_MANY]
    if len(many) >= EDGE_VALUES and sum(share[value] for value in many) < EDGE_SHARE_OF_ALL:
        edges = set(many)
    else:
        edges = {v for v in thin if share[v] < EDGE_SHARE and len(where[v]) <= most}
    # Blurred masks also contain other rare values on thin lines, caused by sharpening and rounding.
    blurred = {f.path for f in files if len(edges & f.values.keys()) >= EDGE_VALUES // 2}
    return edges | {
        value
        for value, count in pixels.items()
        if 2 * on_line[value] > count
        and share[value] < EDGE_SHARE
        and blurred.issuperset(where[value])
    }


def _choose_reading(files: list[FileValues]) -> tuple[list[FileValues], bool, list[str]]:
    """Decide how to read masks; return the values, whether they are colours, and comments."""
    by_kind = {file.kind: file for file in reversed(files)}
    if "color" in by_kind:
        others = [file for file in files if file.kind != "color"]
        values = {v for file in files if file.kind == "color" for v in file.values}
        if not values.issuperset(v for file in others for v in _by_color(file).values):
            kind = next(kind for kind in by_kind if kind != "color")
            what = "a palette with different colours" if kind == "palette" else "grey pixels"
            raise DataError(
                f"the mask {by_kind['color'].path} is in colours, but the mask "
                f"{by_kind[kind].path} has {what}; export all masks in the same format"
            )
        return [_by_color(file) for file in files], True, []
    first: dict[int, tuple[int, str]] = {}
    for file in files:
        for value, color in file.palette.items():
            known, path = first.setdefault(value, (color, file.path))
            if known != color:
                return _read_palettes(files, value, path, file.path, set(by_kind))
    notes = []
    if "palette" in by_kind and len(by_kind) > 1:
        grey = next(file for kind, file in by_kind.items() if kind != "palette")
        notes.append(
            f"# A guess: {by_kind['palette'].path} has a palette, but {grey.path} has none; both "
            "are read by number."
        )
    return files, False, notes


def _read_palettes(
    files: list[FileValues], value: int, first: str, second: str, kinds: set[str]
) -> tuple[list[FileValues], bool, list[str]]:
    """Read masks with different palettes by colour, unless there are too many colours.

    Raises:
        DataError: The masks have too many different colours, or some have no palette.
    """
    uses = Counter(color for file in files for color in set(file.palette.values()))
    if kinds != {"palette"} or len(uses) > 2 * len({v for f in files for v in f.values}):
        raise DataError(
            f"{first} and {second} show value {value} in different colours, so its meaning is "
            "unknown; export all masks with the same palette"
        )
    note = (
        f"# A guess: masks are read by colour, because {first} and {second} show value {value} in "
        "different colours."
    )
    return [_by_color(file) for file in files], True, [note]


def _by_color(file: FileValues) -> FileValues:
    """Replace the values of a file with the colours that an image viewer shows."""
    if file.kind == "color":
        return file
    counts: dict[int, tuple[int, int, int]] = {}
    for value, (count, on_line, _) in file.values.items():
        grey = 255 * value if file.kind == "bit" else value
        color = file.palette[value] if file.kind == "palette" else pack(grey, grey, grey)
        before = counts.get(color, (0, 0, 0))
        counts[color] = (before[0] + count, before[1] + on_line, 0)
    return file._replace(values=counts, palette={})


def _same_values(files: list[FileValues], in_colors: bool) -> dict[int, int]:
    """Return {1: 255} if some masks contain only 0 and 1, and all others only 0 and 255."""
    kinds = {frozenset(file.values) for file in files}
    both, every = {1, 255}, set().union(*kinds)
    is_mixed = both <= every <= {0, *both} and not any(both <= kind for kind in kinds)
    return {1: 255} if is_mixed and not in_colors else {}


def list_some(items: Iterable[Any]) -> str:
    """Format a list of names: the first five, and the number of remaining names.

    Args:
        items: Names to list.
    """
    items = list(items)
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(map(str, items[:5])) + more
