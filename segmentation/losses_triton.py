"""The two passes of `losses.segmentation_loss` as Triton kernels, for logits on a GPU.

The upsampled logits and their softmax stay in registers. Both kernels process the pixels cell by
cell. A cell is the set of pixels between two neighbouring columns of logits. All pixels of a cell
are interpolated from the same few logits, so a program loads these logits once for all classes.

The forward kernel writes each pixel's normalisers and a few sums. The backward kernel computes the
softmax again. Each program of the backward kernel owns a rectangle of the gradient and adds up the
contributions of all pixels that are interpolated from this rectangle. The kernel therefore needs no
atomic operations, and the gradient is reproducible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# The fields of `losses.WeightedTargets`.
Targets = tuple[Sequence[Tensor], Sequence[float], Tensor | None, int]
# Each program of the forward kernel processes this many pixel rows and cells.
FORWARD_ROWS, FORWARD_CELLS = 32, 4
# Each program of the backward kernel computes this many rows and columns of the gradient.
BACKWARD_ROWS, BACKWARD_CELLS = 4, 16
# Programs of both kernels process this many pixels at a time.
PIXELS = 4
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _source(pixel, scale, size):
    """Return the position in the logits that `F.interpolate` reads for a pixel.

    The interpolation is bilinear with align_corners=False.
    """
    return tl.minimum(tl.maximum((pixel + 0.5) * scale - 0.5, 0.0), size - 1.0)


@triton.jit
def _first_pixel(cell, scale):
    """Return the first pixel whose position in the logits is `cell - 1` or more."""
    return tl.ceil((cell - 0.5) / scale - 0.5).to(tl.int32)


@triton.jit
def _sides(logits, y, cell, scale_y, h, w, c, num_classes):
    """Return a row's logits (classes,) at a cell's left edge, and their change across the cell.

    The values are multiplied by log2(e), because the hardware computes powers of 2.
    """
    source = _source(y, scale_y, h)
    top = source.to(tl.int32)
    down = source - top
    above = logits + top * w * num_classes + c
    below = logits + tl.minimum(top + 1, h - 1) * w * num_classes + c
    at_left = tl.maximum(cell - 1, 0) * num_classes
    at_right = tl.minimum(cell, w - 1) * num_classes
    known = c < num_classes
    left = tl.load(above + at_left, known, 0.0).to(tl.float32)
    right = tl.load(above + at_right, known, 0.0).to(tl.float32)
    left += down * (tl.load(below + at_left, known, 0.0).to(tl.float32) - left)
    right += down * (tl.load(below + at_right, known, 0.0).to(tl.float32) - right)
    # Extra classes pad the block to a power of 2. Give them probability 0.
    left = tl.where(known, left * LOG2_E, -1e30)
    right = tl.where(known, right * LOG2_E, -1e30)
    return left[None, :], (right - left)[None, :]


@triton.jit
def _label(target, pixel, present, weight, num_classes, ignore_index):
    """Return the class indices and weights of pixels.

    The weight is 0 for ignored pixels and nan for pixels with an invalid class index.
    """
    label = tl.load(target + pixel, present, ignore_index).to(tl.int32)
    share = tl.where((label >= 0) & (label < num_classes), weight, float("nan"))
    return label[:, None], tl.where(label == ignore_index, 0.0, share)


@triton.jit
def _weighted(class_weights, label, share, num_classes):
    """Return the weight of each pixel times the weight of its class."""
    label = tl.minimum(tl.maximum(tl.sum(label, 1), 0), num_classes - 1)
    return share * tl.load(class_weights + label)


@triton.jit
def _at_label(c, label, value, second_label, second_value, MIXED: tl.constexpr):
    """Return a block (pixels, classes) with each pixel's values at its labels, and 0 elsewhere."""
    result = tl.where(c[None, :] == label, value[:, None], 0.0)
    if MIXED:
        result += tl.where(c[None, :] == second_label, second_value[:, None], 0.0)
    return result


@triton.jit
def _sum(head, tail):
    """Return the sum over all classes of the blocks (pixels, HEAD) and (pixels, TAIL).

    Elements that are a multiple of TAIL apart belong to the same thread. These elements are first
    added in registers, which needs half as many warp shuffles as two separate sums.
    """
    pixels: tl.constexpr = head.shape[0]
    tails: tl.constexpr = tail.shape[1]
    parts = tl.reshape(head, (pixels, head.shape[1] // tails, tails))
    return tl.sum(tl.sum(parts, 1) + tail, 1)


@triton.jit
def _max(head, tail):
    """Return the maximum over all classes of the blocks (pixels, HEAD) and (pixels, TAIL)."""
    pixels: tl.constexpr = head.shape[0]
    tails: tl.constexpr = tail.shape[1]
    parts = tl.reshape(head, (pixels, head.shape[1] // tails, tails))
    return tl.max(tl.maximum(tl.max(parts, 1), tail), 1)


@triton.jit
def _forward_kernel(
    nll,
    sums,
    logits,
    first,
    second,
    class_weights,
    lse,
    weight,
    second_weight,
    ignore_index,
    num_classes,
    h,
    w,
    height,
    width,
    scale_y,
    scale_x,
    MIXED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    PIXELS: tl.constexpr,
    SUPPORT: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    logits += image * h * w * num_classes
    c = tl.arange(0, HEAD)
    d = HEAD + tl.arange(0, TAIL)
    predicted_c = tl.zeros((PIXELS, HEAD), tl.float32)
    predicted_d = tl.zeros((PIXELS, TAIL), tl.float32)
    intersection_c = tl.zeros((PIXELS, HEAD), tl.float32)
    intersection_d = tl.zeros((PIXELS, TAIL), tl.float32)
    truth_c = tl.zeros((PIXELS, HEAD), tl.float32)
    truth_d = tl.zeros((PIXELS, TAIL), tl.float32)
    log_likelihood_c = tl.zeros((PIXELS, HEAD), tl.float32)
    log_likelihood_d = tl.zeros((PIXELS, TAIL), tl.float32)
    log_totals = tl.zeros((PIXELS,), tl.float32)
    pixels = tl.num_programs(2).to(tl.int64) * height * width
    y_start = tl.program_id(1) * ROWS
    first_cell = tl.program_id(0) * CELLS
    for cell in range(first_cell, tl.minimum(first_cell + CELLS, w + 1)):
        x_start = _first_pixel(cell, scale_x)
        x_stop = tl.minimum(_first_pixel(cell + 1, scale_x), width)
        for y in range(y_start, tl.minimum(y_start + ROWS, height)):
            left_c, step_c = _sides(logits, y, cell, scale_y, h, w, c, num_classes)
            left_d, step_d = _sides(logits, y, cell, scale_y, h, w, d, num_classes)
            for start in range(0, SUPPORT, PIXELS):
                x = x_start + start + tl.arange(0, PIXELS)
                present = (x >= 0) & (x < x_stop)
                across = (_source(x, scale_x, w) - (cell - 1))[:, None]
                z_c = left_c + across * step_c
                z_d = left_d + across * step_d
                peak = _max(z_c, z_d)
                z_c -= peak[:, None]
                z_d -= peak[:, None]
                exp_c = tl.exp2(z_c)
                exp_d = tl.exp2(z_d)
                total = _sum(exp_c, exp_d)
                log_total = tl.log2(total)
                pixel = (image * height + y) * width + x
                label, share = _label(first, pixel, present, weight, num_classes, ignore_index)
                other, other_share = label, share
                any_share = share
                if MIXED:
                    other, other_share = _label(
                        second, pixel, present, second_weight, num_classes, ignore_index
                    )
                    any_share += other_share
                tl.store(lse + pixel, peak, present)
                excess = tl.where(any_share != 0, log_total, float("inf"))
                tl.store(lse + pixels + pixel, excess, present)
                inverse = tl.where(any_share != 0, 1 / total, 0.0)
                predicted_c += exp_c * inverse[:, None]
                predicted_d += exp_d * inverse[:, None]
                at_c = _at_label(c, label, share, other, other_share, MIXED)
                at_d = _at_label(d, label, share, other, other_share, MIXED)
                truth_c += at_c
                truth_d += at_d
                intersection_c += exp_c * (at_c * inverse[:, None])
                intersection_d += exp_d * (at_d * inverse[:, None])
                log_likelihood_c += at_c * z_c
                log_likelihood_d += at_d * z_d
                # In this kernel, the class weights affect only the cross entropy.
                if WEIGHTED:
                    any_share = _weighted(class_weights, label, share, num_classes)
                    if MIXED:
                        any_share += _weighted(class_weights, other, other_share, num_classes)
                log_totals += any_share * log_total
    program = (image * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0)
    program += tl.program_id(0)
    if WEIGHTED:
        log_likelihood_c *= tl.load(class_weights + c)[None, :]
        log_likelihood_d *= tl.load(class_weights + d, d < num_classes, 0.0)[None, :]
    log_likelihood = tl.sum(tl.sum(log_likelihood_c, 1) + tl.sum(log_likelihood_d, 1), 0)
    tl.store(nll + program, (tl.sum(log_totals, 0) - log_likelihood) / LOG2_E)
    sums += program * 3 * num_classes
    tl.store(sums + c, tl.sum(intersection_c, 0))
    tl.store(sums + d, tl.sum(intersection_d, 0), d < num_classes)
    tl.store(sums + num_classes + c, tl.sum(truth_c, 0))
    tl.store(sums + num_classes + d, tl.sum(truth_d, 0), d < num_classes)
    tl.store(sums + 2 * num_classes + c, tl.sum(predicted_c, 0))
    tl.store(sums + 2 * num_classes + d, tl.sum(predicted_d, 0), d < num_classes)


@triton.jit
def _backward_kernel(
    grad,
    by_nll,
    by_intersection,
    by_predicted,
    logits,
    first,
    second,
    class_weights,
    lse,
    weight,
    second_weight,
    ignore_index,
    num_classes,
    h,
    w,
    height,
    width,
    scale_y,
    scale_x,
    MIXED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    PIXELS: tl.constexpr,
    SUPPORT: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    logits += image * h * w * num_classes
    top = tl.program_id(1) * ROWS
    low_y = top + tl.arange(0, ROWS)
    c = tl.arange(0, HEAD)
    d = HEAD + tl.arange(0, TAIL)
    grad += (image * h + low_y[:, None]) * w * num_classes
    by_nll_c = tl.load(by_nll)
    by_nll_d = by_nll_c
    if WEIGHTED:
        by_nll_c = by_nll_c * tl.load(class_weights + c)[None, :]
        by_nll_d = by_nll_d * tl.load(class_weights + d, d < num_classes, 0.0)[None, :]
    by_intersection_c = tl.load(by_intersection + c)[None, :]
    by_intersection_d = tl.load(by_intersection + d, d < num_classes, 0.0)[None, :]
    by_predicted_c = tl.load(by_predicted + c)[None, :]
    by_predicted_d = tl.load(by_predicted + d, d < num_classes, 0.0)[None, :]
    pixels = tl.num_programs(2).to(tl.int64) * height * width
    # Range of pixel rows that are interpolated from this program's rows of logits.
    y_start = tl.maximum(_first_pixel(top, scale_y), 0)
    y_stop = tl.minimum(_first_pixel(top + ROWS + 1, scale_y), height)
    # A column of logits gets its gradient from two cells: the cell on its left, which the previous
    # iteration has processed, and the cell on its right.
    kept_c = tl.zeros((ROWS, HEAD), tl.float32)
    kept_d = tl.zeros((ROWS, TAIL), tl.float32)
    first_cell = tl.program_id(0) * CELLS
    for cell in range(first_cell, tl.minimum(first_cell + CELLS, w) + 1):
        x_start = _first_pixel(cell, scale_x)
        x_stop = tl.minimum(_first_pixel(cell + 1, scale_x), width)
        to_left_c = tl.zeros((ROWS, HEAD), tl.float32)
        to_left_d = tl.zeros((ROWS, TAIL), tl.float32)
        to_right_c = tl.zeros((ROWS, HEAD), tl.float32)
        to_right_d = tl.zeros((ROWS, TAIL), tl.float32)
        for y in range(y_start, y_stop):
            left_c, step_c = _sides(logits, y, cell, scale_y, h, w, c, num_classes)
            left_d, step_d = _sides(logits, y, cell, scale_y, h, w, d, num_classes)
            vertical = tl.maximum(1 - tl.abs(_source(y, scale_y, h) - low_y), 0.0)[:, None]
            for start in range(0, SUPPORT, PIXELS):
                x = x_start + start + tl.arange(0, PIXELS)
                present = (x >= 0) & (x < x_stop)
                across = (_source(x, scale_x, w) - (cell - 1))[:, None]
                pixel = (image * height + y) * width + x
                peak = tl.load(lse + pixel, present, 0.0)[:, None]
                excess = tl.load(lse + pixels + pixel, present, float("inf"))[:, None]
                p_c = tl.exp2(left_c + across * step_c - peak - excess)
                p_d = tl.exp2(left_d + across * step_d - peak - excess)
                label, share = _label(first, pixel, present, weight, num_classes, ignore_index)
                other, other_share = label, share
                if MIXED:
                    other, other_share = _label(
                        second, pixel, present, second_weight, num_classes, ignore_index
                    )
                at_c = _at_label(c, label, share, other, other_share, MIXED)
                at_d = _at_label(d, label, share, other, other_share, MIXED)
                # Let u be p times the derivative of the loss with respect to p. By the chain rule
                # through the softmax, the derivative with respect to z is u - p * sum(u).
                u_c = p_c * (by_predicted_c + by_intersection_c * at_c) - by_nll_c * at_c
                u_d = p_d * (by_predicted_d + by_intersection_d * at_d) - by_nll_d * at_d
                inner = _sum(u_c, u_d)[:, None]
                by_z_c = u_c - p_c * inner
                by_z_d = u_d - p_d * inner
                to_left_c += vertical * tl.sum(by_z_c * (1 - across), 0)[None, :]
                to_left_d += vertical * tl.sum(by_z_d * (1 - across), 0)[None, :]
                to_right_c += vertical * tl.sum(by_z_c * across, 0)[None, :]
                to_right_d += vertical * tl.sum(by_z_d * across, 0)[None, :]
        if cell > first_cell:
            column = grad + (cell - 1) * num_classes
            result_c = (kept_c + to_left_c).to(grad.dtype.element_ty)
            result_d = (kept_d + to_left_d).to(grad.dtype.element_ty)
            owned = (low_y < h)[:, None]
            tl.store(column + c[None, :], result_c, owned)
            tl.store(column + d[None, :], result_d, owned & (d < num_classes)[None, :])
        kept_c = to_right_c
        kept_d = to_right_d


def forward_sums(logits: Tensor, targets: Targets) -> tuple[Tensor, ...]:
    """Compute `losses.forward_sums` for fp32, bf16 and fp16 logits on a GPU.

    The normalisers are logarithms to base 2.

    Args:
        logits: (N, C, h, w).
        targets: Class indices and weights.
    """
    n, c, _, w = logits.shape
    height, width = targets[0][0].shape[1:]
    grid = (math.ceil((w + 1) / FORWARD_CELLS), math.ceil(height / FORWARD_ROWS), n)
    lse = logits.new_empty((2, n, height, width), dtype=torch.float32)
    nll = lse.new_empty(math.prod(grid))
    sums = lse.new_empty(math.prod(grid), 3, c)
    shared, constants = _arguments(logits, targets, lse)
    constants |= {"ROWS": FORWARD_ROWS, "CELLS": FORWARD_CELLS}
    _forward_kernel[grid](nll, sums, *shared, **constants)
    intersection, truth, predicted = sums.sum(0)
    return nll.sum(), intersection, truth, predicted, lse


def backward(
    logits: Tensor, targets: Targets, lse: Tensor, by_sums: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Compute `losses.backward` from the base-2 normalisers of this module's `forward_sums`.

    Args:
        logits: (N, C, h, w).
        targets: Class indices and weights.
        lse: Normalisers from `forward_sums`, (2, N, H, W).
        by_sums: Gradients with respect to the negative log-likelihood, 0-d, to the softmax within
            each class's target, (C,), and to the softmax of each class, (C,).
    """
    n, _, h, w = logits.shape
    grid = (math.ceil(w / BACKWARD_CELLS), math.ceil(h / BACKWARD_ROWS), n)
    shared, constants = _arguments(logits, targets, lse)
    grad = torch.empty_like(logits, memory_format=torch.channels_last)
    constants |= {"ROWS": BACKWARD_ROWS, "CELLS": BACKWARD_CELLS}
    _backward_kernel[grid](grad, *by_sums, *shared, **constants)
    return grad


# Triton's type annotations allow its own `next_power_of_2` only in kernels, so define the function
# in plain Python.
def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _arguments(logits: Tensor, targets: Targets, lse: Tensor) -> tuple[tuple, dict[str, int]]:
    """Return the arguments that both kernels share, and their compile-time constants.

    The logits are converted to channels-last, so that a pixel's classes are contiguous in memory.
    """
    indices, weights, class_weights, ignore_index = targets
    _, c, h, w = logits.shape
    height, width = lse.shape[2:]
    constants = _constants(logits, len(indices), class_weights, width)
    logits = logits.contiguous(memory_format=torch.channels_last)
    first, second = indices[0].contiguous(), indices[-1].contiguous()
    # Without class weights, the kernels still need a tensor argument, but they do not read it.
    class_weights = lse if class_weights is None else class_weights
    tensors = logits, first, second, class_weights, lse
    numbers = weights[0], weights[-1], ignore_index
    sizes = c, h, w, height, width, h / height, w / width
    return (*tensors, *numbers, *sizes), constants


def _constants(
    logits: Tensor, num_targets: int, class_weights: Tensor | None, width: int
) -> dict[str, int]:
    """Return the compile-time constants of the kernels."""
    c, w = logits.shape[1], logits.shape[3]
    head = _next_power_of_2(c) // 2
    # Maximum width of a cell in pixels, allowing for rounding.
    support = math.ceil(width / w) + (width % w != 0)
    return {
        "MIXED": num_targets == 2,
        "WEIGHTED": class_weights is not None,
        # Block sizes must be powers of 2. With 150 classes, two blocks (`_c` and `_d` in the
        # kernels) waste less space than one.
        "HEAD": head,
        "TAIL": _next_power_of_2(c - head),
        "PIXELS": min(PIXELS, _next_power_of_2(support)),
        "SUPPORT": support,
        "num_warps": 1,  # With one warp, sums over classes need no synchronisation.
    }
