"""model.freeze_backbone on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpointing.weights import load_weights
from tests.support.forked import run_ranks

pytestmark = pytest.mark.usefixtures("small_network")


EMA = {"half_life": "2ba", "update_interval": "1ba"}


def test_frozen_backbone_trains_on_two_ranks(tiny: dict[str, Any], tmp_path: Path) -> None:
    """DistributedDataParallel must not wait for the gradients of frozen weights."""
    tiny |= {"recipe_name": "hot", "hot": {"max_duration": "4ba", "ema": EMA}}
    tiny |= {"save_folder": str(tmp_path / "run"), "save_interval": "4ba"}
    name = (
        "mmseg:fastscnn/fast_scnn_lr0.12_8x4_160k_cityscapes"  # This network has auxiliary heads.
    )
    tiny["model"] |= {"name": name, "freeze_backbone": "2ba"}
    for dataset in ("train_dataset", "eval_dataset"):
        tiny[dataset]["final_size"] = 64
    assert run_ranks(tiny, str(tmp_path / "log"), 2) == [0, 0]
    assert load_weights(tmp_path / "run" / "latest-rank0.pt").network[0] == name
