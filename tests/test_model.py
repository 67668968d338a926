"""The network and the ComposerModel around it: shapes, names, weights, initialisation, errors."""

from __future__ import annotations

import http.server
import math
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from composer.utils import dist
from torch import nn

import model as model_module
import segmentation
from errors import ModelError
from model import ComposerDeepLabV3, build_composer_deeplabv3, deeplabv3, weight_init
from networks.base import cross_entropy
from networks.batch_norm import SyncBatchNorm2d
from networks.deeplab import ImagePool
from segmentation import losses
from segmentation.losses import MixedTarget

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
    network = deeplabv3(5, "resnet50", use_plus=use_plus)
    network.upsample = upsample
    assert network(IMAGE).shape == (2, 5, side, side)


@pytest.mark.parametrize("arch", ["resnet101", "resnext50_32x4d", "wide_resnet50_2"])
def test_every_bottleneck_resnet_is_a_backbone(arch: str) -> None:
    with torch.device("meta"):
        network = deeplabv3(3, arch)
        assert network(torch.empty(2, 3, 64, 64)).shape == (2, 3, 64, 64)


def test_the_state_dict_has_the_references_names() -> None:
    names = set(build_composer_deeplabv3(5, "resnet50").state_dict())
    assert {
        "module.backbone.conv1.weight",
        "module.backbone.layer1.0.downsample.1.running_mean",
        "module.backbone.layer4.2.bn3.running_var",
        "module.classifier.conv_seg.weight",
        "module.classifier.image_pool.1.conv.weight",
        "module.classifier.aspp_modules.0.bn.weight",
        "module.classifier.aspp_modules.1.depthwise_conv.conv.weight",
        "module.classifier.c1_bottleneck.conv.weight",
        "module.classifier.sep_bottleneck.1.pointwise_conv.bn.bias",
    } <= names
    assert all(name.startswith(("module.backbone.", "module.classifier.")) for name in names)
    assert not any("fc." in name for name in names)


@pytest.mark.parametrize("arch", ["resnet18", "resnet34"])
def test_a_resnet_of_basic_blocks_is_refused(arch: str) -> None:
    with pytest.raises(ModelError, match=f"{arch} has basic blocks"):
        deeplabv3(3, arch)


@pytest.mark.parametrize("arch", ["vgg16", "resnet999", "ResNet", "conv1x1"])
def test_what_is_no_resnet_is_refused(arch: str) -> None:
    with pytest.raises(ModelError, match=f"backbone_arch={arch}: torchvision has no such ResNet"):
        deeplabv3(3, arch)


def test_initialisation_is_the_references() -> None:
    network = deeplabv3(150, "resnet50", init_fn=weight_init)
    convolution = network.backbone.layer3[0].conv2.weight
    expected = math.sqrt(2 / convolution[0].numel())  # He et al. 2015, fan-in
    assert convolution.std().item() == pytest.approx(expected, rel=0.01)
    head = network.classifier.conv_seg.weight
    assert head.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.02)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


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
    with pytest.raises(ModelError, match=r"cannot download .*/missing.pth .*put it at .*missing"):
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
    assert f"put it at {tmp_path}/checkpoints/resnet101-cd907fc2.pth" in str(caught.value)


def test_weights_that_do_not_fit_are_refused(backbone_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pth"
    broken.write_bytes(backbone_file.read_bytes()[:1000])
    partial = tmp_path / "partial.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, partial)
    for weights, reason in {
        "IMAGENET1K_V7": "resnet50 has IMAGENET1K_V1, IMAGENET1K_V2",
        str(tmp_path / "missing.pth"): "no such file",
        str(broken): "not a PyTorch state dict",
        str(partial): "does not fit resnet50: 317 of 318 tensors",
    }.items():
        with pytest.raises(ModelError, match=reason) as caught:
            deeplabv3(5, "resnet50", weights)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="does not fit wide_resnet50_2"):
        deeplabv3(5, "wide_resnet50_2", str(backbone_file))


def test_a_process_alone_on_its_node_shares_no_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    network = deeplabv3(5, "resnet50", sync_bn=True)
    assert not any(isinstance(module, SyncBatchNorm2d) for module in network.modules())


def test_sync_bn_has_one_process_group_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_local_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_node_rank", lambda: 1)
    monkeypatch.setattr(
        model_module.torch.distributed,
        "new_group",
        lambda ranks: groups.append(ranks) or SimpleNamespace(group_name=str(ranks)),
    )
    network = deeplabv3(5, "resnet50", sync_bn=True)
    assert groups == [[0, 1], [2, 3]]
    layers = [module for module in network.modules() if isinstance(module, SyncBatchNorm2d)]
    assert len(layers) > 50
    assert {layer.group_name for layer in layers} == {"[2, 3]"}
    plain = deeplabv3(5, "resnet50", sync_bn=False).state_dict()
    assert {k: v.shape for k, v in network.state_dict().items()} == {
        k: v.shape for k, v in plain.items()
    }
    assert not any(type(module) is nn.BatchNorm2d for module in network.modules())


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


def test_the_composer_model_loses_and_scores() -> None:
    model = build_composer_deeplabv3(
        5, "resnet50", cross_entropy_weight=0.5, dice_weight=2.0, upsample=False
    )
    target = torch.randint(-1, 5, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    outputs = model((IMAGE, target))
    assert outputs.shape == (2, 5, 16, 16)
    loss = model.loss(outputs, (IMAGE, target))
    expected = 0.5 * loss["cross_entropy"] + 2.0 * loss["dice"]
    assert loss["total"].item() == pytest.approx(expected.item(), rel=1e-6)
    loss["total"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.get_metrics(is_train=True) == {}
    metrics = model.get_metrics(is_train=False)
    for metric in metrics.values():
        model.update_metric((IMAGE, target), model.eval_forward((IMAGE, target)), metric)
    assert 0 < metrics["MIoU"].compute() < 100
    assert metrics["CrossEntropy"].compute() > 0


class WithAuxiliary(nn.Module):
    """A network that has an auxiliary output beside its logits."""

    def auxiliary_loss(self, outputs: Any, target: Any, ignore_index: int) -> torch.Tensor:
        first = target.target if isinstance(target, MixedTarget) else target
        return 0.4 * cross_entropy(outputs[0], first, ignore_index)


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize(("fused_loss", "kernels"), [("auto", 4), (False, 0)])
def test_the_loss_without_hand_written_kernels(
    fused_loss: bool | str, kernels: int, mixes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the forward and the backward pass, of the main and of an auxiliary output."""
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(2, 5, 8, 8, generator=generator, requires_grad=True) for _ in range(2)]
    target: Any = torch.randint(-1, 5, (2, 32, 32), generator=generator)
    if mixes:
        target = MixedTarget(target, target.flip(0), 0.3)
    batch = IMAGE, target

    def compute(model: ComposerDeepLabV3) -> list[torch.Tensor]:
        total = model.loss(tuple(outputs), batch)["total"]
        return [total, *torch.autograd.grad(total, outputs)]

    expected = compute(ComposerDeepLabV3(WithAuxiliary(), 5, dice_weight=1.0))
    calls = []

    def counted(function: Any) -> Any:
        return lambda *arguments: calls.append(function) or function(*arguments)

    kernel_module = types.ModuleType("segmentation.losses_triton")
    vars(kernel_module).update(
        forward_sums=counted(losses.forward_sums), backward=counted(losses.backward)
    )
    monkeypatch.setitem(sys.modules, "segmentation.losses_triton", kernel_module)
    monkeypatch.setattr(segmentation, "losses_triton", kernel_module, raising=False)
    monkeypatch.setattr(losses.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    model = ComposerDeepLabV3(WithAuxiliary(), 5, dice_weight=1.0, fused_loss=fused_loss)
    found = compute(model)
    assert len(calls) == kernels
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_cpu_computes_in_bf16_where_asked() -> None:
    model = build_composer_deeplabv3(5, "resnet50").eval()
    with torch.no_grad():
        exact = model((IMAGE, None))
        model.cpu_autocast = torch.bfloat16
        rounded = model((IMAGE, None))
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert (exact - rounded).abs().max() < 0.05 * exact.abs().max()
