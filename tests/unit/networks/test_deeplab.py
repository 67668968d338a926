"""Tests of networks/deeplab.py."""

from __future__ import annotations

import http.server
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn

from errors import ModelError
from model import deeplabv3, weight_init
from networks.deeplab import ImagePool, infer_architecture

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision's ResNet-50 with random weights, as a state dict in a file."""
    path = tmp_path_factory.mktemp("weights") / "resnet50-random.pth"
    torch.save(torchvision.models.resnet50().state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("use_plus", "upsample", "side"), [(True, True, 64), (True, False, 16), (False, False, 8)]
)
def test_logits_have_the_strides_of_the_paper(use_plus: bool, upsample: bool, side: int) -> None:
    with torch.device("meta"):
        network = deeplabv3(5, "resnet50", use_plus=use_plus)
        network.upsample = upsample
        assert network(torch.empty(2, 3, 64, 64)).shape == (2, 5, side, side)


@pytest.mark.parametrize("arch", ["resnet101", "resnext50_32x4d", "wide_resnet50_2"])
def test_every_bottleneck_resnet_is_a_backbone(arch: str) -> None:
    with torch.device("meta"):
        network = deeplabv3(3, arch)
        assert network(torch.empty(2, 3, 64, 64)).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("arch", ["resnet18", "resnet34"])
def test_a_resnet_of_basic_blocks_is_refused(arch: str) -> None:
    with pytest.raises(ModelError, match=f"{arch} has basic blocks"):
        deeplabv3(3, arch)


@pytest.mark.parametrize("arch", ["vgg16", "resnet999", "ResNet", "conv1x1"])
def test_what_is_no_resnet_is_refused(arch: str) -> None:
    with pytest.raises(ModelError, match=f"backbone_arch={arch}: torchvision has no such ResNet"):
        deeplabv3(3, arch)


def test_weights_of_a_file_go_to_the_backbone_and_only_the_head_is_initialised(
    backbone_file: Path,
) -> None:
    saved = torch.load(backbone_file, weights_only=True)
    network = deeplabv3(5, "resnet50", str(backbone_file), init_fn=weight_init)
    for name, value in network.backbone.state_dict().items():
        assert torch.equal(value, saved[name]), name
    head = network.classifier.conv_seg.weight
    assert head.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.1)


@pytest.fixture
def server(backbone_file: Path) -> Iterator[str]:
    """The weights' folder over HTTP on this machine."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(backbone_file.parent))

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()


def test_weights_are_fetched_from_a_url_and_then_kept(
    server: str, backbone_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    url = f"{server}/{backbone_file.name}"
    saved = torch.load(backbone_file, weights_only=True)
    network = deeplabv3(5, "resnet50", url)
    assert torch.equal(network.backbone.conv1.weight, saved["conv1.weight"])
    assert (tmp_path / "checkpoints" / backbone_file.name).is_file()
    with pytest.raises(ModelError, match=r"cannot download .*/missing.pth .*copy it to .*missing"):
        deeplabv3(5, "resnet50", f"{server}/missing.pth")


def test_without_a_network_the_error_names_the_file_and_its_place(
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


def test_weights_that_do_not_fit_are_refused(backbone_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pth"
    broken.write_bytes(backbone_file.read_bytes()[:1000])
    partial = tmp_path / "partial.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, partial)
    for weights, reason in {
        "IMAGENET1K_V7": "for resnet50, use IMAGENET1K_V1 or IMAGENET1K_V2",
        str(tmp_path / "missing.pth"): "this file does not exist; check the path",
        str(broken): "cannot be read as a PyTorch state dict",
        str(partial): "does not match resnet50: 317 of 318 tensors",
    }.items():
        with pytest.raises(ModelError, match=reason) as caught:
            deeplabv3(5, "resnet50", weights)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="does not match wide_resnet50_2"):
        deeplabv3(5, "wide_resnet50_2", str(backbone_file))


def test_pooling_to_one_pixel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of an interpolation, and a gradient that bf16 does not lose in a long sum."""
    pool = ImagePool(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 5, 1))
    image, weight = torch.randn(2, 3, 40, 48), torch.rand(2, 5, 40, 48)
    found = []
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_cuda", on_gpu)
        pooled = pool(image)
        assert pooled.shape[2:] == ((40, 48) if on_gpu else (1, 1))
        spread = nn.functional.interpolate(pooled, (40, 48), mode="bilinear")
        found.append((spread, *torch.autograd.grad((spread * weight).sum(), [*pool.parameters()])))
    for ours, theirs in zip(*found, strict=True):
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
def test_infers_every_architecture(arch: str, use_plus: bool):
    with torch.device("meta"):
        network = deeplabv3(7, arch, sync_bn=False, use_plus=use_plus)
    found = infer_architecture(network.state_dict())
    assert found == {"num_classes": 7, "backbone_arch": arch, "use_plus": use_plus}
