"""Tests of extras/sharing/exporters.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export import Deployed, compare
from extras.sharing import exporters
from networks.base import Network


@pytest.mark.parametrize("upsample", [True, False])
@pytest.mark.parametrize("kind", ["onnx", "torchscript", "pt2"])
def test_a_network_that_pads_is_exported_for_sizes_that_need_no_padding(
    tmp_path: Path, kind: str, upsample: bool
):
    torch.manual_seed(0)
    network = Network(torch.nn.Conv2d(3, 5, 4, stride=4), "own", {}, size_divisor=32)
    model = Deployed(network, upsample).eval()
    exported = exporters.export(model, kind, tmp_path / "file", {})
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    agreement, difference = compare(model, exported, image, 64)
    assert agreement >= 0.999 and difference < 1e-3


@pytest.mark.parametrize(
    ("weight", "agrees"), [pytest.param(1.0, True, id="normal"), pytest.param(1e6, False, id="inf")]
)
def test_large_weights_are_stored_as_half(tmp_path: Path, weight: float, agrees: bool):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3, 8, 1), torch.nn.Conv2d(64, 5, 1))
    with torch.no_grad():
        layers[0].weight.mul_(weight)
    model = Deployed(Network(layers, "own", {})).eval()
    path = tmp_path / "half.onnx"
    exported = exporters.export(model, "onnx", path, {}, half=True)
    types = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    half = [name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT16]
    assert len(half) == 1 and half[0].endswith(".half")  # 1,728 of 2,117 weights
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    agreement, difference = compare(model, exported, image, 64)
    assert (agreement >= 0.99 and 0 < difference < 1e-2) == agrees
