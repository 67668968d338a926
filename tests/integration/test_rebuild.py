"""Networks rebuilt from weights files of torchvision, whose last layer gives the class count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpointing.rebuild import build_network, complete
from checkpointing.weights import load_weights
from tests.support.foreign_weights import LRASPP, torchvision_network


def with_auxiliary(classes: int) -> nn.Module:
    from torchvision.models import segmentation

    return segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=classes, aux_loss=True
    )


@pytest.mark.parametrize(
    ("name", "build", "wrap"),
    [
        pytest.param(LRASPP, torchvision_network, dict, id="plain state dict"),
        pytest.param(
            LRASPP, torchvision_network, lambda s: {"model_state": s}, id="nested state dict"
        ),
        pytest.param(
            LRASPP,
            torchvision_network,
            lambda s: {"state_dict": {f"net.core.{k}": v for k, v in s.items()}},
            id="prefixed parameter names",
        ),
        pytest.param(
            "torchvision:deeplabv3_mobilenet_v3_large", with_auxiliary, dict, id="auxiliary head"
        ),
    ],
)
@pytest.mark.parametrize("classes", [2, 21, 251])
def test_number_of_classes_is_read_from_weights_of_last_layer(
    tmp_path: Path, name: str, build: Any, wrap: Any, classes: int
) -> None:
    network = build(classes).eval()
    torch.save(wrap(network.state_dict()), tmp_path / "a.pth")
    weights = complete(load_weights(tmp_path / "a.pth"), "a.pth", name)
    assert weights.num_classes == classes
    again = build_network(weights, "a.pth", name)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        actual, expected = again.network(image)["out"], network(image)["out"]
    assert torch.equal(actual, expected)
