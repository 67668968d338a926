"""Tests of extras/sharing/exporters.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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
