"""Predictions from several views of one image, resized to the image's size and averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BAND_ELEMENTS = 2**24  # Number of scores held at the image's resolution at once (64 MB).


def window_starts(length: int, window: int) -> list[int]:
    """Return the positions of windows along one side of an image.

    Neighbouring windows overlap by about a third, and the last window ends at the edge. All
    positions are multiples of 8 if `length` and `window` are.

    Args:
        length: Length of the side in pixels.
        window: Length of a window in pixels.
    """
    step = max(window * 2 // 3 // 8 * 8, 8)
    last = max(length - window, 0)
    return [*range(0, last, step), last]


def highest_class(views: Sequence[tuple[Tensor, tuple[int, int]]], size: tuple[int, int]) -> Tensor:
    """Return the class with the highest mean probability at every pixel of an image.

    The logits of each view are resized bilinearly to the size of the network's input and then to
    the image's size, as in mmsegmentation. Both resizes are linear and separable, so one matrix
    resizes the rows of a view and another its columns. Only a band of rows exists at the image's
    size at any time.

    Args:
        views: Logits (C, h, w) of each view, with the height and width of the network's input.
        size: Height H and width W of the image.

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
    """Return the matrix of several successive bilinear resizes of one side.

    The resizes use align_corners=False.

    Args:
        lengths: Length of the side before the first resize and after each resize.
        device: Device of the matrix.

    Returns:
        (last length, first length) float32.
    """
    matrix = torch.eye(lengths[0], device=device)[None]
    for length in lengths[1:]:
        matrix = F.interpolate(matrix, length, mode="linear", align_corners=False)
    return matrix[0].T
