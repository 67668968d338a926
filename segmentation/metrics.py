"""Metrics for segmentation, computed from one confusion matrix.

    matrix = confusion_matrix(logits, target, num_classes)  # add up over batches and ranks
    mean_iou(matrix), iou_per_class(matrix), pixel_accuracy(matrix)

Logits may have any resolution. To compute a metric, the logits are upsampled to the target's size
as in `F.interpolate(mode="bilinear", align_corners=False)`. Only one band of rows of one image is
upsampled at a time, so there is never a full-size (N, C, H, W) tensor in memory. Half-precision
logits are upsampled in fp32, because in bf16 similar scores would tie and the lower class index
would win.
"""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from segmentation.classes import Classes
from segmentation.views import highest_class, resized_bands


@torch.no_grad()
def confusion_matrix(
    logits: Tensor, target: Tensor, num_classes: int, ignore_index: int = -1
) -> Tensor:
    """Count each combination of target class and predicted class over the labelled pixels.

    Args:
        logits: (N, C, h, w) of any float type, at any resolution.
        target: (N, H, W) integer class indices. Indices outside 0..C-1 are ignored, because raising
            an error would require waiting for the GPU.
        num_classes: Number of classes C.
        ignore_index: Class index of pixels without a label.

    Returns:
        (C, C) int64 counts on the logits' device. Rows are target classes, and columns are
        predicted classes.
    """
    size = (target.shape[1], target.shape[2])
    prediction = torch.stack([highest_class([(image, size)], size) for image in logits])
    return confusion_matrix_of_predictions(prediction, target, num_classes, ignore_index)


class BatchScore(NamedTuple):
    """The counts from which a batch's metrics are computed.

    Attributes:
        matrix: (C, C) int64, as returned by `confusion_matrix`.
        cross_entropy: Sum of the cross entropy over the labelled pixels, float64.
        prediction: (N, H, W) predicted class indices, int16.
    """

    matrix: Tensor
    cross_entropy: Tensor
    prediction: Tensor


@torch.no_grad()
def score_batch(logits: Tensor, target: Tensor, ignore_index: int = -1) -> BatchScore:
    """Return the counts for all metrics of a batch.

    Args:
        logits: (N, C, h, w) of any float type, at any resolution.
        target: (N, H, W) integer class indices.
        ignore_index: Class index of pixels without a label.
    """
    target, num_classes = target.long(), logits.shape[1]
    labelled = _labelled(target, num_classes, ignore_index)
    prediction = torch.empty_like(target, dtype=torch.int16)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for image in range(len(logits)):
        index = target[image].clamp(0, num_classes - 1)[..., None]
        for rows, scores in resized_bands(logits[image], (target.shape[1], target.shape[2])):
            prediction[image, rows] = scores.max(2).indices.short()
            losses = scores.logsumexp(2) - scores.gather(2, index[rows])[..., 0]
            total += torch.where(labelled[image, rows], losses, 0).sum(dtype=torch.float64)
    matrix = confusion_matrix_of_predictions(prediction, target, num_classes, ignore_index)
    return BatchScore(matrix, total, prediction)


def confusion_matrix_of_predictions(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int = -1
) -> Tensor:
    """Return the confusion matrix of predicted class indices; see `confusion_matrix` for logits.

    Args:
        prediction: (N, H, W) integer class indices.
        target: (N, H, W) integer class indices.
        num_classes: Number of classes C.
        ignore_index: Class index of pixels without a label.
    """
    target = target.long()
    cell = target * num_classes + prediction
    # Count unlabelled pixels in an extra bin, because filtering them out would make the CPU wait
    # for the GPU.
    cell = torch.where(_labelled(target, num_classes, ignore_index), cell, num_classes**2).flatten()
    # On a GPU, bincount would copy the largest value to the CPU and wait for it.
    if cell.is_cuda:
        counts = cell.new_zeros(num_classes**2 + 1)
        counts.scatter_add_(0, cell, cell.new_ones(1).expand_as(cell))
    else:
        counts = torch.bincount(cell, minlength=num_classes**2 + 1)
    return counts[:-1].view(num_classes, num_classes)


def iou_per_class(matrix: Tensor) -> Tensor:
    """Return the intersection over union of each class, (C,) float64 in 0..1.

    The IoU is nan for a class that occurs neither in the target nor in the prediction, and 0 for a
    class that occurs only in the prediction.

    Args:
        matrix: (C, C) confusion matrix.
    """
    intersection = matrix.diagonal()
    return intersection.double() / (matrix.sum(0) + matrix.sum(1) - intersection)


def mean_iou(matrix: Tensor) -> Tensor:
    """Return the mean of `iou_per_class` over the classes that occur, in 0..1, or nan if none do.

    Args:
        matrix: (C, C) confusion matrix.
    """
    return iou_per_class(matrix).nanmean()


def accuracy_per_class(matrix: Tensor) -> Tensor:
    """Return the fraction of each class's pixels that are predicted correctly.

    Args:
        matrix: (C, C) confusion matrix.

    Returns:
        (C,) float64 in 0..1, nan for classes without pixels.
    """
    return matrix.diagonal().double() / matrix.sum(1)


def mean_accuracy(matrix: Tensor) -> Tensor:
    """Return the mean of `accuracy_per_class` over the classes in the target, 0..1.

    Args:
        matrix: (C, C) confusion matrix.
    """
    return accuracy_per_class(matrix).nanmean()


def pixel_accuracy(matrix: Tensor) -> Tensor:
    """Return the fraction of labelled pixels that are predicted correctly.

    The fraction is in 0..1, or nan if no pixel has a label.

    Args:
        matrix: (C, C) confusion matrix.
    """
    return matrix.diagonal().sum().double() / matrix.sum()


def confused_pairs(matrix: Tensor, count: int) -> list[tuple[int, int, int, float]]:
    """Return the pairs of classes that are confused most often.

    Args:
        matrix: (C, C) counts. Rows are target classes, and columns are predicted classes.
        count: Maximum number of pairs.

    Returns:
        For each pair, the target class index, the predicted class index, the number of such pixels,
        and their percentage of the target class's pixels. The pair with the most pixels comes
        first.
    """
    matrix = matrix.cpu()
    wrong = matrix - torch.diag(matrix.diagonal())
    pixels, places = wrong.flatten().topk(min(count, wrong.numel()))
    pairs = []
    for number, place in zip(pixels.tolist(), places.tolist()):
        true, predicted = divmod(place, len(matrix))
        if number > 0:
            pairs.append((true, predicted, number, 100 * number / int(matrix[true].sum())))
    return pairs


def as_percent(share: Tensor | float) -> float | None:
    """Return a fraction as a percentage, or None for nan, which JSON cannot express.

    Args:
        share: Fraction in 0..1.
    """
    percent = 100 * float(share)
    return None if math.isnan(percent) else percent


class MIoU(Metric):
    """The mean intersection over union in percent, as defined by Composer and mmsegmentation.

    Args:
        num_classes: Number of classes C.

    Attributes:
        matrix: (C, C) int64 counts of this rank since the last reset.
        total_matrix: Sum of `matrix` over all ranks at the last `compute()`, or None. Composer
            computes metrics before `Event.EVAL_END`, so at that event callbacks on any rank can
            read the matrix of the complete evaluation.
    """

    full_state_update = False
    matrix: Tensor

    def __init__(self, num_classes: int):
        super().__init__()
        self.total_matrix: Tensor | None = None
        empty = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("matrix", empty, dist_reduce_fx="sum")

    def update(self, score: BatchScore) -> None:
        """Add a batch to the counts.

        Args:
            score: Result of `score_batch` for the batch.
        """
        self.matrix += score.matrix

    def compute(self) -> Tensor:
        """Return the mean IoU over the counts of all ranks, 0..100."""
        # Copy the matrix, because torchmetrics keeps the sum over all ranks only while this method
        # runs.
        self.total_matrix = self.matrix.clone()
        return 100 * mean_iou(self.total_matrix)


class CrossEntropy(Metric):
    """The cross entropy, averaged over all labelled pixels of the data set.

    Composer's metric averages the batch means, which gives more weight to pixels in batches with
    fewer labels.
    """

    full_state_update = False
    total: Tensor
    pixels: Tensor

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pixels", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, score: BatchScore) -> None:
        """Add a batch to the sums.

        Args:
            score: Result of `score_batch` for the batch.
        """
        self.total += score.cross_entropy
        self.pixels += score.matrix.sum()

    def compute(self) -> Tensor:
        """Return the mean over the labelled pixels of all ranks, or nan if no pixel has a label."""
        return self.total / self.pixels


def _labelled(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return (target >= 0) & (target < num_classes) & (target != ignore_index)


def class_table(matrix: Tensor, classes: Classes) -> tuple[list[str], list[list[Any]]]:
    """Return a table with the IoU, the accuracy and the number of labelled pixels of each class.

    Args:
        matrix: (C, C) counts. Rows are target classes, and columns are predicted classes.
        classes: The C classes.

    Returns:
        The column names and one row per class. IoU and accuracy are in percent, or None if they are
        undefined.
    """
    matrix = matrix.cpu()
    columns = iou_per_class(matrix), accuracy_per_class(matrix), matrix.sum(1).tolist()
    rows = [
        [c.name, as_percent(iou), as_percent(accuracy), pixels]
        for c, iou, accuracy, pixels in zip(classes, *columns, strict=True)
    ]
    return ["class", "IoU", "accuracy", "pixels"], rows


def table_as_csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a table as CSV, with empty cells for None.

    Args:
        columns: Names of the columns.
        rows: Values of each row.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
