"""Loading of backbone weights from files and URLs in networks/deeplab.py."""

from __future__ import annotations

import http.server
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision

from errors import ModelError
from model import deeplabv3, weight_init


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the state dict of torchvision's ResNet-50 with random weights."""
    path = tmp_path_factory.mktemp("weights") / "resnet50-random.pth"
    torch.save(torchvision.models.resnet50().state_dict(), path)
    return path


def test_weights_file_fills_backbone_and_leaves_head_initialised(
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
    """Serve the folder of the weights file over HTTP on this machine; yield the address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(backbone_file.parent))

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()


def test_weights_url_is_downloaded_and_cached(
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


def test_unusable_backbone_weights_are_rejected(backbone_file: Path, tmp_path: Path) -> None:
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
