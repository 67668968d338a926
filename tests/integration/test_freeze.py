"""model.freeze_backbone keeps the backbone's weights fixed for the configured time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import main
from checkpointing.weights import load_weights
from errors import ConfigError

pytestmark = pytest.mark.usefixtures("small_network", "no_curves")


EMA = {"half_life": "2ba", "update_interval": "1ba"}


@pytest.mark.parametrize("optimizer", ["sgdw", "adamw"])
def test_backbone_is_frozen_for_set_time_and_then_trained(
    tiny: dict[str, Any], tmp_path: Path, optimizer: str
) -> None:
    tiny["optimizer"]["name"] = optimizer
    tiny |= {"recipe_name": "hot", "hot": {"max_duration": "4ba", "ema": EMA}}
    tiny |= {"save_interval": "1ba", "save_num_checkpoints_to_keep": -1}
    tiny["model"]["freeze_backbone"] = "2ba"
    main.main({**tiny, "save_folder": str(tmp_path / "whole")})

    def state(batch: int, which: str) -> dict[str, torch.Tensor]:
        return load_weights(tmp_path / "whole" / f"ep0-ba{batch}-rank0.pt", which).state

    for which in ("training", "ema"):
        first, second, fourth = (state(batch, which) for batch in (1, 2, 4))
        backbone = [name for name in first if name.startswith("backbone.")]
        assert len(backbone) > 50
        assert all(torch.equal(first[name], second[name]) for name in backbone)
        assert any(not torch.equal(first[n], second[n]) for n in first if n not in backbone)
        floats = [name for name in backbone if first[name].is_floating_point()]
        assert sum(torch.equal(second[n], fourth[n]) for n in floats) < 0.1 * len(floats)


def test_freeze_backbone_rejects_network_without_backbone(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "flat_network.py").write_text(
        "from torch import nn\n\ndef build(num_classes):\n    return nn.Conv2d(3, num_classes, 1)\n"
    )
    tiny["model"] |= {"name": "flat_network:build", "freeze_backbone": "1ep"}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with pytest.raises(
            ConfigError, match=r"model\.freeze_backbone: this network has no known backbone"
        ):
            main.main(tiny)
