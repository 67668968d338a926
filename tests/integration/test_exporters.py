"""Export of networks that pad their input and of vision transformers, at any image size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from export import Deployed, compare
from extras.sharing import exporters
from networks.base import Network
from networks.registry import named_network


@pytest.mark.parametrize("upsample", [True, False])
@pytest.mark.parametrize("kind", ["onnx", "torchscript", "pt2"])
def test_network_with_padding_is_exported_for_any_size(tmp_path: Path, kind: str, upsample: bool):
    torch.manual_seed(0)
    network = Network(torch.nn.Conv2d(3, 5, 4, stride=4), "own", {}, size_divisor=32)
    model = Deployed(network, upsample).eval()
    exported = exporters.export(model, kind, tmp_path / "file", {})
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    agreement, difference = compare(model, exported, image, 64)
    assert agreement >= 0.999 and difference < 1e-3


@pytest.mark.parametrize("kind", ["onnx", "torchscript", "pt2"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("vit_tiny_patch16_224", id="resized position embeddings"),
        pytest.param("vit_tiny_patch16_dinov3_qkvb", id="rotary position embeddings"),
    ],
)
def test_vision_transformer_is_exported_for_any_size(tmp_path: Path, kind: str, name: str) -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    small = {"depth": 3, "embed_dim": 32, "num_heads": 2}
    network = named_network(f"timm:{name}", 5, small)
    # Layer scales and position embeddings are initialised near 0, which would hide differences.
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight) / 10)
    model = Deployed(network).eval()
    exported = exporters.export(model, kind, tmp_path / "file", {})
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    for size in (64, 256):  # one size below and one above that of the position embeddings
        agreement, difference = compare(model, exported, image, size)
        assert agreement >= 0.999 and difference < 1e-4
