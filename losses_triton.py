"""The two passes of `losses.segmentation_loss` as Triton kernels, for logits on a GPU.

Neither the upsampled logits nor their softmax leave the registers. Both kernels go through the
pixels cell by cell: the pixels between two neighbouring columns of logits are interpolated from the
same few values, which a program loads once for all classes. The forward kernel leaves a number per
pixel and a few sums; the backward kernel computes the softmax again. Each of its programs owns a
rectangle of the gradient and gathers what it gets from the pixels interpolated from it, so there
are no atomics, and the gradient is the same every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_ROWS, FORWARD_CELLS = 32, 4  # pixel rows and cells a forward program goes through
BACKWARD_ROWS, BACKWARD_CELLS = 4, 8  # rows and columns of the gradient a backward program owns
PIXELS = 4  # a program holds at a time, with all their classes


@triton.jit
def _source(pixel, scale, size):
    """Where `F.interpolate` (bilinear, align_corners=False) reads, in pixels of the logits."""
    return tl.minimum(tl.maximum((pixel + 0.5) * scale - 0.5, 0.0), size - 1.0)


@triton.jit
def _first_pixel(cell, scale):
    """The first of the pixels whose source is at ``cell - 1`` or beyond."""
    return tl.ceil((cell - 0.5) / scale - 0.5).to(tl.int32)


@triton.jit
def _sides(logits, y, cell, scale_y, h, w, c, num_classes, stride_c, stride_h, stride_w):
    """The logits (classes,) left and right of a cell, interpolated to a row of pixels."""
    source = _source(y, scale_y, h)
    top = source.to(tl.int32)
    down = source - top
    above = logits + c * stride_c + top * stride_h
    below = logits + c * stride_c + tl.minimum(top + 1, h - 1) * stride_h
    left = tl.maximum(cell - 1, 0) * stride_w
    right = tl.minimum(cell, w - 1) * stride_w
    known = c < num_classes
    top_left = tl.load(above + left, known, 0.0).to(tl.float32)
    top_right = tl.load(above + right, known, 0.0).to(tl.float32)
    left_side = top_left + down * (tl.load(below + left, known, 0.0).to(tl.float32) - top_left)
    right_side = top_right + down * (tl.load(below + right, known, 0.0).to(tl.float32) - top_right)
    # Exponentials of the classes there are not, up to the next power of 2, shall be 0.
    return tl.where(known, left_side, -1e30), tl.where(known, right_side, -1e30)


@triton.jit
def _shares(target, pixel, present, weight, c, num_classes, ignore_index):
    """The weight a target gives to (pixels, classes) and to (pixels,); nan if out of range."""
    label = tl.load(target + pixel, present, ignore_index).to(tl.int32)
    share = tl.where((label >= 0) & (label < num_classes), weight, float("nan"))
    share = tl.where(label == ignore_index, 0.0, share)
    return tl.where(c[None, :] == label[:, None], share[:, None], 0.0), share


@triton.jit
def _forward_kernel(
    logits,
    first,
    second,
    lse,
    nll,
    sums,
    weight_first,
    weight_second,
    ignore_index,
    num_classes,
    h,
    w,
    height,
    width,
    scale_y,
    scale_x,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    MIXED: tl.constexpr,
    CLASSES: tl.constexpr,
    PIXELS: tl.constexpr,
    SUPPORT: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    logits += image * stride_n
    c = tl.arange(0, CLASSES)
    predicted = tl.zeros((CLASSES,), tl.float32)
    intersection = tl.zeros((CLASSES,), tl.float32)
    truth = tl.zeros((CLASSES,), tl.float32)
    pixel_nll = tl.zeros((PIXELS,), tl.float32)
    y_start = tl.program_id(1) * ROWS
    first_cell = tl.program_id(0) * CELLS
    for cell in range(first_cell, tl.minimum(first_cell + CELLS, w + 1)):
        x_start = _first_pixel(cell, scale_x)
        x_stop = tl.minimum(_first_pixel(cell + 1, scale_x), width)
        for y in range(y_start, tl.minimum(y_start + ROWS, height)):
            left, right = _sides(
                logits, y, cell, scale_y, h, w, c, num_classes, stride_c, stride_h, stride_w
            )
            for step in range(0, SUPPORT, PIXELS):
                x = x_start + step + tl.arange(0, PIXELS)
                present = (x >= 0) & (x < x_stop)
                across = _source(x, scale_x, w) - (cell - 1)
                z = left[None, :] + across[:, None] * (right - left)[None, :]
                peak = tl.max(z, 1)
                exponential = tl.exp(z - peak[:, None])
                total = tl.sum(exponential, 1)
                log_total = peak + tl.log(total)
                pixel = (image * height + y) * width + x
                at_class, share = _shares(
                    first, pixel, present, weight_first, c, num_classes, ignore_index
                )
                if MIXED:
                    second_at_class, second_share = _shares(
                        second, pixel, present, weight_second, c, num_classes, ignore_index
                    )
                    at_class += second_at_class
                    share += second_share
                p = exponential * tl.where(share != 0, 1 / total, 0.0)[:, None]
                predicted += tl.sum(p, 0)
                intersection += tl.sum(p * at_class, 0)
                truth += tl.sum(at_class, 0)
                pixel_nll += share * log_total - tl.sum(at_class * z, 1)
                tl.store(lse + pixel, tl.where(share != 0, log_total, float("inf")), present)
    program = (image * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0)
    program += tl.program_id(0)
    tl.store(nll + program, tl.sum(pixel_nll, 0))
    sums += program * 3 * num_classes + c
    tl.store(sums, intersection, c < num_classes)
    tl.store(sums + num_classes, truth, c < num_classes)
    tl.store(sums + 2 * num_classes, predicted, c < num_classes)


@triton.jit
def _backward_kernel(
    logits,
    grad,
    first,
    second,
    lse,
    by_nll,
    by_intersection,
    by_predicted,
    weight_first,
    weight_second,
    ignore_index,
    num_classes,
    h,
    w,
    height,
    width,
    scale_y,
    scale_x,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    MIXED: tl.constexpr,
    CLASSES: tl.constexpr,
    PIXELS: tl.constexpr,
    SUPPORT: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    logits += image * stride_n
    top = tl.program_id(1) * ROWS
    low_y = top + tl.arange(0, ROWS)
    c = tl.arange(0, CLASSES)
    grad += image * stride_n + low_y[:, None] * stride_h + c[None, :] * stride_c
    owned = (low_y < h)[:, None] & (c < num_classes)[None, :]
    by_nll = tl.load(by_nll)
    by_intersection = tl.load(by_intersection + c, c < num_classes, 0.0)[None, :]
    by_predicted = tl.load(by_predicted + c, c < num_classes, 0.0)[None, :]
    # The pixels less than one row of logits away from those owned.
    y_start = tl.maximum(_first_pixel(top, scale_y), 0)
    y_stop = tl.minimum(_first_pixel(top + ROWS + 1, scale_y), height)
    # A column's gradient comes from the cell on its left, kept in `of_left_cell`, and on its right.
    of_left_cell = tl.zeros((ROWS, CLASSES), tl.float32)
    first_cell = tl.program_id(0) * CELLS
    for cell in range(first_cell, tl.minimum(first_cell + CELLS, w) + 1):
        x_start = _first_pixel(cell, scale_x)
        x_stop = tl.minimum(_first_pixel(cell + 1, scale_x), width)
        to_left = tl.zeros((ROWS, CLASSES), tl.float32)
        to_right = tl.zeros((ROWS, CLASSES), tl.float32)
        for y in range(y_start, y_stop):
            left, right = _sides(
                logits, y, cell, scale_y, h, w, c, num_classes, stride_c, stride_h, stride_w
            )
            row = tl.zeros((CLASSES,), tl.float32)
            row_to_right = tl.zeros((CLASSES,), tl.float32)
            for step in range(0, SUPPORT, PIXELS):
                x = x_start + step + tl.arange(0, PIXELS)
                present = (x >= 0) & (x < x_stop)
                across = (_source(x, scale_x, w) - (cell - 1))[:, None]
                z = left[None, :] + across * (right - left)[None, :]
                pixel = (image * height + y) * width + x
                log_total = tl.load(lse + pixel, present, float("inf"))
                p = tl.exp(z - log_total[:, None])
                at_class, _ = _shares(
                    first, pixel, present, weight_first, c, num_classes, ignore_index
                )
                if MIXED:
                    second_at_class, _ = _shares(
                        second, pixel, present, weight_second, c, num_classes, ignore_index
                    )
                    at_class += second_at_class
                # p * (derivative by p), and from it, through the softmax, the derivative by z.
                u = p * (by_predicted + by_intersection * at_class) - by_nll * at_class
                by_z = u - p * tl.sum(u, 1)[:, None]
                row += tl.sum(by_z, 0)
                row_to_right += tl.sum(by_z * across, 0)
            weight = tl.maximum(1 - tl.abs(_source(y, scale_y, h) - low_y), 0.0)[:, None]
            to_left += weight * (row - row_to_right)[None, :]
            to_right += weight * row_to_right[None, :]
        if cell > first_cell:
            result = (of_left_cell + to_left).to(grad.dtype.element_ty)
            tl.store(grad + (cell - 1) * stride_w, result, owned)
        of_left_cell = to_right


def forward_sums(
    logits: Tensor, targets: Sequence[Tensor], weights: Sequence[float], ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `losses.forward_sums`, for fp32, bf16 and fp16 logits on a GPU."""
    n, c, _, w = logits.shape
    height, width = targets[0].shape[1:]
    grid = (triton.cdiv(w + 1, FORWARD_CELLS), triton.cdiv(height, FORWARD_ROWS), n)
    lse = logits.new_empty((n, height, width), dtype=torch.float32)
    nll = lse.new_empty(math.prod(grid))
    sums = lse.new_empty(math.prod(grid), 3, c)
    targets = [t.contiguous() for t in targets]
    _forward_kernel[grid](
        logits,
        targets[0],
        targets[-1],
        lse,
        nll,
        sums,
        *(weights[0], weights[-1], ignore_index),
        *_geometry(logits, height, width),
        **_constants(logits, len(targets), width),
        ROWS=FORWARD_ROWS,
        CELLS=FORWARD_CELLS,
    )
    intersection, truth, predicted = sums.sum(0)
    return nll.sum(), intersection, truth, predicted, lse


def backward(
    logits: Tensor,
    targets: Sequence[Tensor],
    weights: Sequence[float],
    ignore_index: int,
    lse: Tensor,
    by_nll: Tensor,
    by_intersection: Tensor,
    by_predicted: Tensor,
) -> Tensor:
    """As `losses.backward`, for fp32, bf16 and fp16 logits on a GPU."""
    n, _, h, w = logits.shape
    height, width = lse.shape[1:]
    grad = torch.empty_like(logits)
    if grad.stride() != logits.stride():  # logits with gaps, such as a slice
        logits = logits.contiguous()
        grad = torch.empty_like(logits)
    targets = [t.contiguous() for t in targets]
    _backward_kernel[(triton.cdiv(w, BACKWARD_CELLS), triton.cdiv(h, BACKWARD_ROWS), n)](
        logits,
        grad,
        targets[0],
        targets[-1],
        lse,
        by_nll,
        by_intersection,
        by_predicted,
        *(weights[0], weights[-1], ignore_index),
        *_geometry(logits, height, width),
        **_constants(logits, len(targets), width),
        ROWS=BACKWARD_ROWS,
        CELLS=BACKWARD_CELLS,
    )
    return grad


def _geometry(logits: Tensor, height: int, width: int) -> tuple:
    """How logits (N, C, h, w) scale to pixels and lie in memory, as the kernels take it."""
    _, c, h, w = logits.shape
    return (c, h, w, height, width, h / height, w / width, *logits.stride())


def _constants(logits: Tensor, num_targets: int, width: int) -> dict[str, int]:
    """What the kernels are compiled for."""
    w = logits.shape[3]
    support = math.ceil(width / w) + (width % w != 0)  # pixels in a cell at most, rounding included
    return {
        "MIXED": num_targets == 2,
        "CLASSES": triton.next_power_of_2(logits.shape[1]),
        "PIXELS": min(PIXELS, triton.next_power_of_2(support)),
        "SUPPORT": support,
    }
