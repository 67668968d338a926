"""What the classes are called and how they are drawn: names, colours, overlays, legends, sheets.

    classes = load_classes(None, 150)                     # ADE20K's names and colours
    overlay = draw_overlay(photo, prediction, classes)    # the photo, tinted, and a legend

Photos are (H, W, 3) uint8 RGB arrays; masks and predictions are (H, W) integer arrays of class
indices. An index below 0 or beyond the last class (255, say) is a pixel without a label.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

ADE20K_CSV = Path(__file__).with_name("ade20k_classes.csv")
WRONG = (230, 25, 75)
PAPER, INK, FAINT = (255, 255, 255), (30, 30, 30), (110, 110, 110)


class ClassError(ValueError):
    """Class names that cannot be read or do not number what the model predicts."""


class ClassInfo(NamedTuple):
    """One class: its name and its RGB colour."""

    name: str
    color: tuple[int, int, int]


UNLABELLED = ClassInfo("not labelled", (0, 0, 0))


def load_classes(source: str | Sequence[str] | None, num_classes: int) -> list[ClassInfo]:
    """The names and colours of the classes a model predicts.

    Args:
        source: A text file with a name a line; a CSV with the columns ``name`` or
            ``name,red,green,blue`` (with that header line or none); a list of names; or ``None``:
            ADE20K's 150 classes, the same after an ``other`` where there are 151, and plain numbers
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
        rows = [row for row in csv.reader(path.read_text(encoding="utf-8").splitlines()) if row]
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
    """``count`` colours, each as far as can be from those before it, and from black, white and red.

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
    """The classes as exported files carry them: ``[{"name": ..., "color": [r, g, b]}, ...]``."""
    return json.dumps([{"name": c.name, "color": list(c.color)} for c in classes])


def classes_from_json(text: str) -> list[ClassInfo]:
    """What :func:`classes_to_json` wrote.

    Raises:
        ClassError: The text is not of that form.
    """
    try:
        return [ClassInfo(str(c["name"]), tuple(map(int, c["color"]))) for c in json.loads(text)]
    except (ValueError, TypeError, KeyError) as error:
        raise ClassError(f"class names in the file's metadata are malformed: {error}") from error


def colorize(mask: np.ndarray, classes: Sequence[ClassInfo]) -> np.ndarray:
    """Class indices (H, W) as an RGB picture (H, W, 3); pixels without a label are black."""
    palette = np.array([c.color for c in classes] + [UNLABELLED.color], np.uint8)
    return palette[_indices(mask, len(classes))]


def _indices(mask: np.ndarray, num_classes: int) -> np.ndarray:
    """Class indices with ``num_classes`` for every pixel without a label."""
    mask = mask.astype(np.int64)
    return np.where((mask < 0) | (mask >= num_classes), num_classes, mask)


def tint(
    photo: np.ndarray, mask: np.ndarray, classes: Sequence[ClassInfo], alpha: float = 0.6
) -> np.ndarray:
    """The photo under the colours of its classes, with an outline where one class meets another."""
    labelled = (_indices(mask, len(classes)) < len(classes))[..., None]
    blend = np.where(labelled, photo * (1 - alpha) + colorize(mask, classes) * alpha, photo)
    edge = np.zeros(mask.shape, np.uint8)
    edge[1:] |= mask[1:] != mask[:-1]
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    width = max(mask.shape) // 1000 + 1
    edge = cv2.dilate(edge, np.ones((width, width), np.uint8))
    return np.where(edge[..., None] > 0, 255, blend).astype(np.uint8)


def draw_overlay(
    photo: np.ndarray, prediction: np.ndarray, classes: Sequence[ClassInfo]
) -> Image.Image:
    """The photo under the colours of its classes, large regions named, with a legend beside it.

    A photo whose longer side is under 320 pixels is enlarged by a whole factor, so that there is
    something to see beside a legend that can be read.
    """
    factor = max(1, 320 // max(photo.shape[:2]))
    photo = photo.repeat(factor, 0).repeat(factor, 1)
    prediction = prediction.repeat(factor, 0).repeat(factor, 1)
    picture = Image.fromarray(tint(photo, prediction, classes))
    _name_regions(picture, prediction, classes)
    return beside(picture, draw_legend([prediction], classes, photo.shape[0]))


def _name_regions(picture: Image.Image, mask: np.ndarray, classes: Sequence[ClassInfo]) -> None:
    """Write each class's name where there is room for it: some of ADE20K's colours are close."""
    draw, font = ImageDraw.Draw(picture), _font(_font_size(picture.height) * 0.9)
    scale = max(1, max(mask.shape) // 512)  # the place need not be found to the pixel
    small = mask[::scale, ::scale]
    for index in np.unique(small):
        if not 0 <= index < len(classes):
            continue
        inside = np.pad((small == index).astype(np.uint8), 1)
        distance = cv2.distanceTransform(inside, cv2.DIST_L2, 3)[1:-1, 1:-1]
        y, x = np.unravel_index(distance.argmax(), distance.shape)
        name, room = classes[index].name, 2 * distance[y, x] * scale
        left, top, right, bottom = font.getbbox(name)
        if (right - left) ** 2 + (bottom - top) ** 2 < room**2:
            stroke = max(1, font.size // 12)
            at = (x * scale, y * scale)
            draw.text(at, name, PAPER, font, "mm", stroke_width=stroke, stroke_fill=INK)


def beside(picture: Image.Image, legend: Image.Image) -> Image.Image:
    """A picture with a legend to its right, on a page as high as the higher of the two."""
    size = (picture.width + legend.width, max(picture.height, legend.height))
    page = Image.new("RGB", size, PAPER)
    page.paste(picture, (0, 0))
    page.paste(legend, (picture.width, 0))
    return page


def _font(size: float) -> ImageFont.FreeTypeFont:
    """Pillow's own font: it is the same, and there, on every machine."""
    return ImageFont.load_default(max(size, 11))


def _font_size(height: int) -> float:
    """Pixels that text beside a picture of this height is high."""
    return min(max(height / 32, 13), 64)


def draw_legend(
    masks: Sequence[np.ndarray],
    classes: Sequence[ClassInfo],
    height: int,
    notes: Sequence[tuple[str, str, tuple[int, int, int] | None]] = (),
) -> Image.Image:
    """Name and share of every class in ``masks``, largest first, in a panel made to measure.

    Classes under 0.1% of the pixels share one line. The panel is ``height`` pixels high; where
    three columns of that height do not hold all classes it is higher, and no text is ever cut.

    Args:
        masks: (H, W) class indices each.
        classes: One entry a class index.
        height: Pixels the panel is high, at least.
        notes: More entries at the end: text, text to its right, and colour.
    """
    counts = sum(
        np.bincount(_indices(m, len(classes)).ravel(), minlength=len(classes) + 1) for m in masks
    )
    share = counts / counts.sum()
    order = [int(i) for i in np.argsort(-share, kind="stable") if share[i] > 0]
    large = [i for i in order if share[i] >= 0.001]
    named = [*classes, UNLABELLED]
    entries = [(named[i].name, f"{share[i]:.1%}", named[i].color) for i in large]
    if len(order) > len(large):
        entries.append((f"{len(order) - len(large)} more", "< 0.1% each", None))
    return _draw_entries([*entries, *notes], height)


def _draw_entries(
    entries: list[tuple[str, str, tuple[int, int, int] | None]], height: int
) -> Image.Image:
    """A panel of (text, grey text, colour) lines in up to three columns, as wide as its text."""
    font = _font(_font_size(height))
    line = round(font.size * 1.5)
    rows = max(height // line - 1, -(-len(entries) // 3))
    columns = [entries[i : i + rows] for i in range(0, len(entries), rows)]
    widths = [
        line * 2.5 + sum(max(font.getlength(entry[i]) for entry in column) for i in (0, 1))
        for column in columns
    ]
    size = (round(sum(widths)), max(height, (len(columns[0]) + 1) * line))
    panel = Image.new("RGB", size, PAPER)
    draw, left = ImageDraw.Draw(panel), 0.0
    for column, width in zip(columns, widths):
        for row, (text, note, color) in enumerate(column):
            top = line * (row + 0.5)
            if color is not None:
                box = (left + line * 0.5, top + line * 0.14, left + line * 1.22, top + line * 0.86)
                draw.rectangle(box, color, INK)
            draw.text((left + line * 1.5, top + line / 2), text, INK, font, "lm")
            draw.text((left + width - line * 0.25, top + line / 2), note, FAINT, font, "rm")
        left += width
    return panel


def draw_sheet(
    photos: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    classes: Sequence[ClassInfo],
    height: int = 240,
) -> Image.Image:
    """A row a photo: the photo, its mask, the prediction, and where the two differ; with a legend.

    Args:
        photos: (H, W, 3) uint8 each.
        targets: (H, W) class indices each, negative where there is no label.
        predictions: (H, W) class indices each.
        classes: One entry a class index.
        height: Pixels a row is high.
    """
    rows = [
        _sheet_row(photo, target, prediction, classes, height)
        for photo, target, prediction in zip(photos, targets, predictions, strict=True)
    ]
    size = (max(row.width for row in rows), sum(row.height for row in rows))
    page, top = Image.new("RGB", size, PAPER), 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    notes = [("differs", "", WRONG)]
    return beside(page, draw_legend([*targets, *predictions], classes, min(top, 480), notes))


def _sheet_row(
    photo: np.ndarray,
    target: np.ndarray,
    prediction: np.ndarray,
    classes: Sequence[ClassInfo],
    height: int,
) -> Image.Image:
    labelled = _indices(target, len(classes)) < len(classes)
    wrong = labelled & (target != prediction)
    grey = photo.mean(2, keepdims=True) * 0.45 + 90
    difference = np.where(wrong[..., None], WRONG, grey * labelled[..., None]).astype(np.uint8)
    right = 1 - wrong.sum() / max(labelled.sum(), 1)
    panels = {
        "photo": photo,
        "mask": colorize(target, classes),
        "prediction": colorize(prediction, classes),
        f"difference ({right:.1%} right)": difference,
    }
    font, gap, title_height = _font(14), 6, 22
    width = max(round(photo.shape[1] * height / photo.shape[0]), 160)
    row = Image.new("RGB", (4 * (width + gap), height + title_height), PAPER)
    for i, (title, panel) in enumerate(panels.items()):
        left = i * (width + gap)
        smooth = Image.Resampling.BILINEAR if title == "photo" else Image.Resampling.NEAREST
        row.paste(Image.fromarray(panel).resize((width, height), smooth), (left, title_height))
        ImageDraw.Draw(row).text((left + 2, title_height / 2), title, INK, font, "lm")
    return row
