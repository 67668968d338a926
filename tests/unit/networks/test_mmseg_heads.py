"""Tests of networks/mmseg_heads.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.registry import named_network


@pytest.mark.parametrize(
    "name",
    [
        "pspnet/pspnet_r18-d8_512x1024_80k_cityscapes",
        "danet/danet_r50-d8_512x512_80k_ade20k",
        "encnet/encnet_r50-d8_512x512_80k_ade20k",
        "stdc/stdc1_512x1024_80k_cityscapes",
        "knet/knet_s3_fcn_r50-d8_8x2_512x512_adamw_80k_ade20k",
        "ocrnet/ocrnet_hr18s_512x512_80k_ade20k",
    ],
)
def test_auxiliary_losses_match_mmsegmentation(name: str) -> None:
    torch.manual_seed(0)
    network = named_network(f"mmseg:{name}", 5, {})
    segmentor = network.network
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.BatchNorm2d):
            # The two passes must not change the running statistics.
            module.momentum = 0.0
    image, target = torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))
    with torch.no_grad():
        logits, *auxiliary = network.train()(image)
        auxiliary_loss = network.auxiliary_loss(auxiliary, target, -1)
        theirs = segmentor.forward_train(image, None, target[:, None])
    upsampled = nn.functional.interpolate(logits, (64, 64), mode="bilinear")
    main_loss = nn.functional.cross_entropy(upsampled, target)
    expected = {key: float(loss) for key, loss in theirs.items() if "loss" in key}
    # STDC's main head samples pixels, so compare only the auxiliary losses.
    if name.startswith("stdc"):
        expected = {key: loss for key, loss in expected.items() if key.startswith("aux")}
        main_loss = torch.zeros(())
    assert len(auxiliary) >= 1
    assert float(auxiliary_loss + main_loss) == pytest.approx(sum(expected.values()), rel=1e-3)
