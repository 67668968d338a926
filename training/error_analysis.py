"""Scores of individual images, and pictures of the images with the lowest scores."""

from __future__ import annotations

import csv
import heapq
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from composer.utils import dist
from PIL import Image, ImageDraw
from torch import Tensor

from files import write_image
from segmentation.classes import PAPER, ClassInfo
from segmentation.drawing import INK, prediction_sheet, text_length, write_text
from segmentation.metrics import as_percent, confused_pairs, mean_iou, pixel_accuracy

COLUMNS = ("image", "mIoU", "pixel accuracy", "pixels", "class", "predicted as", "share of class")


class ImageScore(NamedTuple):
    """The scores of one image.

    Attributes:
        index: Index of the image in the data set.
        name: File name of the image.
        miou: Mean IoU over the classes that occur, in percent, or None if no pixel has a label.
        accuracy: Percentage of labelled pixels that are predicted correctly, or None.
        pixels: Number of labelled pixels.
        confusion: Most frequently confused pair of classes, from `confused_pairs`, or None.
    """

    index: int
    name: str
    miou: float | None
    accuracy: float | None
    pixels: int
    confusion: tuple[int, int, int, float] | None


class ErrorAnalysis:
    """A collection of the scores of one rank's images, with copies of the lowest-scoring images.

    Args:
        classes: Names and colours of the classes.
        name: Function that maps the index of an image to its file name.
        keep: Number of lowest-scoring images to draw.
    """

    def __init__(
        self, classes: Sequence[ClassInfo], name: Callable[[int], str], keep: int = 0
    ) -> None:
        self.classes, self.name, self.keep = classes, name, keep
        self.scores: list[ImageScore] = []
        self._worst: list[tuple[float, int, tuple[np.ndarray, np.ndarray, np.ndarray]]] = []

    def add(
        self,
        index: int,
        image: Callable[[], np.ndarray],
        target: Tensor,
        prediction: Tensor,
        counts: Tensor,
    ) -> None:
        """Score an image, and keep it for drawing if its score is among the lowest.

        Args:
            index: Index of the image in the data set.
            image: Function that returns the image, (H, W, 3) uint8. The function is called only if
                the image is kept.
            target: (H, W) class indices, -1 for pixels without a label.
            prediction: (H, W) predicted class indices.
            counts: (C, C) confusion matrix of the image.
        """
        matrix = counts.cpu()
        pairs = confused_pairs(matrix, 1)
        score = ImageScore(
            index,
            self.name(index),
            as_percent(mean_iou(matrix)),
            as_percent(pixel_accuracy(matrix)),
            int(matrix.sum()),
            pairs[0] if pairs else None,
        )
        self.scores.append(score)
        if not self.keep or score.miou is None:
            return
        key = (-score.miou, -index)
        is_full = len(self._worst) == self.keep
        # Skip an image that scores higher than every image in the full heap.
        if is_full and key < self._worst[0][:2]:
            return
        arrays = (image(), target.cpu().numpy().astype(np.int16), prediction.cpu().numpy())
        if is_full:
            heapq.heapreplace(self._worst, (*key, arrays))
        else:
            heapq.heappush(self._worst, (*key, arrays))

    def gather(self) -> list[ImageScore]:
        """Return the scores of all ranks' images, in data set order."""
        parts = dist.all_gather_object(self.scores)
        return sorted((score for part in parts for score in part), key=lambda score: score.index)

    def pictures(
        self, scores: Sequence[ImageScore], height: int
    ) -> Iterator[tuple[int, ImageScore, Image.Image]]:
        """Draw this rank's share of the lowest-scoring images of the run, with their predictions.

        Args:
            scores: Scores of all ranks, as returned by `gather`.
            height: Height of a picture in pixels.

        Yields:
            The position of an image, from 1 for the lowest score; its score; and the picture.
        """
        scored = [score for score in scores if score.miou is not None]
        worst = sorted(scored, key=lambda score: (score.miou, score.index))[: self.keep]
        places = {score.index: (place, score) for place, score in enumerate(worst, 1)}
        for _, index, (image, target, prediction) in self._worst:
            if -index in places:
                sheet = prediction_sheet([image], [target], [prediction], self.classes, height)
                yield *places[-index], sheet

    def draw(self, scores: Sequence[ImageScore], folder: Path) -> None:
        """Write this rank's pictures; `01_NAME.jpg` is the lowest-scoring image across all ranks.

        Args:
            scores: Scores of all ranks, as returned by `gather`.
            folder: Folder to write the pictures to.

        Raises:
            OutputError: The disk is full.
        """
        for place, score, sheet in self.pictures(scores, height=360):
            write_image(folder / f"{place:02}_{Path(score.name).stem}.jpg", sheet, quality=92)


def image_name(dataset: Any, index: int) -> str:
    """Return the file name of an image; if the image is in a shard, read the shard.

    Args:
        dataset: Data set that `data.open_dataset` returns.
        index: Index of the image.
    """
    samples = getattr(dataset, "samples", None)
    return dataset.read(index)[3][0] if samples is None else samples[index].image_path


def scores_as_csv(scores: Sequence[ImageScore], classes: Sequence[ClassInfo]) -> str:
    """Return the scores as CSV, one row per image.

    The last three columns describe the image's most frequently confused pair of classes.

    Args:
        scores: Scores of the images, in row order.
        classes: Names and colours of the classes.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for score in scores:
        numbers = ["" if n is None else f"{n:.4f}" for n in (score.miou, score.accuracy)]
        pair = ["", "", ""]
        if score.confusion is not None:
            true, predicted, _, share = score.confusion
            pair = [classes[true].name, classes[predicted].name, f"{share:.4f}"]
        writer.writerow([score.name, *numbers, score.pixels, *pair])
    return text.getvalue()


def draw_confusion(matrix: np.ndarray, classes: Sequence[ClassInfo]) -> Image.Image:
    """Draw a confusion matrix, with a row per target class and a column per predicted class.

    The darker a cell, the larger its share of the row's pixels. Class names are drawn to the left
    of the matrix.

    Args:
        matrix: (C, C) pixel counts.
        classes: Name and colour of each class, in the order of the indices.
    """
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    cell = max(16, min(48, 960 // len(classes)))
    size = min(cell * 0.7, 18)
    left = round(max(text_length(info.name, size) for info in classes) + 2.5 * cell)
    side = cell * len(classes)
    page = Image.new("RGB", (left + side + cell // 2, side + cell), PAPER)
    # Use a white-to-blue colour map on a square-root scale, so that small shares stay visible.
    depth = np.sqrt(share)[..., None]
    colors = (1 - depth) * 255 + depth * np.array([8, 48, 107])
    cells = Image.fromarray(colors.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
    page.paste(cells, (left, cell // 2))
    draw = ImageDraw.Draw(page)
    draw.rectangle((left - 1, cell // 2 - 1, left + side, cell // 2 + side), outline=INK)
    for row, info in enumerate(classes):
        middle = cell // 2 + cell * (row + 0.5)
        box = (left - 1.4 * cell, middle - 0.35 * cell, left - 0.6 * cell, middle + 0.35 * cell)
        draw.rectangle(box, info.color, INK)
        write_text(page, (left - 1.8 * cell, middle), info.name, size, INK, "rm")
        if cell >= 32:  # Smaller cells have no room for numbers.
            for column in np.flatnonzero(share[row] >= 0.005):
                color = PAPER if share[row, column] > 0.3 else INK
                at = (left + cell * (column + 0.5), middle)
                write_text(page, at, f"{100 * share[row, column]:.0f}", 11, color, "mm")
    return page
