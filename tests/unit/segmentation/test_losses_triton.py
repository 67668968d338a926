"""Tests of segmentation/losses_triton.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from segmentation import losses
from segmentation.losses import MixedTarget, segmentation_loss
from tests.support.losses import assert_gradients_close, gradient, make, make_weights
from tests.support.paths import ROOT


def run_triton(device: str, **environment: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, __file__, device]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    torch.__version__.startswith("2.7."), reason="Triton 3.3's interpreter fails with NumPy 2.5"
)
def test_triton_kernels_match_pytorch_in_the_interpreter():
    run_triton("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_kernels_match_pytorch_on_a_gpu():
    run_triton("cuda", TRITON_INTERPRET="0")


def compare_triton(device: str) -> None:
    """Compare loss and gradient of the kernels with those of PyTorch, case by case."""
    from segmentation import losses_triton

    cases = [
        ((1, 7, 3, 2), (6, 4), False, torch.float32),
        ((1, 150, 2, 2), (4, 4), True, torch.float32),
        ((2, 5, 3, 2), (7, 5), True, torch.float32),
        ((1, 4, 5, 4), (3, 3), True, torch.float32),
        ((1, 2, 3, 3), (3, 3), False, torch.float32),
        ((1, 3, 1, 2), (2, 13), False, torch.float32),
        ((1, 9, 2, 2), (4, 8), True, torch.bfloat16),
    ]
    weighted = [
        ((1, 7, 3, 2), (6, 4), False, torch.float32),
        ((2, 5, 2, 2), (3, 5), True, torch.float32),
        ((1, 9, 2, 2), (4, 8), True, torch.bfloat16),
    ]
    all_cases = [(*case, False) for case in cases] + [(*case, True) for case in weighted]
    for shape, size, mixed, dtype, is_weighted in all_cases:
        logits, target = make(shape, size, mixed)
        weights = make_weights(shape[1]).to(device) if is_weighted else None
        logits = logits.detach().to(device, dtype, memory_format=torch.channels_last)
        logits.requires_grad_()
        target = MixedTarget(*(t.to(device) for t in target[:2]), 0.3) if mixed else target
        target = target if mixed else target.int().to(device)
        losses._implementation = lambda _: (losses.forward_sums, losses.backward)
        expected = segmentation_loss(logits, target, class_weights=weights)
        wanted = gradient(expected["total"], logits)
        losses._implementation = lambda _: (losses_triton.forward_sums, losses_triton.backward)
        actual = segmentation_loss(logits, target, class_weights=weights)
        result = gradient(actual["total"], logits)
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0)
        half = torch.finfo(dtype).eps  # the interpreter truncates, a GPU rounds
        assert_gradients_close(result, wanted, 2e-6 if dtype == torch.float32 else half)
        if device == "cuda":  # deterministic
            assert torch.equal(gradient(actual["total"], logits), result)
    logits, target = make((1, 3, 2, 2), (4, 4))
    logits, target = logits.detach().to(device).requires_grad_(), target.to(device)
    ignored = segmentation_loss(logits, torch.full_like(target, -1))
    assert [value.item() for value in ignored.values()] == [0, 0, 0]
    assert not gradient(ignored["total"], logits).any()
    for weights in (None, torch.ones(3, device=device)):
        wrong = segmentation_loss(logits, target + 2, class_weights=weights)
        assert wrong["cross_entropy"].isnan()


if __name__ == "__main__":
    compare_triton(sys.argv[1])
