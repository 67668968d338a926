"""Tests of dataset/encoded.py."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch.utils.data import DataLoader

import data
from data import ADE20k
from errors import DataError
from tests.support.data import build, folder, make_data, save, train  # noqa: F401
from transforms import build_ade20k_transformations


def test_custom_transforms_receive_pillow_images(folder: str) -> None:
    def both(pair: tuple[Image.Image, Image.Image]) -> tuple[Image.Image, Image.Image]:
        assert [image.mode for image in pair] == ["RGB", "L"]
        return tuple(image.resize((30, 20), Image.NEAREST) for image in pair)

    dataset = ADE20k(folder, "val", both, TF.to_tensor, np.array)
    image, target = dataset[0]
    assert image.shape == (3, 20, 30) and image.dtype == torch.float32
    assert target.shape == (20, 30)
    image, target = ADE20k(folder, "val")[0]
    assert isinstance(image, Image.Image) and isinstance(target, Image.Image)


def test_custom_transforms_can_follow_the_built_in_transforms(folder: str) -> None:
    both, *_ = build_ade20k_transformations("train", 32, final_size=32)
    image, target = ADE20k(folder, "train", both, lambda image: image / 255, lambda t: t.long())[3]
    assert image.shape == (3, 32, 32) and image.max() <= 1
    assert target.dtype == torch.int64


def test_dataset_works_with_a_plain_pytorch_dataloader(folder: str) -> None:
    transforms = build_ade20k_transformations("train", 32, final_size=32)
    loader = DataLoader(ADE20k(folder, "train", *transforms), batch_size=4, shuffle=True)
    image, target = next(iter(loader))
    assert image.shape == (4, 3, 32, 32) and target.shape == (4, 32, 32)
    assert image.dtype == target.dtype == torch.uint8


@pytest.mark.parametrize("workers", [0, 2])
def test_one_line_error_names_the_bad_file(tmp_path: Path, workers: int) -> None:
    make_data(tmp_path, 5, 1)
    spec = build(str(tmp_path), batch_size=1)
    images, masks = tmp_path / "images/training", tmp_path / "annotations/training"
    (images / "ADE_train_00000001.jpg").write_bytes(b"")
    cut = images / "ADE_train_00000002.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    (masks / "ADE_train_00000003.png").write_bytes(b"<html>")
    Image.new("L", (5, 5)).save(masks / "ADE_train_00000004.png")
    (images / "ADE_train_00000005.jpg").unlink()
    faults = [
        ("image_path", "the file is empty"),
        ("image_path", "cannot be decoded: Truncated File Read"),
        ("mask_path", "unknown image format"),
        ("image_path", "the image is 51x51, but its mask is 5x5; export both at the same size"),
        ("image_path", "No such file or directory"),
    ]
    for sample, (kind, reason) in zip(spec.dataloader.dataset.samples, faults, strict=True):
        dataset = copy.copy(spec.dataloader.dataset)
        dataset.samples = [sample]
        loader = DataLoader(dataset, num_workers=workers, collate_fn=data.collate)
        iterator = iter(loader)
        with pytest.raises(DataError, match=f"^{getattr(sample, kind)}: {reason}$"):
            next(iterator)
        if workers:
            iterator._shutdown_workers()  # do not wait for the garbage collector


def test_crop_depends_on_the_sample_name_not_its_position(folder: str) -> None:
    spec, less = build(folder), build(folder)
    less.dataloader.dataset.samples = less.dataloader.dataset.samples[5:]
    for a, b in zip(spec.dataloader.dataset[(2, 8, -1)], less.dataloader.dataset[(2, 3, -1)]):
        assert torch.equal(a, b)
