"""Networks that need mmcv's compiled operators, on a GPU where these are missing."""

from __future__ import annotations

from typing import Any

import pytest

from errors import ModelError
from networks import mmseg
from networks.registry import named_network
from tests.support.networks import HEAD

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


def test_pretrained_weights_named_in_a_checkpoint_are_not_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    for place in ("torch.hub.load_state_dict_from_url", "timm.models._builder.load_pretrained"):
        monkeypatch.setattr(place, lambda *args, **kwargs: calls.append(args))
    head = {**HEAD, "in_channels": 512, "in_index": 4}
    backbone = {"type": "TIMMBackbone", "model_name": "resnet18", "features_only": True}
    mmseg = {"type": "EncoderDecoder", "backbone": backbone, "decode_head": head}
    timm = {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [1, 2, 3, 4]}
    upernet = {"model_type": "upernet", "backbone_config": timm, "hidden_size": 8}
    upernet |= {"auxiliary_in_channels": 256, "auxiliary_channels": 8}
    weights = {"weights_backbone": "IMAGENET1K_V1", "weights": "DEFAULT"}
    named_network("torchvision:lraspp_mobilenet_v3_large", 3, weights, None, True)
    named_network("smp:Unet", 3, {"encoder_weights": "imagenet"}, None, True)
    named_network("timm:convnext_atto", 3, {"pretrained": True}, None, True)
    named_network("mmseg:x", 3, {"config": mmseg}, None, True)
    named_network("hf:x", 3, {"config": upernet}, None, True)
    assert not calls
    named_network("timm:convnext_atto", 3, {"pretrained": True})
    # A network that is not from a checkpoint does load its weights.
    assert calls
