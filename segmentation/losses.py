"""Cross entropy and Dice in one pass over logits of any resolution.

At 150 classes and 512 px the logits of one image take 157 MB in fp32, and cross entropy and Dice
written with ordinary tensor operations hold a dozen such tensors for every image of a batch:
upsampled logits, softmax, one-hot targets, their products and the gradients of them all. Here the
logits stay at the network's resolution. One tile of pixels after the other is upsampled, used and
forgotten while it is still in the cache: once in the forward pass, for the sums over pixels both
losses are made of, and once in the backward pass, for the gradient, which returns to the network's
resolution by the adjoint of the upsampling.
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

EPSILON = 1e-5  # composer.loss.DiceLoss's
# Elements of a tile. On a CPU, per thread, 1 MiB in fp32: within the L2 cache of current servers.
# On a GPU, where it is the number of launches that costs, 128 MiB.
CPU_TILE = 2**18
GPU_TILE = 2**25


_kernels_allowed = True


@contextmanager
def fused_kernels(allowed: bool) -> Iterator[None]:
    """Allow or rule out the Triton kernels for losses computed inside, and for their gradients.

    Without the kernels, PyTorch's operations compute the same loss.
    """
    global _kernels_allowed
    before, _kernels_allowed = _kernels_allowed, allowed
    try:
        yield
    finally:
        _kernels_allowed = before


class MixedTarget(NamedTuple):
    """The target of photos blended in pairs.

    It stands for `(1 - mixing) * onehot(target) + mixing * onehot(permuted)`.

    Args:
        target: class indices of the first photo of each pair, (N, H, W).
        permuted: class indices of the second, (N, H, W).
        mixing: weight of the second, 0 to 1.
    """

    target: Tensor
    permuted: Tensor
    mixing: float


def segmentation_loss(
    logits: Tensor,
    target: Tensor | MixedTarget,
    *,
    ignore_index: int = -1,
    cross_entropy_weight: float = 0.375,
    dice_weight: float = 1.125,
    class_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Weighted sum of cross entropy and Dice loss on bilinearly upsampled logits.

    Equal, in value and gradient, to Composer's `soft_cross_entropy(ignore_index)` and
    `DiceLoss(softmax=True, batch=True, ignore_absent_classes=True)` on `F.interpolate(logits,
    size, mode='bilinear', align_corners=False)`; of a mixed target, to theirs of its dense one-hot
    mixture. Where every pixel is ignored, the loss and its gradient are 0 (Composer's are nan). On
    a GPU it runs as two Triton kernels, unless `fused_kernels(False)` rules them out.

    Args:
        logits: (N, C, h, w) of at least two classes, floating point, any memory format. Everything
            is computed and accumulated in fp32 (fp64 for fp64 logits), under autocast as well.
        target: class indices (N, H, W) of an integer type, each in [0, C) or `ignore_index`, or
            a `MixedTarget`.
        ignore_index: the index of pixels without a class.
        cross_entropy_weight: weight of the cross entropy, a mean over pixels.
        dice_weight: weight of the Dice loss, a mean over the classes in the batch's target.
        class_weights: (C,) weights of both means: of pixels by their class, as in PyTorch's
            `F.cross_entropy(weight=...)`, and of classes. None: all the same.

    Returns:
        `cross_entropy`, `dice` and their weighted sum `total`, each 0-d. A part of weight 0
        is left out.

    Raises:
        ValueError: shapes or types that do not fit together.
        RuntimeError: a class index out of range, on a CPU. On a GPU, where finding out would mean
            waiting for the device, the cross entropy is nan.
    """
    if isinstance(target, MixedTarget):
        pair = ((target.target, 1 - target.mixing), (target.permuted, target.mixing))
        targets, weights = zip(*[(t, weight) for t, weight in pair if weight], strict=True)
    else:
        targets, weights = (target,), (1.0,)
    for t in targets:
        shapes = logits.ndim == 4 and logits.shape[1] > 1 and t.ndim == 3 and len(t) == len(logits)
        if not shapes or t.is_floating_point() or t.shape != targets[0].shape:
            raise ValueError(
                "segmentation_loss takes logits (N, C, h, w) of two classes or more and integer "
                f"targets (N, H, W), not {tuple(logits.shape)} and {tuple(t.shape)} {t.dtype}"
            )
    if class_weights is not None and class_weights.shape != logits.shape[1:2]:
        raise ValueError(f"{class_weights.numel()} class_weights for {logits.shape[1]} classes")
    losses = _SegmentationLoss.apply(logits, weights, class_weights, ignore_index, *targets)
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
    """Cross entropy and Dice of logits (N, C, h, w) and one or two weighted targets (N, H, W)."""

    @staticmethod
    def forward(ctx, logits, weights, class_weights, ignore_index, *targets):
        # The backward pass runs later, perhaps outside of `fused_kernels`.
        forward_sums, ctx.backward_pass = _implementation(logits)
        with torch.autocast(logits.device.type, enabled=False):
            if class_weights is not None:
                dtype = torch.promote_types(logits.dtype, torch.float32)
                class_weights = class_weights.to(logits.device, dtype)
            nll, intersection, truth, predicted, lse = forward_sums(
                logits, targets, weights, class_weights, ignore_index
            )
            tiny = torch.finfo(truth.dtype).tiny
            present = truth > 0
            if class_weights is None:
                pixels, classes = truth.sum().clamp(min=tiny), present.sum().clamp(min=1)
            else:  # from here on `present` weighs the classes that are
                pixels, present = truth @ class_weights, present * class_weights
                pixels, classes = pixels.clamp(min=tiny), present.sum().clamp(min=tiny)
            union = truth + predicted + EPSILON
            overlap = (2 * intersection + EPSILON) / union
            dice = ((1 - overlap) * present).sum() / classes
            # Derivatives of Dice by two of the sums over pixels, per class.
            by_intersection = -2 * present / union / classes
            by_predicted = overlap * present / union / classes
        ctx.save_for_backward(
            logits, lse, pixels, by_intersection, by_predicted, class_weights, *targets
        )
        ctx.weights, ctx.ignore_index = weights, ignore_index
        return nll / pixels, dice

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_cross_entropy, grad_dice):
        logits, lse, pixels, by_intersection, by_predicted, class_weights, *targets = (
            ctx.saved_tensors
        )
        with torch.autocast(logits.device.type, enabled=False):
            grad = ctx.backward_pass(
                logits,
                targets,
                ctx.weights,
                class_weights,
                ctx.ignore_index,
                lse,
                grad_cross_entropy / pixels,
                grad_dice * by_intersection,
                grad_dice * by_predicted,
            )
        return grad, None, None, None, *[None] * len(targets)


def _implementation(logits: Tensor) -> tuple:
    """Return the two passes: Triton's on a GPU if allowed, PyTorch's elsewhere and for fp64."""
    fits = _kernels_allowed and logits.is_cuda and logits.dtype != torch.float64
    if fits and importlib.util.find_spec("triton"):
        from segmentation import losses_triton
        from segmentation.build_tools import missing_build_tools

        if not missing_build_tools(gpu=True):
            return losses_triton.forward_sums, losses_triton.backward
    return forward_sums, backward


def forward_sums(
    logits: Tensor,
    targets: Sequence[Tensor],
    weights: Sequence[float],
    class_weights: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the sums over pixels that both losses are made of, and the softmax's normalisers.

    Returns:
        The targets' negative log likelihood, 0-d, by `class_weights` too; per class (C,) the
        softmax within the targets, the targets' size and the softmax within pixels that have a
        target, all weighted by `weights`; and of
        each pixel (2, N, H, W) the largest logit and how far the log-sum-exp of all is above it,
        inf where there is no target. (In their sum the little that a sure pixel's softmax is below
        1, and with it its gradient, would be lost to rounding.)
    """
    n, c = logits.shape[:2]
    height, width = targets[0].shape[1:]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    tiles = _tiles(logits, height, width, dtype)
    lse = logits.new_empty((2, n, height, width), dtype=dtype)
    nll = lse.new_zeros(n)
    # By tile and by row first: one after the other, a million terms are too many for fp32.
    predicted = lse.new_zeros(len(tiles), c)
    intersection, truth = lse.new_zeros(2, height, c)
    for image in range(n):
        low = logits[image].transpose(0, 1).to(dtype)
        index, share = _labels([t[image] for t in targets], weights, ignore_index, dtype)
        has_target = share.sum(1) != 0
        picked = torch.empty_like(share)
        for partial, tile in zip(predicted, tiles, strict=True):
            y, x = tile.y, tile.x
            z = tile.upsample(low)
            peak = z.amax(1)
            picked[y, :, x] = z.sub_(peak[:, None]).gather(1, index[y, :, x])
            total = z.exp_().sum(1)
            lse[0, image, y, x], lse[1, image, y, x] = peak, total.log()
            # exp(z) / total summed over the columns and then the rows that have a target.
            partial += torch.bmm((has_target[y, x] / total)[:, None], z.transpose(1, 2)).sum((0, 1))
        log_likelihood = picked - lse[1, image, :, None]
        nll[image] = -(_by_class(share, index, class_weights) * log_likelihood).sum()
        intersection.scatter_add_(1, index.flatten(1), (share * log_likelihood.exp()).flatten(1))
        truth.scatter_add_(1, index.flatten(1), share.flatten(1))
        lse[1, image].masked_fill_(~has_target, math.inf)
    return nll.sum(), intersection.sum(0), truth.sum(0), predicted.sum(0), lse


def backward(
    logits: Tensor,
    targets: Sequence[Tensor],
    weights: Sequence[float],
    class_weights: Tensor | None,
    ignore_index: int,
    lse: Tensor,
    by_nll: Tensor,
    by_intersection: Tensor,
    by_predicted: Tensor,
) -> Tensor:
    """Return the gradient by the logits (N, C, h, w), given those by the sums of `forward_sums`."""
    height, width = lse.shape[2:]
    tiles = _tiles(logits, height, width, lse.dtype)
    grad = torch.empty_like(logits)
    for image in range(len(logits)):
        low = logits[image].transpose(0, 1).to(lse.dtype)
        grad_low = torch.zeros_like(low)
        index, share = _labels([t[image] for t in targets], weights, ignore_index, lse.dtype)
        slope = share * by_intersection[index]
        constant = _by_class(share, index, class_weights) * by_nll
        for tile in tiles:
            y, x = tile.y, tile.x
            # The softmax p; 0 without a target, where lse is inf.
            p = tile.upsample(low)
            p.sub_(lse[0, image, y, None, x]).sub_(lse[1, image, y, None, x]).exp_()
            # Let u = p * (derivative by p): `by_predicted` of all classes and `at_target` of the
            # target's. Through the softmax, the gradient is u - p * sum(u).
            labels = index[y, :, x]
            at_target = p.gather(1, labels).mul_(slope[y, :, x]).sub_(constant[y, :, x])
            inner = torch.matmul(by_predicted, p) + at_target.sum(1)
            p.mul_(by_predicted[:, None] - inner[:, None])
            tile.add_adjoint(grad_low, p.scatter_add_(1, labels, at_target))
        grad[image] = grad_low.transpose(0, 1)
    return grad


def _labels(
    targets: list[Tensor], weights: Sequence[float], ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One image's class indices and weights, both 0 where ignored, each (H, targets, W)."""
    targets = [t.long() for t in targets]
    index = [t.masked_fill(t == ignore_index, 0) for t in targets]
    share = [(t != ignore_index).to(dtype) * w for t, w in zip(targets, weights, strict=True)]
    return torch.stack(index, 1), torch.stack(share, 1)


def _by_class(share: Tensor, index: Tensor, class_weights: Tensor | None) -> Tensor:
    """Pixels' weights times those of their classes."""
    return share if class_weights is None else share * class_weights[index]


class _Tile(NamedTuple):
    """A rectangle of pixels, and the two matrices that bilinear upsampling to it consists of.

    Kept as rows x classes x columns, images take a matrix product for each and for its adjoint.
    """

    y: slice
    x: slice
    low_y: slice
    low_x: slice
    rows: Tensor
    columns: Tensor

    def upsample(self, low: Tensor) -> Tensor:
        """Upsample this tile (rows, C, columns) of one image's logits (h, C, w)."""
        z = self.rows @ (low[self.low_y, :, self.low_x] @ self.columns).flatten(1)
        return z.view(len(z), low.shape[1], -1)

    def add_adjoint(self, grad_low: Tensor, grad: Tensor) -> None:
        """Add to `grad_low` (h, C, w) the gradient by this tile (rows, C, columns)."""
        across = (self.rows.T @ grad.flatten(1)).view(-1, *grad.shape[1:])
        grad_low[self.low_y, :, self.low_x] += across @ self.columns.T


def _tiles(logits: Tensor, height: int, width: int, dtype: torch.dtype) -> list[_Tile]:
    """Tiles that cover (height, width), about square, of a size for the device's cache."""
    classes, h, w = logits.shape[1:]
    cpu = logits.device.type == "cpu"
    pixels = (CPU_TILE * torch.get_num_threads() if cpu else GPU_TILE) / classes
    # PyTorch's reductions over classes take 64 columns at a time, and the rest one by one.
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
    """Linear interpolation of `size` positions to `new_size`, in pieces of `step`.

    Each piece is where to, where from, and the matrix that leads there. The matrices are what
    `F.interpolate` makes of the identity, so that its roundings are ours.
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
