"""Cross entropy and Dice in one pass over logits of any resolution.

At 150 classes and 512 px the logits of one image take 157 MB in fp32, and cross entropy plus Dice written with ordinary
tensor operations hold a dozen such tensors for every image of a batch: upsampled logits, softmax, one-hot targets, their
products and the gradients of them all. Here the logits stay at the network's resolution. A stripe of rows is upsampled,
used and overwritten by the next, once in the forward pass for the sums both losses need and once in the backward pass
for the gradient, which returns to the network's resolution by the adjoint of the upsampling.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EPSILON = 1e-5  # of composer.loss.DiceLoss


class MixedTarget(NamedTuple):
    """The target of photos blended in pairs: ``(1 - mixing) * onehot(target) + mixing * onehot(permuted)``.

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
) -> dict[str, Tensor]:
    """Weighted sum of cross entropy and Dice loss on bilinearly upsampled logits.

    Equal, in value and gradient, to Composer's ``soft_cross_entropy(ignore_index)`` and ``DiceLoss(softmax=True,
    batch=True, ignore_absent_classes=True)`` on ``F.interpolate(logits, size, mode='bilinear', align_corners=False)``,
    with a mixed target given to them as dense one-hot mixture. Where every pixel is ignored the loss and its gradient
    are 0 (Composer: nan).

    Args:
        logits: (N, C, h, w), floating point, any memory format. Everything is computed and accumulated in fp32 (fp64
            for fp64 logits), under autocast as well.
        target: class indices (N, H, W) of an integer type, each in [0, C) or ``ignore_index``, or a `MixedTarget`.
        ignore_index: the index of pixels without a class.
        cross_entropy_weight: weight of the cross entropy, averaged over pixels.
        dice_weight: weight of the Dice loss, averaged over the classes present in the batch's target.

    Returns:
        ``cross_entropy``, ``dice`` and their weighted sum ``total``, each 0-d. A part of weight 0 is left out.

    Raises:
        ValueError: shapes or types that do not fit together.
    """
    if isinstance(target, MixedTarget):
        candidates = [(target.target, 1 - target.mixing), (target.permuted, target.mixing)]
    else:
        candidates = [(target, 1.0)]
    targets, weights = zip(*[(t, w) for t, w in candidates if w != 0], strict=True)
    for t in targets:
        if logits.ndim != 4 or t.ndim != 3 or len(t) != len(logits) or t.is_floating_point():
            raise ValueError(
                "segmentation_loss takes logits (N, C, h, w) and an integer target (N, H, W), "
                f"not {tuple(logits.shape)} and {tuple(t.shape)} of {t.dtype}"
            )
    cross_entropy, dice = _SegmentationLoss.apply(logits, weights, ignore_index, *targets)
    parts = {}
    total = cross_entropy.new_zeros(())
    for name, value, weight in (
        ("cross_entropy", cross_entropy, cross_entropy_weight),
        ("dice", dice, dice_weight),
    ):
        if weight:
            parts[name] = value
            total = total + weight * value
    return parts | {"total": total}


class _SegmentationLoss(torch.autograd.Function):
    """Cross entropy and Dice of logits (N, C, h, w) and one or two weighted index targets (N, H, W)."""

    @staticmethod
    def forward(ctx, logits, weights, ignore_index, *targets):
        with torch.autocast(logits.device.type, enabled=False):
            sums = _forward_sums(logits, targets, weights, ignore_index)
            nll, pixels, intersection, truth, predicted, lse = sums
            present = truth > 0
            classes = present.sum().clamp(min=1)
            union = truth + predicted + EPSILON
            overlap = (2 * intersection + EPSILON) / union
            dice = ((1 - overlap) * present).sum() / classes
            pixels = pixels.clamp(min=torch.finfo(pixels.dtype).tiny)
            # The derivatives of Dice by the intersection and by the prediction's size, per class.
            by_intersection = -2 * present / union / classes
            by_predicted = overlap * present / union / classes
        ctx.save_for_backward(logits, lse, pixels, by_intersection, by_predicted, *targets)
        ctx.weights, ctx.ignore_index = weights, ignore_index
        return nll / pixels, dice

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_cross_entropy, grad_dice):
        logits, lse, pixels, by_intersection, by_predicted, *targets = ctx.saved_tensors
        with torch.autocast(logits.device.type, enabled=False):
            grad = _backward(
                logits,
                targets,
                ctx.weights,
                ctx.ignore_index,
                lse,
                grad_cross_entropy / pixels,
                grad_dice * by_intersection,
                grad_dice * by_predicted,
            )
        return grad, None, None, *[None] * len(targets)


def _forward_sums(logits, targets, weights, ignore_index):
    """The sums over pixels that both losses are made of, and what the backward pass needs of the softmax.

    Returns:
        negative log likelihood (0-d) and its number of pixels (0-d), both weighted; per class (C,) the intersection
        of softmax and target, the target's size and the softmax's size over pixels with a target; log-sum-exp of the
        logits per pixel (N, H, W), inf where there is no target.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    n, c = logits.shape[:2]
    height, width = targets[0].shape[1:]
    columns, stripes = _resampling(logits, height, width, dtype)
    lse = logits.new_empty((n, height, width), dtype=dtype)
    sums = logits.new_zeros((3, n, height, c), dtype=dtype)
    intersection, truth, predicted = sums
    nll = logits.new_zeros((n, height), dtype=dtype)
    for image in range(n):
        rows_hcw = logits[image].transpose(0, 1).to(dtype) @ columns
        for y, low, vertical in stripes:
            z = (vertical @ rows_hcw[low].flatten(1)).view(-1, c, width)
            labels = [
                _labels(t[image, y], w, ignore_index, dtype)
                for t, w in zip(targets, weights, strict=True)
            ]
            picked = [z.gather(1, index[:, None])[:, 0] for index, _ in labels]
            peak = z.amax(1)
            z.sub_(peak[:, None]).exp_()
            total = z.sum(1)
            log_total = peak + total.log()
            mask = torch.stack([share for _, share in labels]).sum(0) != 0
            predicted[image, y] = torch.bmm(z, (mask / total)[:, :, None])[:, :, 0]
            for (index, share), z_target in zip(labels, picked, strict=True):
                nll[image, y] += (share * (log_total - z_target)).sum(1)
                intersection[image, y].scatter_add_(1, index, share * (z_target - log_total).exp())
                truth[image, y].scatter_add_(1, index, share)
            lse[image, y] = log_total.masked_fill(~mask, math.inf)
    intersection, truth, predicted = sums.sum((1, 2))
    return nll.sum(), truth.sum(), intersection, truth, predicted, lse


def _backward(logits, targets, weights, ignore_index, lse, by_nll, by_intersection, by_predicted):
    """The gradient by the logits, from those of the losses by the sums of `_forward_sums`."""
    dtype = lse.dtype
    c = logits.shape[1]
    height, width = lse.shape[1:]
    columns, stripes = _resampling(logits, height, width, dtype)
    grad = torch.empty_like(logits)
    for image in range(len(logits)):
        rows_hcw = logits[image].transpose(0, 1).to(dtype) @ columns
        grad_hcw = torch.zeros_like(rows_hcw)
        for y, low, vertical in stripes:
            p = (vertical @ rows_hcw[low].flatten(1)).view(-1, c, width)
            p.sub_(
                lse[image, y][:, None]
            ).exp_()  # the softmax; 0 in pixels without a target, whose lse is inf
            labels = [
                _labels(t[image, y], w, ignore_index, dtype)
                for t, w in zip(targets, weights, strict=True)
            ]
            # With q the derivative by the softmax p, the softmax's own derivative makes it p * (q - sum(p * q)).
            # q is by_predicted plus, in the target's class, by_intersection.
            inner = torch.matmul(by_predicted, p)
            extras = []
            for index, share in labels:
                extra = share * by_intersection[index] * p.gather(1, index[:, None])[:, 0]
                inner += extra - share * by_nll
                extras.append(extra - share * by_nll)
            p.mul_(by_predicted[:, None] - inner[:, None])
            for (index, _), extra in zip(labels, extras, strict=True):
                p.scatter_add_(1, index[:, None], extra[:, None])
            grad_hcw[low].flatten(1).addmm_(vertical.T, p.flatten(1))
        grad[image] = (grad_hcw @ columns.T).transpose(0, 1)
    return grad


def _labels(target, weight, ignore_index, dtype):
    """Class indices to gather with (0 where ignored) and their share of each pixel (0 where ignored)."""
    ignored = target == ignore_index
    share = (~ignored).to(dtype) * weight
    return target.long().masked_fill(ignored, 0), share


def _resampling(logits, height, width, dtype, stripe=4):
    """Bilinear upsampling as two matrices: (w, width) for columns, and per stripe of rows the one for its rows.

    They are `F.interpolate`'s own response to an identity matrix, so its rounding of positions is theirs.
    """
    h, w = logits.shape[2:]

    def matrix(size, new_size):
        eye = torch.eye(size, dtype=dtype, device=logits.device)
        return F.interpolate(eye[None], new_size, mode="linear", align_corners=False)[0]

    rows = matrix(h, height).T
    stripes = []
    for top in range(0, height, stripe):
        bottom = min(top + stripe, height)
        first = max(0, math.floor((top + 0.5) * h / height - 0.5 - 1e-3))
        last = min(h, math.floor((bottom - 0.5) * h / height - 0.5 + 1e-3) + 2)
        low = slice(first, max(last, first + 1))
        stripes.append((slice(top, bottom), low, rows[top:bottom, low].contiguous()))
    return matrix(w, width), stripes
