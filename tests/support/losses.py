"""Random logits, targets and class weights for losses, and a comparison of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from segmentation.losses import MixedTarget


def make(shape: tuple, size: tuple, mixed: bool = False, absent: int = 1, seed: int = 0) -> tuple:
    """Return logits and a target that has ignored pixels and lacks the last `absent` classes."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(shape, generator=generator)).requires_grad_()
    first, second = torch.randint(
        -1, max(shape[1] - absent, 1), (2, len(logits), *size), generator=generator
    )
    first[..., 0] = second[
        ..., :1, 0
    ] = -1  # some pixels are ignored in the first, the second or both targets
    return logits, MixedTarget(first, second, 0.3) if mixed else first


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss, logits, retain_graph=True)
    return result


def assert_gradients_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    scale = expected.abs().max()
    assert scale > 0
    assert (actual.double() - expected.double()).abs().max() <= tolerance * scale


def make_weights(classes: int, seed: int = 3) -> Tensor:
    """Return random class weights from 0.1 to 5."""
    return 0.1 + 4.9 * torch.rand(classes, generator=torch.Generator().manual_seed(seed))
