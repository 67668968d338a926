"""Configs of runs with `save_best`, preset mIoU values, and readers of the saved checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing.stores import batch_of
from segmentation.metrics import MIoU

Scores = Callable[[Iterable[float]], None]


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Scores:
    """Return a function that presets the mIoU of each of the next evaluations."""

    def set_scores(values: Iterable[float]) -> None:
        remaining = iter(values)

        def compute(metric: MIoU) -> torch.Tensor:  # torchmetrics calls this once per evaluation
            metric.total_matrix = metric.matrix.clone()
            return torch.tensor(next(remaining))

        monkeypatch.setattr(MIoU, "compute", compute)

    return set_scores


def files(folder: Path) -> dict[str, int]:
    """Return the batch number of each checkpoint file and symbolic link in a folder."""
    return {path.name: batch_of(path.resolve().name) for path in sorted(folder.glob("*.pt*"))}


def record(path: Path) -> dict[str, Any]:
    state = torch.load(path, weights_only=False)["state"]
    return state["callbacks"]["Checkpoints"]


def saving(tiny: dict[str, Any], folder: Path, **keys: Any) -> dict[str, Any]:
    tiny |= {"save_folder": str(folder), "save_interval": "100ep", "eval_interval": "1ba"}
    return {**tiny, "save_best": True, "autoresume": True, **keys}
