"""Networks that need mmcv's compiled operators, on a GPU where these are missing."""

from __future__ import annotations

from typing import Any

import pytest

from errors import ModelError
from networks import mmseg
from networks.registry import named_network

DCN = {"backbone": {"dcn": {"type": "DCN", "deform_groups": 1}, "stage_with_dcn": (True,) * 4}}


@pytest.mark.parametrize(
    ("name", "arguments", "part"),
    [
        pytest.param(
            "fcn/fcn_r50-d8_512x512_80k_ade20k",
            DCN,
            "DeformConv2dPack",
            id="deformable convolution",
        ),
        pytest.param(
            "fcn/fcn_r50-d8_512x512_80k_ade20k",
            {"decode_head": {"loss_decode": {"type": "FocalLoss", "use_sigmoid": True}}},
            "FocalLoss",
            id="focal loss",
        ),
        pytest.param("psanet/psanet_r50-d8_512x512_80k_ade20k", {}, None, id="PSANet"),
        pytest.param("ccnet/ccnet_r50-d8_512x512_80k_ade20k", {}, None, id="CCNet"),
    ],
)
def test_error_names_missing_mmcv_operator_on_a_gpu(
    name: str, arguments: dict[str, Any], part: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert named_network(f"mmseg:{name}", 3, arguments).name == f"mmseg:{name}"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(mmseg, "lacks_operators", lambda: True)
    if part is None:
        named_network(f"mmseg:{name}", 3, arguments)
    else:
        with pytest.raises(
            ModelError, match=f"model.name=mmseg:{name} needs mmcv's operator {part}"
        ):
            named_network(f"mmseg:{name}", 3, arguments)
