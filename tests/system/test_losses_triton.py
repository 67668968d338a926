"""The Triton kernels of segmentation/losses_triton.py compile on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT


def test_triton_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    # A separate process, because Triton reads these variables when it is imported.
    settings = {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, __file__]
    environment = {**os.environ, **settings}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr


def compile_triton() -> None:
    """Compile both kernels for ADE20K's 150 classes at stride 4 in bf16, for A100 to RTX 50."""
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
        # Compile the simplest variant for every GPU, and the others for the oldest GPU.
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
    compile_triton()
