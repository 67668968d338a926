"""A small data set in ADE20K's layout, its loaders, and a model that records their batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from composer import ComposerModel, Trainer
from composer.core import DataSpec, Precision
from PIL import Image
from torch.utils.data import DataLoader

import data
from data import build_ade20k_dataspec
from dataset.paths import FOLDERS
from dataset.sampler import EpochSampler

SIZES = [(40, 56), (33, 64), (64, 48), (20, 90), (51, 51)]


def make_data(root: Path, training: int = 22, validation: int = 7, classes: int = 9) -> Path:
    """Write images of several sizes and their masks, with ADE20K's folders and file names."""
    rng = np.random.default_rng(0)
    for split, count in (("train", training), ("val", validation)):
        for number in range(1, count + 1):
            height, width = SIZES[number % len(SIZES)]
            small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            image = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
            mask = rng.integers(0, classes + 1, (4, 4), dtype=np.uint8)
            mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
            save(root, split, f"ADE_{split}_{number:08d}", image, mask)
    return root


def save(root: Path, split: str, name: str, image: np.ndarray, mask: np.ndarray) -> None:
    for kind, suffix, array in (("images", "jpg", image), ("annotations", "png", mask)):
        path = root / kind / FOLDERS[split] / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_data(tmp_path_factory.mktemp("data")))


def build(path: str, **options: Any) -> DataSpec:
    settings: dict[str, Any] = dict(
        is_streaming=False, batch_size=4, num_classes=9, base_size=32, final_size=32, num_workers=0
    )
    return build_ade20k_dataspec(path, **{**settings, **options})


def batches(spec: DataSpec, epoch: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the batches of an epoch as the model receives them."""
    spec.dataloader.sampler.set_epoch(epoch)
    return [spec.microbatch_transforms(batch) for batch in spec.dataloader]


def digests(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[str]:
    """Return a digest of each sample in the batches."""
    return [
        hashlib.sha1(image.numpy().tobytes() + target.numpy().tobytes()).hexdigest()[:12]
        for images, targets in batches
        for image, target in zip(images.contiguous(), targets)
    ]


@pytest.fixture(scope="module")
def expected(folder: str) -> list[list[str]]:
    """Return the sample digests of three epochs, loaded without worker processes."""
    spec = build(folder)
    return [digests(batches(spec, epoch)) for epoch in range(3)]


def on_rank(spec: DataSpec, rank: int, ranks: int, **options: Any) -> DataSpec:
    """Return a DataSpec that loads the share of one of several ranks."""
    loader = spec.dataloader
    size = loader.batch_size // ranks
    sampler = EpochSampler(loader.dataset, size, num_replicas=ranks, rank=rank, **options)
    loader.dataset.sampler = sampler
    loader = DataLoader(
        loader.dataset, size, sampler=sampler, collate_fn=data.collate, drop_last=sampler.drop_last
    )
    spec.microbatch_transforms.epoch = lambda: sampler.epoch
    return DataSpec(loader, microbatch_transforms=spec.microbatch_transforms)


class Recorder(ComposerModel):
    """A model that records the samples it receives."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[str] = []

    def forward(self, batch: Any) -> torch.Tensor:
        self.seen += digests([batch])
        return self.weight * batch[0].mean()

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return outputs


def train(spec: DataSpec, folder: Path, **options: Any) -> tuple[Recorder, Trainer]:
    model = Recorder()
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        precision=Precision.FP32,
        save_folder=str(folder),
        save_interval="1ba",
        save_filename="{batch}.pt",
        save_latest_filename=None,
        progress_bar=False,
        device_train_microbatch_size=2,
        **options,
    )
    trainer.fit()
    trainer.close()
    return model, trainer
