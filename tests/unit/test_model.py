"""Tests of model.py."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

import segmentation
from model import ComposerDeepLabV3, build_composer_deeplabv3
from networks.base import cross_entropy
from segmentation import losses
from segmentation.losses import MixedTarget

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_state_dict_keys_match_the_reference_implementation() -> None:
    with torch.device("meta"):
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


class WithAuxiliary(nn.Module):
    """A network with an auxiliary output beside its logits."""

    def auxiliary_loss(self, outputs: Any, target: Any, ignore_index: int) -> torch.Tensor:
        first = target.target if isinstance(target, MixedTarget) else target
        return 0.4 * cross_entropy(outputs[0], first, ignore_index)


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize(("fused_loss", "kernels"), [("auto", 4), (False, 0)])
def test_fused_loss_matches_the_loss_in_pytorch(
    fused_loss: bool | str, kernels: int, mixes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test covers forward and backward passes of the main and an auxiliary output."""
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

    def count_calls(function: Any) -> Any:
        return lambda *arguments: calls.append(function) or function(*arguments)

    kernel_module = types.ModuleType("segmentation.losses_triton")
    vars(kernel_module).update(
        forward_sums=count_calls(losses.forward_sums), backward=count_calls(losses.backward)
    )
    monkeypatch.setitem(sys.modules, "segmentation.losses_triton", kernel_module)
    monkeypatch.setattr(segmentation, "losses_triton", kernel_module, raising=False)
    monkeypatch.setattr(losses.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    model = ComposerDeepLabV3(WithAuxiliary(), 5, dice_weight=1.0, fused_loss=fused_loss)
    actual = compute(model)
    assert len(calls) == kernels
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
