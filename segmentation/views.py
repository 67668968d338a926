"""Scores of several views of one image, brought back to the image's size and averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BAND_ELEMENTS = 2**24  # scores held at the photo's resolution at once: 64 MB


def window_starts(length: int, window: int) -> list[int]:
    """Where windows begin along a side: a third overlapping, the last one flush with the end.

    All are multiples of 8 where `length` and `window` are.
    """
    step = max(window * 2 // 3 // 8 * 8, 8)
    last = max(length - window, 0)
    return [*range(0, last, step), last]


def highest_class(views: Sequence[tuple[Tensor, tuple[int, int]]], size: tuple[int, int]) -> Tensor:
    """Return the class with the highest mean probability at every pixel of a photo.

    Each view's logits are resized to the size that the network saw and from there to the photo's,
    bilinearly, as mmsegmentation does. Both resizes are linear and separable, so rows and columns
    of a view have one matrix each, and only a band of rows is ever held at the photo's size.

    Args:
        views: Logits (C, h, w), and height and width of what the network saw.
        size: Height H and width W of the photo.

    Returns:
        (H, W) int64 class indices.
    """
    height, width = size
    bands = []
    step = max(1, BAND_ELEMENTS // (len(views[0][0]) * width))
    matrices = [
        (
            resize_matrix((logits.shape[1], seen[0], height), logits.device),
            resize_matrix((logits.shape[2], seen[1], width), logits.device).T,
        )
        for logits, seen in views
    ]
    for top in range(0, height, step):
        total = None
        for (logits, _), (rows, columns) in zip(views, matrices):
            scores = rows[top : top + step] @ logits.float() @ columns
            if len(views) > 1:
                scores = scores.softmax(0)
            total = scores if total is None else total + scores
        assert total is not None
        bands.append(total.argmax(0))
    return torch.cat(bands)


def resize_matrix(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return the matrix of successive bilinear resizes (align_corners=False) of one side.

    Args:
        lengths: Length of the side before the first resize and after each.
        device: Where it is needed.

    Returns:
        (last length, first length) float32.
    """
    matrix = torch.eye(lengths[0], device=device)[None]
    for length in lengths[1:]:
        matrix = F.interpolate(matrix, length, mode="linear", align_corners=False)
    return matrix[0].T
