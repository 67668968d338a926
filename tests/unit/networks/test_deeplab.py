"""Tests of networks/deeplab.py."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import nn

from errors import ModelError
from model import deeplabv3
from networks.deeplab import ImagePool, create_network, infer_architecture

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("use_plus", "upsample", "side"), [(True, True, 64), (True, False, 16), (False, False, 8)]
)
def test_logits_have_the_strides_of_the_deeplab_paper(
    use_plus: bool, upsample: bool, side: int
) -> None:
    with torch.device("meta"):
        network = deeplabv3(5, "resnet50", use_plus=use_plus)
        network.upsample = upsample
        assert network(torch.empty(2, 3, 64, 64)).shape == (2, 5, side, side)


@pytest.mark.parametrize("arch", ["resnet101", "resnext50_32x4d", "wide_resnet50_2"])
def test_every_bottleneck_resnet_works_as_a_backbone(arch: str) -> None:
    with torch.device("meta"):
        network = deeplabv3(3, arch)
        assert network(torch.empty(2, 3, 64, 64)).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("arch", ["resnet18", "resnet34"])
def test_resnet_with_basic_blocks_is_rejected(arch: str) -> None:
    with pytest.raises(ModelError, match=f"{arch} has basic blocks"):
        deeplabv3(3, arch)


@pytest.mark.parametrize("arch", ["vgg16", "resnet999", "ResNet", "conv1x1"])
def test_unknown_backbone_arch_is_rejected(arch: str) -> None:
    with pytest.raises(ModelError, match=f"backbone_arch={arch}: torchvision has no such ResNet"):
        deeplabv3(3, arch)


def test_download_error_names_the_weights_file_and_its_cache_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        deeplabv3(5, "resnet101", "IMAGENET1K_V2")
    assert "resnet101-cd907fc2.pth" in str(caught.value)
    assert f"copy it to {tmp_path}/checkpoints/resnet101-cd907fc2.pth" in str(caught.value)


def test_image_pool_on_a_gpu_matches_interpolation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values match an interpolation, and bf16 gradients stay precise over many pixels."""
    pool = ImagePool(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 5, 1))
    image, weight = torch.randn(2, 3, 40, 48), torch.rand(2, 5, 40, 48)
    results = []
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_cuda", on_gpu)
        pooled = pool(image)
        assert pooled.shape[2:] == ((40, 48) if on_gpu else (1, 1))
        spread = nn.functional.interpolate(pooled, (40, 48), mode="bilinear")
        results.append(
            (spread, *torch.autograd.grad((spread * weight).sum(), [*pool.parameters()]))
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    pixel = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.rand(1, 1, 64, 64).to(torch.bfloat16)
    (pixel.expand(1, 1, 64, 64) * grad).sum().backward()
    assert pixel.grad is not None
    assert float(pixel.grad) == pytest.approx(float(grad.double().sum()), rel=2**-8)


@pytest.mark.parametrize("use_plus", [True, False])
@pytest.mark.parametrize(
    "arch",
    [
        "resnet50",
        "resnet101",
        "resnet152",
        "resnext50_32x4d",
        "resnext101_32x8d",
        "resnext101_64x4d",
        "wide_resnet50_2",
        "wide_resnet101_2",
    ],
)
def test_every_architecture_is_inferred_from_its_weights(arch: str, use_plus: bool):
    with torch.device("meta"):
        network = deeplabv3(7, arch, sync_bn=False, use_plus=use_plus)
    architecture = infer_architecture(network.state_dict())
    assert architecture == {"num_classes": 7, "backbone_arch": arch, "use_plus": use_plus}


def test_model_arguments_of_other_libraries_are_rejected() -> None:
    with pytest.raises(
        ModelError, match=r"^model\.arguments: deeplabv3 does not use this key; set its own keys"
    ):
        create_network("deeplabv3", {"depth": 3}, num_classes=5)
