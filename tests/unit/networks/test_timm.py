"""Tests of networks/timm.py."""

from typing import Any

import pytest
import torch

from errors import ModelError
from networks.timm import build

pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        pytest.param("resnet10t", 8, id="stride 8 where timm can dilate"),
        pytest.param("ghostnet_100", None, id="its own stride elsewhere"),
    ],
)
def test_features_of_stride_4_and_of_the_last_stage(name: str, stride: int | None) -> None:
    network = build(name, 5, {}, None, False).eval()
    assert network.arguments.get("output_stride") == stride
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 5, 16, 16)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        pytest.param("resnet10", "resnet10: .*resnet", id="unknown"),
        pytest.param("vit_tiny_patch16_224", "DeepLabV3\\+ needs stride 4", id="no stride 4"),
    ],
)
def test_a_network_that_cannot_be_used_is_refused(name: str, error: str) -> None:
    with pytest.raises(ModelError, match=error):
        build(name, 5, {}, None, False)


def test_normalisation_is_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = build("mobilenetv3_small_050", 5, {}, None, False)
    assert network.mean == pytest.approx([123.675, 116.28, 103.53], rel=1e-3)
    inception: Any = build("tf_mobilenetv3_small_minimal_100", 5, {}, None, False)
    assert inception.mean == pytest.approx([127.5] * 3) and inception.std == pytest.approx(
        [127.5] * 3
    )
