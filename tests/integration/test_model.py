"""Initialisation, SyncBatchNorm, losses, metrics and bf16 autocast of the model."""

from __future__ import annotations

import math

import pytest
import torch
from composer.utils import dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from model import build_composer_deeplabv3, deeplabv3, weight_init
from networks.batch_norm import SyncBatchNorm2d

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_initial_weights_have_std_of_reference_example() -> None:
    network = deeplabv3(150, "resnet50", init_fn=weight_init)
    convolution = network.backbone.layer3[0].conv2.weight
    expected = math.sqrt(
        2 / convolution[0].numel()
    )  # Kaiming initialisation with fan-in (He et al. 2015)
    assert convolution.std().item() == pytest.approx(expected, rel=0.01)
    head = network.classifier.conv_seg.weight
    assert head.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.02)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


@pytest.mark.usefixtures("small_network")
def test_sync_bn_is_off_with_one_rank_per_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    network = deeplabv3(5, "resnet50", sync_bn=True)
    assert not any(isinstance(module, SyncBatchNorm2d) for module in network.modules())


@pytest.mark.usefixtures("small_network")
def test_sync_bn_has_one_process_group_per_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_local_world_size", lambda: 2)
    # Act as the last of four ranks on two nodes. The backend "fake" needs no other processes.
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    try:
        network = deeplabv3(5, "resnet50", sync_bn=True)
        layers = [module for module in network.modules() if isinstance(module, SyncBatchNorm2d)]
        (group_name,) = {layer.group_name for layer in layers}
        group = torch.distributed.distributed_c10d._resolve_process_group(group_name)
        assert torch.distributed.get_process_group_ranks(group) == [2, 3]
    finally:
        torch.distributed.destroy_process_group()
    assert len(layers) > 20
    plain = deeplabv3(5, "resnet50", sync_bn=False).state_dict()
    assert {k: v.shape for k, v in network.state_dict().items()} == {
        k: v.shape for k, v in plain.items()
    }
    assert not any(type(module) is nn.BatchNorm2d for module in network.modules())


@pytest.mark.usefixtures("small_network")
def test_composer_model_computes_losses_and_metrics() -> None:
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


@pytest.mark.usefixtures("small_network")
def test_cpu_autocast_computes_in_bf16() -> None:
    model = build_composer_deeplabv3(5, "resnet50").eval()
    with torch.no_grad():
        exact = model((IMAGE, None))
        model.cpu_autocast = torch.bfloat16
        rounded = model((IMAGE, None))
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert (exact - rounded).abs().max() < 0.05 * exact.abs().max()
