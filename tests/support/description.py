"""Data sets with a YAML description in each supported layout, and the batches of their loaders."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from data import build_ade20k_dataspec
from dataset.description import (
    parse_description,
)
from dataset.mask_decoder import Masks
from extras.preparation import check_command
from extras.preparation.synthetic import TEXTURES, make
from tests.support.layouts import LAYOUTS, lay_out

check = functools.partial(check_command.main, build_dataspec=build_ade20k_dataspec)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    make(str(path), training=9, validation=4, size=48, seed=1)  # every class occurs with this seed
    return path


@pytest.fixture(scope="module")
def laid_out(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the data set in every layout; return the description files."""
    root = tmp_path_factory.mktemp("layouts")
    return {name: lay_out(source, root / name, name, len(TEXTURES)) for name in LAYOUTS}


def batches(path: str | Path, split: str, **options: Any) -> list[list[bytes]]:
    """Return the bytes of the batches of two epochs, before and after the device transforms."""
    spec = build_ade20k_dataspec(
        str(path),
        False,
        None,
        batch_size=3,
        split=split,
        base_size=32,
        final_size=32,
        num_workers=0,
        **options,
    )
    contents = []
    for epoch in range(2):
        spec.dataloader.sampler.set_epoch(epoch)
        for batch in spec.dataloader:
            assert batch[1].dtype == torch.uint8
            parts = (*batch, *spec.microbatch_transforms(batch))
            contents.append([part.contiguous().numpy().tobytes() for part in parts])
    return contents


def tiny_run(description: Any, **more: Any) -> dict[str, Any]:
    dataset = {"base_size": 32, "final_size": 32, "batch_size": 4, "num_workers": 0}
    return {
        "run_name": "described",
        "data": description,
        "model": {"backbone_arch": "resnet50", "backbone_weights": None},
        "train_dataset": dict(dataset),
        "eval_dataset": dict(dataset),
        "optimizer": {"lr": 0.01},
        "max_duration": "2ep",
        "precision": "fp32",
        "pictures": 0,
        **more,
    }


def encode(array: np.ndarray, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, array)[1].tobytes()


def described(classes: dict[str, Any], ignore: Any = None) -> Masks:
    description = parse_description({"classes": classes, "ignore": ignore})
    return (
        Masks.of(description, "train", "")
        if description.sources
        else Masks(description.labels, description.values, description.in_colors)
    )


GOOD: dict[str, Any] = {
    "train": {"images": "a", "masks": "b"},
    "val": {"fraction": 0.5},
    "classes": {"road": {"labels": [1]}, "car": 2},
    "ignore": [0],
}
