"""Predictions averaged over several views of one image, at the image's size."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

# On a CPU, scores are computed for this many image rows at a time, so that they fit in the cache.
CPU_ROWS = 8
# On a GPU, this many scores (64 MB) are computed at a time, so that few kernels are launched.
BAND_ELEMENTS = 2**24


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


@torch.no_grad()
def highest_class(views: Sequence[tuple[Tensor, tuple[int, int]]], size: tuple[int, int]) -> Tensor:
    """Return the class with the highest mean probability at every pixel of an image.

    The logits of each view are resized bilinearly, first to the size of the network's input and
    then to the size of the image, as in mmsegmentation.

    Args:
        views: For each view, the logits (C, h, w), and the height and width of the network's input.
        size: Height H and width W of the image.

    Returns:
        (H, W) int64 class indices.
    """
    prediction = torch.empty(size, dtype=torch.int64, device=views[0][0].device)
    for bands in zip(*(resized_bands(logits, size, seen) for logits, seen in views), strict=True):
        rows, scores = bands[0]
        if len(bands) > 1:
            scores = torch.stack([band.softmax(2) for _, band in bands]).sum(0)
        # On a CPU, `max` is twice as fast as `argmax`.
        prediction[rows] = scores.max(2).indices
    return prediction


def resized_bands(
    logits: Tensor, size: tuple[int, int], seen: tuple[int, int] | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Resize the logits of one image, one band of rows at a time.

    The scores of the whole image, (C, H, W), are never all in memory at once. On a CPU, each band
    fits in the cache.

    Args:
        logits: (C, h, w) of any float type.
        size: Height H and width W of the result.
        seen: Height and width of an intermediate size to resize to first, or None.

    Yields:
        The rows of a band, from top to bottom, and its scores (rows, W, C), float32.
    """
    # Put the classes last, so that the scores of a pixel are contiguous in memory.
    source, device = logits.float().permute(1, 2, 0).contiguous(), logits.device
    steps = [seen, size] if seen else [size]
    by_row = resize_matrix((source.shape[0], *(step[0] for step in steps)))
    taps = column_taps((source.shape[1], *(step[1] for step in steps)))
    columns = [
        (torch.tensor(place, device=device), torch.tensor(weight[:, None], device=device))
        for place, weight in taps
    ]

    def widen(first: int, end: int) -> Tensor:
        (place, weight), *others = columns
        wide = source[first:end].index_select(1, place).mul_(weight)
        for place, weight in others:
            wide.addcmul_(source[first:end].index_select(1, place), weight)
        return wide

    is_cpu = device.type == "cpu"
    band = CPU_ROWS if is_cpu else max(1, BAND_ELEMENTS // (len(logits) * size[1]))
    wide, begin = source.new_empty(0, size[1], len(logits)), 0
    for top in range(0, size[0], band):
        part = by_row[top : top + band]
        used = np.flatnonzero(part.any(0))
        first, end = int(used[0]), int(used[-1]) + 1
        # Neighbouring bands share rows of the logits, so resize only the new rows to full width.
        known = max(begin + len(wide), first)
        ranges = [(y, y + 1) for y in range(known, end)] if is_cpu else [(known, end)]
        wide = torch.cat([wide[first - begin :], *(widen(*span) for span in ranges)])
        begin = first
        # Turn autocast off, because it would run this matrix product in bf16.
        with torch.autocast(device.type, enabled=False):
            scores = torch.tensor(part[:, first:end], device=device) @ wide.flatten(1)
        yield slice(top, top + band), scores.unflatten(1, wide.shape[1:])


@functools.lru_cache(4)
def column_taps(lengths: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the columns of logits that contribute to each pixel, and their weights.

    Args:
        lengths: See `resize_matrix`.

    Returns:
        Pairs of column positions (W,) and weights (W,), sorted by weight: the first pair has each
        pixel's largest weight.
    """
    matrix = resize_matrix(lengths)
    count = int((matrix != 0).sum(1).max())
    places = np.argsort(-matrix, 1, kind="stable")[:, :count]
    weights = np.take_along_axis(matrix, places, 1)
    return list(zip(places.T, weights.T, strict=True))


# Many images in an evaluation have the same size, so cache the matrices for the last few sizes.
@functools.lru_cache(4)
def resize_matrix(lengths: tuple[int, ...]) -> np.ndarray:
    """Return the matrix that applies several successive linear resizes to one side of an image.

    The positions and weights are those of `F.interpolate` with align_corners=False. NumPy computes
    them, so the CPU never has to wait for a GPU.

    Args:
        lengths: Original length of the side, and its length after each resize, in pixels.

    Returns:
        (last length, first length) float32 matrix.
    """
    matrix = np.eye(lengths[0], dtype=np.float32)
    for old, new in itertools.pairwise(lengths):
        places = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * np.float32(old / new)
        places = np.maximum(places - np.float32(0.5), 0)
        low = places.astype(np.int64)
        share = (places - low).astype(np.float32)[:, None]
        matrix = matrix[low] * (1 - share) + matrix[np.minimum(low + 1, old - 1)] * share
    return matrix
