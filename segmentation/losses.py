"""Cross entropy and Dice loss in one pass over logits of any resolution.

With 150 classes at 512 px, one image's logits take 157 MB in fp32. An implementation with ordinary
tensor operations keeps a dozen such tensors for every image: upsampled logits, softmax, one-hot
targets, their products and all their gradients.

This module keeps the logits at the network's resolution. It upsamples one tile of pixels at a time,
and processes the tile while it is in the cache. The forward pass computes the sums over pixels that
both losses need. The backward pass computes the gradient of the upsampled logits, and maps it back
to the network's resolution with the adjoint of the upsampling.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# composer.loss.DiceLoss uses the same epsilon.
EPSILON = 1e-5
# Number of elements in a tile that one CPU thread processes: 1 MiB in fp32, which fits in the L2
# cache of current servers.
CPU_TILE = 2**18
# Number of elements in a GPU tile: 128 MiB in fp32. Larger tiles need fewer kernel launches.
GPU_TILE = 2**25

_kernels_allowed = True


@contextmanager
def fused_kernels(allowed: bool) -> Iterator[None]:
    """Allow or forbid the Triton kernels for losses and their gradients within a context.

    Without the kernels, ordinary PyTorch operations compute the same loss.

    Args:
        allowed: Whether the kernels may be used.
    """
    global _kernels_allowed
    before, _kernels_allowed = _kernels_allowed, allowed
    try:
        yield
    finally:
        _kernels_allowed = before


class MixedTarget(NamedTuple):
    """The target for images that are blended in pairs.

    The target represents `(1 - mixing) * onehot(target) + mixing * onehot(permuted)`.

    Attributes:
        target: Class indices of the first image of each pair, (N, H, W).
        permuted: Class indices of the second image, (N, H, W).
        mixing: Weight of the second image, 0 to 1.
    """

    target: Tensor
    permuted: Tensor
    mixing: float


def split_target(target: Tensor | MixedTarget) -> list[tuple[Tensor, float]]:
    """Return the (class indices, weight) pairs of a target, except those with a weight of 0."""
    if not isinstance(target, MixedTarget):
        return [(target, 1.0)]
    pairs = [(target.target, 1 - target.mixing), (target.permuted, target.mixing)]
    return [(indices, weight) for indices, weight in pairs if weight]


class WeightedTargets(NamedTuple):
    """One or two targets, their weights, and the class weights.

    Attributes:
        indices: One or two tensors (N, H, W) of class indices.
        weights: Weight of each target.
        class_weights: (C,) weights of the classes in the negative log-likelihood, or None.
        ignore_index: Class index of pixels without a label.
    """

    indices: Sequence[Tensor]
    weights: Sequence[float]
    class_weights: Tensor | None
    ignore_index: int


def segmentation_loss(
    logits: Tensor,
    target: Tensor | MixedTarget,
    *,
    ignore_index: int = -1,
    cross_entropy_weight: float = 0.375,
    dice_weight: float = 1.125,
    class_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the weighted sum of cross entropy and Dice loss on bilinearly upsampled logits.

    The values and gradients equal those of Composer's `soft_cross_entropy(ignore_index)` and
    `DiceLoss(softmax=True, batch=True, ignore_absent_classes=True)` on `F.interpolate(logits, size,
    mode='bilinear', align_corners=False)`. A mixed target is treated as the dense mixture of two
    one-hot targets.

    If every pixel is ignored, the loss and its gradient are 0, whereas Composer's are nan. On a
    GPU, the loss uses two Triton kernels, unless `fused_kernels(False)` forbids them.

    Args:
        logits: (N, C, h, w), floating point, with at least two classes, in any memory format. All
            sums are computed in fp32 (fp64 for fp64 logits), even under autocast.
        target: Integer class indices (N, H, W), each in [0, C) or `ignore_index`, or a
            `MixedTarget`.
        ignore_index: Class index of pixels without a label.
        cross_entropy_weight: Weight of the cross entropy, a mean over pixels.
        dice_weight: Weight of the Dice loss, a mean over the classes in the batch's target.
        class_weights: (C,) weights of the classes in both means. The cross entropy weights each
            pixel by its class, like PyTorch's `F.cross_entropy(weight=...)`. With None, all classes
            have the same weight.

    Returns:
        A dict with `cross_entropy`, `dice` and their weighted sum `total`, each 0-d. Parts with
        weight 0 are omitted.

    Raises:
        ValueError: The shapes or types do not match.
        RuntimeError: A class index is out of range. The class indices are checked only on a CPU. On
            a GPU, the check would have to wait for the device, so an invalid index makes the cross
            entropy nan instead.
    """
    indices, weights = zip(*split_target(target), strict=True)
    for t in indices:
        shapes = logits.ndim == 4 and logits.shape[1] > 1 and t.ndim == 3 and len(t) == len(logits)
        if not shapes or t.is_floating_point() or t.shape != indices[0].shape:
            raise ValueError(
                f"got logits of shape {tuple(logits.shape)} and {t.dtype} targets of shape "
                f"{tuple(t.shape)}; expected logits of shape (N, C, h, w) with at least two "
                "classes and integer targets of shape (N, H, W)"
            )
    if class_weights is not None:
        if class_weights.shape != logits.shape[1:2]:
            raise ValueError(
                f"got {class_weights.numel()} class_weights for {logits.shape[1]} classes; give "
                "one weight per class"
            )
        dtype = torch.promote_types(logits.dtype, torch.float32)
        class_weights = class_weights.to(logits.device, dtype)
    targets = WeightedTargets(indices, weights, class_weights, ignore_index)
    losses = _SegmentationLoss.apply(logits, targets)
    cross_entropy, dice = cast("tuple[Tensor, Tensor]", losses)
    parts = {}
    total = torch.zeros_like(dice)
    if cross_entropy_weight:
        parts["cross_entropy"] = cross_entropy
        total = total + cross_entropy_weight * cross_entropy
    if dice_weight:
        parts["dice"] = dice
        total = total + dice_weight * dice
    return parts | {"total": total}


class _SegmentationLoss(torch.autograd.Function):
    """Cross entropy and Dice loss of logits (N, C, h, w) for one or two targets (N, H, W)."""

    @staticmethod
    def forward(ctx, logits, targets):
        # Choose the backward pass now, because it may run after the `fused_kernels` context has
        # ended.
        forward_sums, ctx.backward_pass = _implementation(logits)
        with torch.autocast(logits.device.type, enabled=False):
            nll, intersection, truth, predicted, lse = forward_sums(logits, targets)
            tiny = torch.finfo(truth.dtype).tiny
            present = truth > 0
            if targets.class_weights is None:
                pixels, classes = truth.sum().clamp(min=tiny), present.sum().clamp(min=1)
            else:  # From here on, `present` holds the weight of each class in the target.
                pixels, present = truth @ targets.class_weights, present * targets.class_weights
                pixels, classes = pixels.clamp(min=tiny), present.sum().clamp(min=tiny)
            union = truth + predicted + EPSILON
            overlap = (2 * intersection + EPSILON) / union
            dice = ((1 - overlap) * present).sum() / classes
            # Derivatives of the Dice loss with respect to each class's `intersection` and
            # `predicted`.
            by_intersection = -2 * present / union / classes
            by_predicted = overlap * present / union / classes
        ctx.save_for_backward(logits, lse, pixels, by_intersection, by_predicted)
        ctx.targets = targets
        return nll / pixels, dice

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_cross_entropy, grad_dice):
        logits, lse, pixels, by_intersection, by_predicted = ctx.saved_tensors
        by_sums = grad_cross_entropy / pixels, grad_dice * by_intersection, grad_dice * by_predicted
        with torch.autocast(logits.device.type, enabled=False):
            return ctx.backward_pass(logits, ctx.targets, lse, by_sums), None


def _implementation(logits: Tensor) -> tuple:
    """Return the functions for the forward and the backward pass.

    On a GPU, these are Triton kernels if they are allowed and can be built. Otherwise, and for
    fp64, they use ordinary PyTorch operations.
    """
    fits = _kernels_allowed and logits.is_cuda and logits.dtype != torch.float64
    if fits and importlib.util.find_spec("triton"):
        from segmentation import losses_triton
        from segmentation.build_tools import missing_build_tools

        if not missing_build_tools(gpu=True):
            return losses_triton.forward_sums, losses_triton.backward
    return forward_sums, backward


def forward_sums(logits: Tensor, targets: WeightedTargets) -> tuple[Tensor, ...]:
    """Return the sums over pixels that both losses need, and the softmax's normalisers.

    Args:
        logits: (N, C, h, w).
        targets: Class indices and weights.

    Returns:
        - Negative log-likelihood of the targets, 0-d, also weighted by `targets.class_weights`.
        - Sum of the softmax over the pixels of each class's target, (C,).
        - Number of pixels in each class's target, (C,).
        - Sum of the softmax of each class over all pixels with a target, (C,).
        - Normalisers (2, N, H, W): each pixel's largest logit, and the difference between the
          log-sum-exp and this logit. The difference is inf for pixels without a target.

        All sums are weighted by `targets.weights`. The two normalisers are stored separately,
        because their sum would round a confident softmax to exactly 1, and thus the gradient to 0.
    """
    n, c = logits.shape[:2]
    height, width = targets.indices[0].shape[1:]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    tiles = _tiles(logits, height, width, dtype)
    lse = logits.new_empty((2, n, height, width), dtype=dtype)
    nll = lse.new_zeros(n)
    # Sum within each tile and each row first, because adding a million terms one by one loses too
    # much precision in fp32.
    predicted = lse.new_zeros(len(tiles), c)
    intersection, truth = lse.new_zeros(2, height, c)
    for image in range(n):
        low = logits[image].transpose(0, 1).to(dtype)
        index, share = _labels(targets, image, dtype)
        has_target = share.sum(1) != 0
        picked = torch.empty_like(share)
        for partial, tile in zip(predicted, tiles, strict=True):
            y, x = tile.y, tile.x
            z = tile.upsample(low)
            peak = z.amax(1)
            picked[y, :, x] = z.sub_(peak[:, None]).gather(1, index[y, :, x])
            total = z.exp_().sum(1)
            lse[0, image, y, x], lse[1, image, y, x] = peak, total.log()
            # Add up the softmax of all pixels in the tile that have a target.
            partial += torch.bmm((has_target[y, x] / total)[:, None], z.transpose(1, 2)).sum((0, 1))
        log_likelihood = picked - lse[1, image, :, None]
        nll[image] = -(_by_class(share, index, targets.class_weights) * log_likelihood).sum()
        intersection.scatter_add_(1, index.flatten(1), (share * log_likelihood.exp()).flatten(1))
        truth.scatter_add_(1, index.flatten(1), share.flatten(1))
        lse[1, image].masked_fill_(~has_target, math.inf)
    return nll.sum(), intersection.sum(0), truth.sum(0), predicted.sum(0), lse


def backward(
    logits: Tensor, targets: WeightedTargets, lse: Tensor, by_sums: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Return the gradient with respect to the logits, (N, C, h, w).

    Args:
        logits: (N, C, h, w).
        targets: Class indices and weights.
        lse: Normalisers from `forward_sums`, (2, N, H, W).
        by_sums: Gradients with respect to the negative log-likelihood, 0-d, to the softmax within
            each class's target, (C,), and to the softmax of each class, (C,).
    """
    by_nll, by_intersection, by_predicted = by_sums
    height, width = lse.shape[2:]
    tiles = _tiles(logits, height, width, lse.dtype)
    grad = torch.empty_like(logits)
    for image in range(len(logits)):
        low = logits[image].transpose(0, 1).to(lse.dtype)
        grad_low = torch.zeros_like(low)
        index, share = _labels(targets, image, lse.dtype)
        slope = share * by_intersection[index]
        constant = _by_class(share, index, targets.class_weights) * by_nll
        for tile in tiles:
            y, x = tile.y, tile.x
            # At pixels without a target, lse is inf, so the softmax p is 0.
            p = tile.upsample(low)
            p.sub_(lse[0, image, y, None, x]).sub_(lse[1, image, y, None, x]).exp_()
            # Let u be p times the derivative of the loss with respect to p: `by_predicted * p` for
            # every class, plus `at_target` for the target's class. By the chain rule through the
            # softmax, the gradient with respect to the logits is u - p * sum(u).
            labels = index[y, :, x]
            at_target = p.gather(1, labels).mul_(slope[y, :, x]).sub_(constant[y, :, x])
            inner = torch.matmul(by_predicted, p) + at_target.sum(1)
            p.mul_(by_predicted[:, None] - inner[:, None])
            tile.add_adjoint(grad_low, p.scatter_add_(1, labels, at_target))
        grad[image] = grad_low.transpose(0, 1)
    return grad


def _labels(targets: WeightedTargets, image: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the class indices and weights of one image, each (H, targets, W).

    The indices and the weights are 0 for ignored pixels.
    """
    labels = [indices[image].long() for indices in targets.indices]
    ignored = targets.ignore_index
    index = [t.masked_fill(t == ignored, 0) for t in labels]
    share = [(t != ignored).to(dtype) * w for t, w in zip(labels, targets.weights, strict=True)]
    return torch.stack(index, 1), torch.stack(share, 1)


def _by_class(share: Tensor, index: Tensor, class_weights: Tensor | None) -> Tensor:
    """Return the weight of each pixel times the weight of its class."""
    return share if class_weights is None else share * class_weights[index]


class _Tile(NamedTuple):
    """A rectangle of pixels, and the two matrices that upsample the logits to this rectangle.

    The order of the axes is rows, classes, columns. With this order, upsampling and its adjoint
    each need only one product per matrix.
    """

    y: slice
    x: slice
    low_y: slice
    low_x: slice
    rows: Tensor
    columns: Tensor

    def upsample(self, low: Tensor) -> Tensor:
        """Upsample one image's logits (h, C, w) to this tile (rows, C, columns)."""
        z = self.rows @ (low[self.low_y, :, self.low_x] @ self.columns).flatten(1)
        return z.view(len(z), low.shape[1], -1)

    def add_adjoint(self, grad_low: Tensor, grad: Tensor) -> None:
        """Add the gradient of this tile (rows, C, columns) to `grad_low` (h, C, w)."""
        across = (self.rows.T @ grad.flatten(1)).view(-1, *grad.shape[1:])
        grad_low[self.low_y, :, self.low_x] += across @ self.columns.T


def _tiles(logits: Tensor, height: int, width: int, dtype: torch.dtype) -> list[_Tile]:
    """Return nearly square tiles that cover (height, width) and fit in the device's cache."""
    classes, h, w = logits.shape[1:]
    cpu = logits.device.type == "cpu"
    pixels = (CPU_TILE * torch.get_num_threads() if cpu else GPU_TILE) / classes
    # Use a multiple of 64 columns. PyTorch's reductions over classes process 64 columns at a time,
    # and any remaining columns one by one.
    columns = 64 * max(1, round(math.sqrt(pixels) / 64))
    rows = max(1, int(pixels / columns))
    down = _interpolation(h, height, rows, dtype, logits.device)
    across = _interpolation(w, width, columns, dtype, logits.device)
    return [
        _Tile(y, x, low_y, low_x, rows.T.contiguous(), columns)
        for y, low_y, rows in down
        for x, low_x, columns in across
    ]


def _interpolation(
    size: int, new_size: int, step: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[slice, slice, Tensor]]:
    """Return the weights that interpolate `size` values to `new_size` values, in pieces of `step`.

    Each piece consists of an output slice, an input slice, and the matrix that maps that input to
    that output. The matrices are obtained by applying `F.interpolate` to an identity matrix, so
    they have the same rounding.
    """
    identity = torch.eye(size, dtype=dtype, device=device)
    matrix = F.interpolate(identity[None], new_size, mode="linear", align_corners=False)[0]
    pieces = []
    for start in range(0, new_size, step):
        stop = min(start + step, new_size)
        first = math.floor((start + 0.5) * size / new_size - 0.5 - 1e-3)
        last = math.floor((stop - 0.5) * size / new_size - 0.5 + 1e-3) + 1
        low = slice(max(first, 0), min(last, size - 1) + 1)
        pieces.append((slice(start, stop), low, matrix[low, start:stop].contiguous()))
    return pieces
