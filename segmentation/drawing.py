"""Drawings of segmentations: tinted images, overlays with a legend, and sheets of predictions.

    overlay = draw_overlay(image, prediction, classes)    # the tinted image, beside a legend

Images are (H, W, 3) uint8 RGB arrays. Masks and predictions are (H, W) integer arrays of class
indices. An index below 0 or above the last class, such as 255, marks a pixel without a label.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import cast

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segmentation.classes import PAPER, WRONG, Classes, ClassInfo

INK, FAINT = (30, 30, 30), (110, 110, 110)
UNLABELLED = ClassInfo("not labelled", (0, 0, 0))
# A legend entry: its text, the grey text to its right, and its colour.
Entry = tuple[str, str, tuple[int, int, int] | None]


def colorize(mask: np.ndarray, classes: Classes) -> np.ndarray:
    """Draw class indices as an RGB picture (H, W, 3), with black for pixels without a label.

    Args:
        mask: (H, W) class indices.
        classes: One entry per class index.
    """
    palette = np.array([c.color for c in classes] + [UNLABELLED.color], np.uint8)
    # `take` is four times as fast as indexing with palette[...].
    return palette.take(_indices(mask, len(classes)), axis=0)


def _indices(mask: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the class indices, with every pixel without a label set to `num_classes`."""
    # Return 8-bit masks early, because the conversion to int64 below is slow.
    if mask.dtype == np.uint8:
        return mask if num_classes > 255 else np.minimum(mask, num_classes)
    mask = mask.astype(np.int64)
    return np.where((mask < 0) | (mask >= num_classes), num_classes, mask)


def tint(image: np.ndarray, mask: np.ndarray, classes: Classes, alpha: float = 0.6) -> np.ndarray:
    """Draw the classes' colours over an image, with outlines between regions.

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) class indices.
        classes: One entry per class index.
        alpha: Opacity of the colours, 0 to 1.
    """
    blend = cv2.addWeighted(image, 1 - alpha, colorize(mask, classes), alpha, 0)
    unlabelled = _indices(mask, len(classes)) == len(classes)
    if unlabelled.any():
        blend[unlabelled] = image[unlabelled]
    edge = np.zeros(mask.shape, np.uint8)
    edge[1:] |= mask[1:] != mask[:-1]
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    width = max(mask.shape) // 1000 + 1
    outline = cv2.dilate(edge * np.uint8(255), np.ones((width, width), np.uint8))
    return cv2.max(blend, cv2.cvtColor(outline, cv2.COLOR_GRAY2RGB))


def draw_overlay(image: np.ndarray, prediction: np.ndarray, classes: Classes) -> Image.Image:
    """Draw a tinted image with class names on its large regions, next to a legend.

    If the image's longer side is under 320 pixels, the image is enlarged by an integer factor,
    because the legend's text has a minimum size.

    Args:
        image: (H, W, 3) uint8.
        prediction: (H, W) class indices.
        classes: One entry per class index.
    """
    factor = max(1, 320 // max(image.shape[:2]))
    image, prediction = _enlarge(image, factor), _enlarge(prediction, factor)
    picture = Image.fromarray(tint(image, prediction, classes))
    _name_regions(picture, prediction, classes)
    return beside(picture, draw_legend([prediction], classes, image.shape[0]))


def _enlarge(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Enlarge an image or a mask by an integer factor."""
    # Do not call `repeat` for a factor of 1: it would copy the pixels, which takes 5 ms for a 683 x
    # 512 image.
    return pixels if factor == 1 else pixels.repeat(factor, 0).repeat(factor, 1)


class VideoOverlay:
    """A renderer for video frames that keeps each class's colour and legend position.

    Args:
        classes: One entry per class index.
        height: Height of a frame in pixels.
        width: Width of a frame in pixels.
    """

    def __init__(self, classes: Classes, height: int, width: int) -> None:
        self.classes = classes
        self._factor = max(1, 320 // max(height, width))
        self._size = (width * self._factor, height * self._factor)
        font = _font(_font_size(self._size[1]))
        line = round(font.size * 1.5)
        self._rows = max(self._size[1] // line - 1, 1)
        self._legend_width = round(max(font.getlength(c.name) for c in classes) + 2.5 * line)
        self._seen: list[int] = []
        self._legend = Image.new("RGB", (0, 0))

    def __call__(self, image: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """Return the frame with its classes and a legend, (H, W, 3) uint8 with even sides.

        Args:
            image: (H, W, 3) uint8 frame.
            prediction: (H, W) class indices.
        """
        image, prediction = _enlarge(image, self._factor), _enlarge(prediction, self._factor)
        shares = _shares([prediction], len(self.classes))
        large = [i for i, share in shares if share >= 0.001 and i < len(self.classes)]
        if new := [i for i in large if i not in self._seen]:
            self._seen += new
            self._legend = self._draw_legend()
        width, height = self._size[0] + self._legend_width, self._size[1]
        page = Image.new("RGB", (width + width % 2, height + height % 2), PAPER)
        page.paste(Image.fromarray(tint(image, prediction, self.classes)), (0, 0))
        page.paste(self._legend, (self._size[0], 0))
        return np.asarray(page)

    def _draw_legend(self) -> Image.Image:
        """Draw the names of the classes seen so far, and the number of names that do not fit."""
        shown = self._seen
        if len(shown) > self._rows:
            shown = shown[: self._rows - 1]
        entries: list[Entry] = [(self.classes[i].name, "", self.classes[i].color) for i in shown]
        if len(shown) < len(self._seen):
            entries.append((f"{len(self._seen) - len(shown)} more", "", None))
        return _draw_entries(entries, self._size[1])


def _name_regions(picture: Image.Image, mask: np.ndarray, classes: Classes) -> None:
    """Write each class's name on a region that has enough room for it.

    The names help, because some of ADE20K's colours are hard to tell apart.
    """
    size = _font_size(picture.height) * 0.9
    # The position of a name need not be exact, so search a smaller copy of the mask.
    scale = max(1, max(mask.shape) // 160)
    small = mask[::scale, ::scale]
    for index, area in zip(*np.unique(small, return_counts=True)):
        if not 0 <= index < len(classes):
            continue
        name = classes[index].name
        left, top, right, bottom = _font(size).getbbox(name)
        diagonal = math.hypot(right - left, bottom - top)
        # A name fits only in a region that contains a circle around the text. The circle's area is
        # 0.78 times the squared diagonal of the text, so skip regions that are clearly smaller.
        if area * scale**2 < 0.5 * diagonal**2:
            continue
        inside = np.pad((small == index).astype(np.uint8), 1)
        distance = cv2.distanceTransform(inside, cv2.DIST_L2, 3)[1:-1, 1:-1]
        y, x = np.unravel_index(distance.argmax(), distance.shape)
        if diagonal < 2 * distance[y, x] * scale:
            at = (int(x) * scale, int(y) * scale)
            stroke = max(1, _font(size).size // 12)
            write_text(picture, at, name, size, INK, "mm", stroke)
            write_text(picture, at, name, size, PAPER, "mm")


def beside(picture: Image.Image, legend: Image.Image) -> Image.Image:
    """Place a legend to the right of a picture; the result is as high as the taller of the two.

    Args:
        picture: Picture on the left.
        legend: Legend on the right.
    """
    size = (picture.width + legend.width, max(picture.height, legend.height))
    page = Image.new("RGB", size, PAPER)
    page.paste(picture, (0, 0))
    page.paste(legend, (picture.width, 0))
    return page


def write_text(
    picture: Image.Image,
    at: tuple[float, float],
    text: str,
    size: float,
    color: tuple[int, int, int],
    anchor: str,
    stroke: float = 0,
) -> None:
    """Draw text on a picture, like `ImageDraw.text`, and cache the rendered text for reuse."""
    mask, left, top = _shape(text, size, anchor, stroke)
    picture.paste(color, (round(at[0]) + left, round(at[1]) + top), mask)


@functools.lru_cache(4096)
def _shape(text: str, size: float, anchor: str, stroke: float) -> tuple[Image.Image, int, int]:
    """Render a text; return each pixel's opacity, and the text's offset from its anchor."""
    font = _font(size)
    left, top, right, bottom = font.getbbox(text, anchor=anchor, stroke_width=stroke)
    left, top = math.floor(left), math.floor(top)
    mask = Image.new("L", (max(math.ceil(right) - left, 1), max(math.ceil(bottom) - top, 1)))
    ImageDraw.Draw(mask).text((-left, -top), text, 255, font, anchor, stroke_width=stroke)
    return mask, left, top


@functools.lru_cache(4096)
def text_length(text: str, size: float) -> float:
    """Return the width of a line of text in pixels.

    Args:
        text: Text without line breaks.
        size: Size of the font in pixels.
    """
    return _font(size).getlength(text)


@functools.lru_cache(64)
def _font(size: float) -> ImageFont.FreeTypeFont:
    """Return Pillow's built-in font, which is the same on every machine."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(max(size, 11)))


def _font_size(height: int) -> float:
    """Return the font size in pixels for text next to a picture of this height."""
    return min(max(height / 32, 13), 64)


def draw_legend(
    masks: Sequence[np.ndarray], classes: Classes, height: int, notes: Sequence[Entry] = ()
) -> Image.Image:
    """Draw a panel with the name and the share of every class in the masks, largest share first.

    All classes with less than 0.1% of the pixels are combined on one line. If the classes do not
    fit in three columns, the panel becomes taller than `height`. Text is never cut off.

    Args:
        masks: (H, W) class indices of each mask.
        classes: One entry per class index.
        height: Minimum height of the panel in pixels.
        notes: Additional entries at the end of the legend.
    """
    shares, named = _shares(masks, len(classes)), [*classes, UNLABELLED]
    entries: list[Entry] = [
        (named[i].name, f"{share:.1%}", named[i].color) for i, share in shares if share >= 0.001
    ]
    if len(shares) > len(entries):
        entries.append((f"{len(shares) - len(entries)} more", "< 0.1% each", None))
    return _draw_entries([*entries, *notes], height)


def _shares(masks: Sequence[np.ndarray], num_classes: int) -> list[tuple[int, float]]:
    """Return each class index in the masks and its share of the pixels, largest share first.

    The index `num_classes` stands for the pixels without a label.
    """
    counts = np.zeros(num_classes + 1, np.int64)
    for mask in masks:
        counts += np.bincount(_indices(mask, num_classes).ravel(), minlength=len(counts))
    share = counts / counts.sum()
    return [(int(i), share[i]) for i in np.argsort(-share, kind="stable") if share[i] > 0]


def _draw_entries(entries: Sequence[Entry], height: int) -> Image.Image:
    """Draw entries (text, grey text, colour) in up to three columns, each as wide as its text."""
    size = _font_size(height)
    line = round(_font(size).size * 1.5)
    rows = max(height // line - 1, -(-len(entries) // 3))
    columns = [entries[i : i + rows] for i in range(0, len(entries), rows)]
    widths = [
        line * 2.5
        + max(text_length(text, size) for text, _, _ in column)
        + max(text_length(note, size) for _, note, _ in column)
        for column in columns
    ]
    shape = (round(sum(widths)), max(height, (len(columns[0]) + 1) * line))
    panel = Image.new("RGB", shape, PAPER)
    draw, left = ImageDraw.Draw(panel), 0.0
    for column, width in zip(columns, widths):
        for row, (text, note, color) in enumerate(column):
            top = line * (row + 0.5)
            if color is not None:
                box = (left + line * 0.5, top + line * 0.14, left + line * 1.22, top + line * 0.86)
                draw.rectangle(box, color, INK)
            middle = top + line / 2
            write_text(panel, (left + line * 1.5, middle), text, size, INK, "lm")
            write_text(panel, (left + width - line * 0.25, middle), note, size, FAINT, "rm")
        left += width
    return panel


def prediction_sheet(
    images: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    classes: Classes,
    height: int = 240,
) -> Image.Image:
    """Draw one row per image: the image, its mask, its prediction, and their difference.

    Args:
        images: (H, W, 3) uint8 images.
        targets: (H, W) class indices of each mask, negative for pixels without a label.
        predictions: (H, W) class indices of each prediction.
        classes: One entry per class index.
        height: Height of a row in pixels.
    """
    rows = [
        _sheet_row(image, target, prediction, classes, height)
        for image, target, prediction in zip(images, targets, predictions, strict=True)
    ]
    size = (max(row.width for row in rows), sum(row.height for row in rows))
    page, top = Image.new("RGB", size, PAPER), 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    notes = [("differs", "", WRONG)]
    return beside(page, draw_legend([*targets, *predictions], classes, min(top, 480), notes))


def _sheet_row(
    image: np.ndarray, target: np.ndarray, prediction: np.ndarray, classes: Classes, height: int
) -> Image.Image:
    """Draw one image's row of the sheet."""
    labelled = _indices(target, len(classes)) < len(classes)
    wrong = labelled & (target != prediction)
    grey = image.mean(2, keepdims=True) * 0.45 + 90
    difference = np.where(wrong[..., None], WRONG, grey * labelled[..., None]).astype(np.uint8)
    right = 1 - wrong.sum() / max(labelled.sum(), 1)
    panels = {
        "image": image,
        "mask": colorize(target, classes),
        "prediction": colorize(prediction, classes),
        f"difference ({right:.1%} right)": difference,
    }
    font, gap, title_height = _font(14), 6, 22
    width = max(round(image.shape[1] * height / image.shape[0]), 160)
    row = Image.new("RGB", (4 * (width + gap), height + title_height), PAPER)
    for i, (title, panel) in enumerate(panels.items()):
        left = i * (width + gap)
        smooth = Image.Resampling.BILINEAR if title == "image" else Image.Resampling.NEAREST
        row.paste(Image.fromarray(panel).resize((width, height), smooth), (left, title_height))
        ImageDraw.Draw(row).text((left + 2, title_height / 2), title, INK, font, "lm")
    return row


def sample_sheet(images: np.ndarray, targets: np.ndarray, classes: Classes) -> Image.Image:
    """Draw up to six images in two columns, each next to its mask overlay and legend.

    Args:
        images: (N, H, W, 3) uint8 images.
        targets: (N, H, W) class indices.
        classes: One entry per class index.
    """
    cells = [
        beside(Image.fromarray(image), draw_overlay(image, target, classes))
        for image, target in list(zip(images, targets))[:6]
    ]
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    sheet = Image.new("RGB", (2 * width, (len(cells) + 1) // 2 * height), PAPER)
    for number, cell in enumerate(cells):
        sheet.paste(cell, (number % 2 * width, number // 2 * height))
    return sheet
