"""What the tests of best share."""

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
    """Have the evaluations of runs come to given mIoUs, one after the other."""

    def give(values: Iterable[float]) -> None:
        left = iter(values)

        def compute(metric: MIoU) -> torch.Tensor:  # whose result torchmetrics keeps
            metric.total_matrix = metric.matrix.clone()
            return torch.tensor(next(left))

        monkeypatch.setattr(MIoU, "compute", compute)

    return give


def files(folder: Path) -> dict[str, int]:
    """The batches of the checkpoints in a folder, by the names of files and pointers."""
    return {path.name: batch_of(path.resolve().name) for path in sorted(folder.glob("*.pt*"))}


def record(path: Path) -> dict[str, Any]:
    state = torch.load(path, weights_only=False)["state"]
    return state["callbacks"]["Checkpoints"]


def saving(tiny: dict[str, Any], folder: Path, **keys: Any) -> dict[str, Any]:
    tiny |= {"save_folder": str(folder), "save_interval": "100ep", "eval_interval": "1ba"}
    return {**tiny, "save_best": True, "autoresume": True, **keys}
