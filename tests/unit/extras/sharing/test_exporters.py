"""Tests of extras/sharing/exporters.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from export import Deployed, compare
from extras.sharing import exporters
from networks.base import Network


@pytest.mark.parametrize(
    ("weight", "agrees"),
    [
        pytest.param(1.0, True, id="small weights"),
        pytest.param(1e6, False, id="weights that overflow"),
    ],
)
def test_half_precision_export_matches_the_network(tmp_path: Path, weight: float, agrees: bool):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3, 8, 1), torch.nn.Conv2d(64, 5, 1))
    with torch.no_grad():
        layers[0].weight.mul_(weight)
    model = Deployed(Network(layers, "own", {})).eval()
    path = tmp_path / "half.onnx"
    exported = exporters.export(model, "onnx", path, {}, half=True)
    types = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    half = [name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT16]
    assert len(half) == 1 and half[0].endswith(".half")  # 1,728 of the 2,117 weights are fp16
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    agreement, difference = compare(model, exported, image, 64)
    assert (agreement >= 0.99 and 0 < difference < 1e-2) == agrees


@pytest.mark.parametrize("old", [1, 14, 37])
@pytest.mark.parametrize("new", [1, 5, 14, 15, 64])
def test_resizing_by_matrix_multiplication_matches_pytorch(old: int, new: int) -> None:
    image = torch.randn(1, 3, old, 16)
    expected = F.interpolate(image, (new, 20), mode="bicubic", antialias=True)
    with exporters._ResizingByMatrices():
        actual = F.interpolate(image, size=(new, 20), mode="bicubic", antialias=True)
    assert not torch.equal(actual, expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
