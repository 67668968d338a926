"""Tests of segmentation/losses.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from segmentation import losses
from segmentation.losses import MixedTarget, segmentation_loss
from tests.support.losses import assert_gradients_close, gradient, make, make_weights

# Shapes (N, C, h, w) of logits and (H, W) of targets. They cover strides 4 and 8, several tiles,
# and targets of equal size, of a size that is not a multiple, and of smaller size.
SHAPES = [
    ((2, 7, 8, 6), (32, 24)),
    ((1, 150, 16, 20), (64, 80)),
    ((1, 5, 3, 9), (24, 72)),
    ((3, 21, 40, 9), (160, 36)),
    ((2, 4, 6, 6), (6, 6)),
    ((2, 5, 9, 7), (33, 20)),
    ((1, 4, 12, 10), (7, 5)),
    ((2, 5, 1, 1), (5, 7)),
]


def composer_loss(logits: Tensor, target: Tensor | MixedTarget, size: tuple) -> dict[str, Tensor]:
    """Return Composer's losses of the upsampled logits; mixed targets become dense targets."""
    from composer.loss import DiceLoss, soft_cross_entropy
    from composer.loss.utils import ensure_targets_one_hot

    z = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    if isinstance(target, MixedTarget):
        first = ensure_targets_one_hot(z, target.target).to(z.dtype)
        second = ensure_targets_one_hot(z, target.permuted).to(z.dtype)
        target = (1 - target.mixing) * first + target.mixing * second
    cross_entropy = soft_cross_entropy(z, target, ignore_index=-1)
    dice = DiceLoss(softmax=True, batch=True, ignore_absent_classes=True)(z, target)
    total = 0.375 * cross_entropy + 1.125 * dice
    return {"cross_entropy": cross_entropy, "dice": dice, "total": total}


@pytest.mark.filterwarnings("ignore::UserWarning:composer")
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_loss_matches_composer(shape: tuple, size: tuple, mixed: bool):
    logits, target = make(shape, size, mixed)
    exact = logits.detach().double().requires_grad_()  # Composer's rounding errors reach 4e-5
    expected = composer_loss(exact, target, size)
    actual = segmentation_loss(logits, target)
    assert list(actual) == ["cross_entropy", "dice", "total"]
    for name, value in actual.items():
        assert value.shape == () and value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name].float(), rtol=1e-5, atol=0)
        # Each part has its own gradient, scaled by the incoming gradient.
        wanted = gradient(1000 * expected[name], exact).float()
        assert_gradients_close(gradient(1000 * value, logits), wanted)


@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_class_weights_match_pytorch(shape: tuple, size: tuple):
    logits, target = make(shape, size)
    weights = make_weights(shape[1])
    exact = logits.detach().double().requires_grad_()
    z = F.interpolate(exact, size, mode="bilinear", align_corners=False)
    expected = F.cross_entropy(z, target, weights.double(), ignore_index=-1)
    actual = segmentation_loss(logits, target, class_weights=weights)
    torch.testing.assert_close(actual["cross_entropy"], expected.float(), rtol=1e-5, atol=0)
    wanted = gradient(expected, exact).float()
    assert_gradients_close(gradient(actual["cross_entropy"], logits), wanted)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("shape", "size"), SHAPES[:3])
def test_class_weights_match_a_reference_with_dense_targets(shape: tuple, size: tuple, mixed: bool):
    """Dice is the weighted mean over classes; each part of a mixed target keeps its weight."""
    logits, target = make(shape, size, mixed)
    weights = make_weights(shape[1]).double()
    exact = logits.detach().double().requires_grad_()
    parts = [(target, 1.0)]
    if isinstance(target, MixedTarget):
        parts = [(target.target, 1 - target.mixing), (target.permuted, target.mixing)]
    dense = torch.zeros(len(logits), shape[1] + 1, *size, dtype=torch.float64)
    for part, share in parts:
        part = part.masked_fill(part == -1, shape[1])[:, None]
        dense.scatter_add_(1, part, torch.full_like(part, share, dtype=torch.float64))
    dense = dense[:, :-1]
    z = F.interpolate(exact, size, mode="bilinear", align_corners=False)
    weighted = dense * weights[:, None, None]
    cross_entropy = -(weighted * z.log_softmax(1)).sum() / weighted.sum()
    p = z.softmax(1) * (dense.sum(1, keepdim=True) > 0)
    sums = [(a.sum((0, 2, 3))) for a in (dense * p, dense, p)]
    dice = 1 - (2 * sums[0] + losses.EPSILON) / (sums[1] + sums[2] + losses.EPSILON)
    present = weights * (sums[1] > 0)
    expected = {"cross_entropy": cross_entropy, "dice": (present * dice).sum() / present.sum()}
    actual = segmentation_loss(logits, target, class_weights=weights)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value.float(), rtol=1e-5, atol=0)
        wanted = gradient(value, exact).float()
        assert_gradients_close(gradient(actual[name], logits), wanted)


def test_equal_class_weights_do_not_change_the_loss():
    logits, target = make((2, 5, 4, 4), (16, 16))
    unweighted = segmentation_loss(logits, target)
    weighted = segmentation_loss(logits, target, class_weights=torch.full((5,), 7.0))
    torch.testing.assert_close(weighted, unweighted)
    wanted = gradient(unweighted["total"], logits)
    assert_gradients_close(gradient(weighted["total"], logits), wanted)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_loss_gradients_pass_gradcheck(mixed: bool, weighted: bool):
    logits, target = make((2, 3, 3, 4), (9, 10), mixed)
    logits = logits.detach().double().requires_grad_()
    weights = make_weights(3).double() if weighted else None

    def parts(logits: Tensor) -> tuple[Tensor, ...]:
        return tuple(segmentation_loss(logits, target, class_weights=weights).values())

    assert torch.autograd.gradcheck(parts, logits)


def test_loss_does_not_depend_on_the_tile_size(monkeypatch: pytest.MonkeyPatch):
    logits, target = make((1, 3, 40, 50), (150, 200))
    logits = logits.detach().double().requires_grad_()
    untiled = segmentation_loss(logits, target)["total"]
    expected = gradient(untiled, logits)
    monkeypatch.setattr(losses, "CPU_TILE", 3 * 64 * 7)
    tiled = segmentation_loss(logits, target)["total"]
    torch.testing.assert_close(tiled, untiled)
    torch.testing.assert_close(gradient(tiled, logits), expected)


@pytest.mark.parametrize("mixing", [0.0, 1.0])
def test_mixed_target_with_weight_0_is_ignored(mixing: float):
    logits, (first, second, _) = make((2, 5, 4, 4), (16, 16), mixed=True)
    mixed = segmentation_loss(logits, MixedTarget(first, second, mixing))
    alone = segmentation_loss(logits, second if mixing else first)
    assert mixed == alone


@pytest.mark.parametrize("mixed", [False, True])
def test_loss_and_gradient_of_ignored_pixels_are_0(mixed: bool):
    logits, target = make((2, 5, 4, 4), (16, 16))
    target.fill_(-1)
    target = MixedTarget(target, target, 0.5) if mixed else target
    loss = segmentation_loss(logits, target)
    assert [value.item() for value in loss.values()] == [0, 0, 0]
    assert torch.equal(gradient(loss["total"], logits), torch.zeros_like(logits))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_loss_accepts_target_dtypes_and_an_ignore_index(dtype: torch.dtype):
    logits, target = make((2, 5, 4, 4), (16, 16))
    expected = segmentation_loss(logits, target)
    other = target.masked_fill(target == -1, 200).to(dtype)
    assert segmentation_loss(logits, other, ignore_index=200) == expected


def test_loss_gradient_keeps_the_memory_format_of_the_logits():
    logits, target = make((2, 5, 4, 6), (16, 24))
    last = logits.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    expected, actual = segmentation_loss(logits, target), segmentation_loss(last, target)
    torch.testing.assert_close(actual, expected)
    result = gradient(actual["total"], last)
    torch.testing.assert_close(result, gradient(expected["total"], logits))
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_accumulate_in_fp32(dtype: torch.dtype):
    logits, target = make((2, 9, 8, 8), (32, 32))
    half = logits.detach().to(dtype).requires_grad_()
    same = half.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        actual = segmentation_loss(half, target)
        result = gradient(actual["total"], half)
    expected = segmentation_loss(same, target)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    # Only the final gradient is rounded to half precision.
    wanted = gradient(expected["total"], same).to(dtype)
    assert_gradients_close(result, wanted, torch.finfo(dtype).eps)


def test_loss_weights_scale_cross_entropy_and_dice():
    logits, target = make((1, 5, 4, 4), (16, 16))
    both = segmentation_loss(logits, target, cross_entropy_weight=2.0, dice_weight=3.0)
    torch.testing.assert_close(both["total"], 2 * both["cross_entropy"] + 3 * both["dice"])
    only = segmentation_loss(logits, target, cross_entropy_weight=0.0, dice_weight=1.0)
    assert only == {"dice": both["dice"], "total": both["dice"]}
    only = segmentation_loss(logits, target, cross_entropy_weight=1.0, dice_weight=0.0)
    assert only == {"cross_entropy": both["cross_entropy"], "total": both["cross_entropy"]}


@pytest.mark.filterwarnings("ignore::UserWarning:composer")
def test_extreme_logits_stay_finite():
    logits, target = make((1, 4, 4, 4), (16, 16))
    logits = (1000 * logits.detach()).requires_grad_()
    expected = composer_loss(logits, target, (16, 16))["total"]
    actual = segmentation_loss(logits, target)["total"]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    assert_gradients_close(gradient(actual, logits), gradient(expected, logits))


def test_loss_rejects_invalid_shapes_and_weights():
    logits, target = make((2, 5, 4, 4), (16, 16))
    for bad in (target[0], target.float(), target[:1], F.one_hot(target + 1)):
        with pytest.raises(ValueError, match=r"got logits of shape .* expected logits"):
            segmentation_loss(logits, bad)
    with pytest.raises(ValueError, match=r"got logits of shape .* expected logits"):
        segmentation_loss(logits[:, :1], target)
    with pytest.raises(RuntimeError, match="index"):
        segmentation_loss(logits, target + 5)
    with pytest.raises(ValueError, match="4 class_weights for 5 classes"):
        segmentation_loss(logits, target, class_weights=torch.ones(4))


class LargestFloat(TorchDispatchMode):
    """A dispatch mode that records the largest floating-point storage of any operation."""

    elements = 0

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and value.is_floating_point():
                size = value.untyped_storage().nbytes() // value.element_size()
                self.elements = max(self.elements, size)
        return result


@pytest.mark.parametrize("mixed", [False, True])
def test_loss_allocates_no_tensor_of_the_upsampled_size(
    mixed: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(losses, "CPU_TILE", 2**14)
    logits, target = make((4, 64, 32, 32), (128, 128), mixed)
    with LargestFloat() as largest:
        gradient(segmentation_loss(logits, target)["total"], logits)
    # The largest tensor is the gradient of the logits, 1/16 of the upsampled logits.
    assert largest.elements == logits.numel()


def test_loss_saves_two_numbers_per_pixel_for_the_backward_pass():
    logits, target = make((2, 30, 16, 16), (64, 64))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        segmentation_loss(logits, target)
    floats = [t for t in saved if t.is_floating_point() and t.data_ptr() != logits.data_ptr()]
    assert sum(t.numel() for t in floats) <= 2 * target.numel() + 3 * 30
