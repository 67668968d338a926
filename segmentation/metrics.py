"""What a segmentation is judged by, read off one confusion matrix.

    matrix = confusion_matrix(logits, target, num_classes)  # add up over batches and ranks
    mean_iou(matrix), iou_per_class(matrix), pixel_accuracy(matrix)

Logits may have any resolution: they are brought to the target's size in here, as by
`F.interpolate(mode="bilinear", align_corners=False)`, a few classes of one image at a time, so that
the (N, C, H, W) tensor at full size never exists. Half-precision logits are upsampled in fp32:
interpolated in bf16, neighbouring classes tie and the lower index wins.
"""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from segmentation.classes import ClassInfo

# Upsampled fp32 logits held at once. A CPU keeps 16 classes of a 512 x 512 image in its cache; a
# GPU, where each slab costs some ten launches, takes 128.
_SLAB_BYTES = {"cpu": 2**24, "cuda": 2**27}


@torch.no_grad()
def confusion_matrix(
    logits: Tensor, target: Tensor, num_classes: int, ignore_index: int = -1
) -> Tensor:
    """Count which class each labelled pixel was given.

    Args:
        logits: (N, C, h, w), any float type, at any resolution.
        target: (N, H, W) integer class indices. `ignore_index` is not counted, nor is anything
            outside 0..C-1 (to raise for it, a GPU would have to be waited for).
        num_classes: C.
        ignore_index: The target of pixels without a label.

    Returns:
        (C, C) int64 on the logits' device; row = class in the target, column = predicted class.
    """
    pairs = zip(logits, target, strict=True)
    prediction = torch.stack([_scan(*pair, with_cross_entropy=False)[0] for pair in pairs])
    return confusion_matrix_of_predictions(prediction, target, num_classes, ignore_index)


class BatchScore(NamedTuple):
    """What an evaluation counts of a batch.

    Attributes:
        matrix: (C, C) int64, as of `confusion_matrix`.
        cross_entropy: Its sum over the labelled pixels, float64.
        pixels: The number of these, int64.
    """

    matrix: Tensor
    cross_entropy: Tensor
    pixels: Tensor


@torch.no_grad()
def score_batch(
    logits: Tensor, target: Tensor, num_classes: int, ignore_index: int = -1
) -> BatchScore:
    """Count a batch for all metrics at once; arguments as of `confusion_matrix`."""
    predictions = []
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    pixels = torch.zeros((), dtype=torch.int64, device=logits.device)
    for image_logits, image_target in zip(logits, target.long(), strict=True):
        labelled = _labelled(image_target, len(image_logits), ignore_index)
        prediction, cross_entropy = _scan(image_logits, image_target)
        assert cross_entropy is not None
        total += torch.where(labelled, cross_entropy, 0).sum(dtype=torch.float64)
        pixels += labelled.sum()
        predictions.append(prediction)
    prediction = torch.stack(predictions)
    matrix = confusion_matrix_of_predictions(prediction, target, num_classes, ignore_index)
    return BatchScore(matrix, total, pixels)


def confusion_matrix_of_predictions(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int = -1
) -> Tensor:
    """`confusion_matrix` from the predicted classes, an integer tensor of the target's shape."""
    target = target.long()
    cell = target * num_classes + prediction
    # Pixels without a label go to a bin of their own: selecting the others would make the host wait
    # for their number.
    cell = torch.where(_labelled(target, num_classes, ignore_index), cell, num_classes**2).flatten()
    if cell.is_cuda:  # bincount there reads the largest value back to the host
        counts = cell.new_zeros(num_classes**2 + 1)
        counts.scatter_add_(0, cell, cell.new_ones(1).expand_as(cell))
    else:
        counts = torch.bincount(cell, minlength=num_classes**2 + 1)
    return counts[:-1].view(num_classes, num_classes)


def iou_per_class(matrix: Tensor) -> Tensor:
    """Intersection over union of each class: (C,) float64 in 0..1, nan for one that never occurs.

    A class occurs if it is in the target or was predicted; one that was only predicted has 0.
    """
    intersection = matrix.diagonal()
    return intersection.double() / (matrix.sum(0) + matrix.sum(1) - intersection)


def mean_iou(matrix: Tensor) -> Tensor:
    """Mean of `iou_per_class` over the classes that occur, 0..1; nan if none does."""
    return iou_per_class(matrix).nanmean()


def accuracy_per_class(matrix: Tensor) -> Tensor:
    """Share of each class's pixels that got it: (C,) float64 in 0..1, nan for one without any."""
    return matrix.diagonal().double() / matrix.sum(1)


def mean_accuracy(matrix: Tensor) -> Tensor:
    """Mean of `accuracy_per_class` over the classes in the target, 0..1."""
    return accuracy_per_class(matrix).nanmean()


def pixel_accuracy(matrix: Tensor) -> Tensor:
    """Share of all labelled pixels that got their class, 0..1; nan if no pixel has a label."""
    return matrix.diagonal().sum().double() / matrix.sum()


def as_percent(share: Tensor | float) -> float | None:
    """Return a share in 0..1 as percent; None if it is nan, for which JSON has no number."""
    percent = 100 * float(share)
    return None if math.isnan(percent) else percent


class MIoU(Metric):
    """Mean intersection over union in percent, as Composer's `MIoU` and mmsegmentation define it.

    Attributes:
        matrix: (C, C) int64, what this rank has counted since the last reset.
        total_matrix: The same summed over all ranks, as of the last `compute()`; None before it.
            Composer computes its metrics before `Event.EVAL_END`, so a callback finds the matrix of
            the whole evaluation here, on every rank.
    """

    full_state_update = False
    matrix: Tensor

    def __init__(self, num_classes: int, ignore_index: int = -1):
        super().__init__()
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.total_matrix: Tensor | None = None
        empty = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("matrix", empty, dist_reduce_fx="sum")

    def update(self, logits: Tensor | BatchScore, target: Tensor | None = None) -> None:
        """Count a batch: its logits and target as of `confusion_matrix`, or its score."""
        if isinstance(logits, BatchScore):
            self.matrix += logits.matrix
        else:
            assert target is not None
            self.matrix += confusion_matrix(logits, target, self.num_classes, self.ignore_index)

    def compute(self) -> Tensor:
        """Return the mean over what all ranks have counted, 0..100."""
        # A copy: torchmetrics sums over the ranks only for as long as this function runs.
        self.total_matrix = self.matrix.clone()
        return 100 * mean_iou(self.total_matrix)


class CrossEntropy(Metric):
    """Cross entropy averaged over all labelled pixels of the whole set.

    Composer's averages the batches' means, so a pixel weighs more in a batch with fewer labels.
    """

    full_state_update = False
    total: Tensor
    pixels: Tensor

    def __init__(self, ignore_index: int = -1):
        super().__init__()
        self.ignore_index = ignore_index
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pixels", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor | BatchScore, target: Tensor | None = None) -> None:
        """Add a batch: its logits and target as of `confusion_matrix`, or its score."""
        if not isinstance(logits, BatchScore):
            assert target is not None
            logits = score_batch(logits, target, logits.shape[1], self.ignore_index)
        self.total += logits.cross_entropy
        self.pixels += logits.pixels

    def compute(self) -> Tensor:
        """Return the mean over the pixels of all ranks; nan if none has a label."""
        return self.total / self.pixels


def _labelled(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return (target >= 0) & (target < num_classes) & (target != ignore_index)


def _slabs(logits: Tensor, size: torch.Size) -> Iterator[tuple[int, Tensor]]:
    """Upsamples one image's (C, h, w) logits, K classes at a time: (first class, (K, H, W) fp32).

    Classes rather than rows: each is then interpolated exactly as in one call over the whole image.
    """
    classes = max(1, _SLAB_BYTES.get(logits.device.type, 2**24) // (4 * size[0] * size[1]))
    for first in range(0, len(logits), classes):
        slab = logits[first : first + classes].float().contiguous()
        if slab.shape[1:] != size:
            slab = F.interpolate(slab[None], size, mode="bilinear", align_corners=False)[0]
        yield first, slab


def _scan(
    logits: Tensor, target: Tensor, with_cross_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Upsample one image's (C, h, w) logits once, for all that is read off them.

    Returns:
        (H, W) int64 predicted class and, if wanted, (H, W) fp32 cross entropy at each pixel of the
        (H, W) target.
    """
    highest = logits.new_full(target.shape, -torch.inf, dtype=torch.float32)
    prediction = torch.zeros_like(target, dtype=torch.int64)
    normaliser, chosen = highest, torch.zeros_like(highest)
    for first, slab in _slabs(logits, target.shape):
        value, index = slab.max(dim=0)
        # Strictly higher: of equals the first wins, as in an argmax over all classes at once.
        prediction = torch.where(value > highest, index + first, prediction)
        highest = torch.maximum(value, highest)
        if with_cross_entropy:
            normaliser = torch.logaddexp(normaliser, slab.logsumexp(dim=0))
            here = (target >= first) & (target < first + len(slab))
            logit = slab.gather(0, torch.where(here, target - first, 0)[None])[0]
            chosen = torch.where(here, logit, chosen)
    return prediction, normaliser - chosen if with_cross_entropy else None


def class_table(matrix: Tensor, classes: Sequence[ClassInfo]) -> tuple[list[str], list[list[Any]]]:
    """IoU and accuracy in percent and the number of labelled pixels of each class.

    Args:
        matrix: (C, C) counts, row = class in the target, column = predicted class.
        classes: C names.

    Returns:
        The names of the columns, and a row a class; None stands where a class never occurs.
    """
    matrix = matrix.cpu()
    numbers = zip(
        iou_per_class(matrix).tolist(), accuracy_per_class(matrix).tolist(), matrix.sum(1).tolist()
    )
    rows = [
        [c.name, as_percent(iou), as_percent(accuracy), pixels]
        for c, (iou, accuracy, pixels) in zip(classes, numbers, strict=True)
    ]
    return ["class", "IoU", "accuracy", "pixels"], rows


def table_as_csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table as CSV; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
