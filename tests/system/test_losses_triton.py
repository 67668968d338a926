"""The Triton kernels of segmentation/losses_triton.py, each test in its own process.

Separate processes are needed, because Triton reads environment variables at import.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
def test_triton_kernels_match_pytorch_in_the_interpreter() -> None:
    run_triton("cpu", TRITON_INTERPRET="1")


def test_triton_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    run_triton("none", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_kernels_match_pytorch_on_a_gpu() -> None:
    run_triton("cuda", TRITON_INTERPRET="0")


def compare_triton(device: str) -> None:
    """Compare the loss and gradient of the kernels with those of PyTorch in several cases."""
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
        half = torch.finfo(dtype).eps  # the interpreter truncates bf16, a GPU rounds it
        assert_gradients_close(result, wanted, 2e-6 if dtype == torch.float32 else half)
        if device == "cuda":  # the gradient is deterministic
            assert torch.equal(gradient(actual["total"], logits), result)
    logits, target = make((1, 3, 2, 2), (4, 4))
    logits, target = logits.detach().to(device).requires_grad_(), target.to(device)
    ignored = segmentation_loss(logits, torch.full_like(target, -1))
    assert [value.item() for value in ignored.values()] == [0, 0, 0]
    assert not gradient(ignored["total"], logits).any()
    for weights in (None, torch.ones(3, device=device)):
        wrong = segmentation_loss(logits, target + 2, class_weights=weights)
        assert wrong["cross_entropy"].isnan()


def compile_triton() -> None:
    """Compile both kernels for 150 classes at stride 4 in bf16, for GPUs from A100 to RTX 50."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from segmentation import losses_triton

    logits = torch.empty(1, 150, 128, 128, device="meta", dtype=torch.bfloat16)
    pointers = {"logits": "*bf16", "grad": "*bf16", "first": "*i64", "second": "*i64"}
    pointers |= dict.fromkeys(
        ("class_weights", "lse", "nll", "sums", "by_nll", "by_intersection", "by_predicted"),
        "*fp32",
    )
    floats = dict.fromkeys(("weight", "second_weight", "scale_y", "scale_x"), "fp32")
    for kernel in (losses_triton._forward_kernel, losses_triton._backward_kernel):
        # Compile the simplest variant for every GPU generation, the others only for the oldest.
        for targets, weights, capabilities in (
            (1, None, (80, 90, 100, 120)),
            (2, None, (80,)),
            (2, logits, (80,)),
        ):
            constants = losses_triton._constants(logits, targets, weights, 512)
            constants |= {"ROWS": 4, "CELLS": 8}
            options = {"num_warps": constants.pop("num_warps")}
            constants = {name: constants[name] for name in kernel.arg_names if name in constants}
            types = dict.fromkeys(kernel.arg_names, "i32") | pointers | floats
            types |= dict.fromkeys(constants, "constexpr")
            types = {name: types[name] for name in kernel.arg_names}
            source = ASTSource(kernel, types, constants)
            for capability in capabilities:
                target = GPUTarget("cuda", capability, 32)
                assert compile(source, target=target, options=options).asm["cubin"]


if __name__ == "__main__":
    if sys.argv[1] == "none":
        compile_triton()
    else:
        compare_triton(sys.argv[1])
