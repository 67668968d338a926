"""Tests of networks/timm.py."""

from typing import Any

import pytest
import torch

from errors import ModelError
from networks.libraries import Request
from networks.timm import build


@pytest.fixture(autouse=True)
def timm() -> Any:
    return pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        pytest.param("resnet10t", 8, id="dilated to stride 8"),
        pytest.param("ghostnet_100", None, id="stride of the network"),
    ],
)
def test_timm_network_uses_stride_4_and_last_stage_features(name: str, stride: int | None) -> None:
    network = build(Request(f"timm:{name}", 5, {})).eval()
    assert network.arguments.get("output_stride") == stride
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 5, 16, 16)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        pytest.param("resnet10", "resnet10: .*resnet", id="unknown name"),
        pytest.param("vit_base_patch32_224", "patches of 14 or 16 pixels", id="large patches"),
        pytest.param(
            "vit_base_patch8_224", "has no features of stride 4", id="no features of stride 4"
        ),
        pytest.param("beit_base_patch16_224", "accepts only one image size", id="fixed image size"),
    ],
)
def test_unsuitable_timm_network_is_rejected(name: str, error: str) -> None:
    with torch.device("meta"), pytest.raises(ModelError, match=error):
        build(Request(f"timm:{name}", 5, {}))


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        pytest.param("vit_tiny_patch16_224", 16, id="ViT"),
        pytest.param("vit_small_patch14_reg4_dinov2", 14, id="DINOv2"),
        pytest.param("vit_small_patch16_dinov3", 16, id="DINOv3"),
        pytest.param("vit_base_patch16_siglip_224", 16, id="SigLIP"),
        pytest.param("vit_base_patch16_224.mae", 16, id="MAE"),
    ],
)
def test_vision_transformer_accepts_images_of_any_size(name: str, patch: int) -> None:
    with torch.device("meta"):
        network = build(Request(f"timm:{name}", 5, {"depth": 3})).eval()
        assert network.size_divisor == patch
        for rows, columns in ((2, 3), (5, 4)):
            image = torch.zeros(1, 3, rows * patch, columns * patch)
            assert network(image).shape == (1, 5, 4 * rows, 4 * columns)


def test_vit_uses_its_position_embeddings_at_any_image_size() -> None:
    network = build(Request("timm:vit_tiny_patch16_224", 5, {"depth": 3})).eval()
    image = torch.zeros(1, 3, 48, 64)
    with torch.no_grad():
        before = network(image)
        network.get_parameter("network.backbone.model.pos_embed").mul_(3)
        assert not torch.equal(network(image), before)


def test_input_normalisation_matches_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = build(Request("timm:mobilenetv3_small_050", 5, {}))
    assert network.mean == pytest.approx([123.675, 116.28, 103.53], rel=1e-3)
    inception: Any = build(Request("timm:tf_mobilenetv3_small_minimal_100", 5, {}))
    assert inception.mean == pytest.approx([127.5] * 3) and inception.std == pytest.approx(
        [127.5] * 3
    )
