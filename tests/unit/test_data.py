"""Tests of data.py."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.matching import list_samples
from errors import DataError
from tests.support.data import batches, build, digests, expected, folder, train  # noqa: F401
from transforms import build_ade20k_transformations


def test_batches_have_the_expected_shapes_and_images(folder: str) -> None:
    train, val = build(folder), build(folder, split="val")
    assert len(train.dataloader) == 5  # two of 22 samples are left out
    assert len(val.dataloader) == 2
    image, target = next(iter(train.dataloader))
    assert image.shape == (4, 3, 32, 32) and target.shape == (4, 32, 32)
    assert image.dtype == target.dtype == torch.uint8
    assert image.is_contiguous(memory_format=torch.channels_last)
    seen = torch.cat([image for image, _ in val.dataloader])
    both, *_ = build_ade20k_transformations("val", final_size=32)
    for image, sample in zip(seen, list_samples(folder, "val"), strict=True):
        expected, _ = both((Image.open(sample.image_path), Image.open(sample.mask_path)))
        assert (image.permute(1, 2, 0).numpy() == expected).all()
    assert len(build(folder, drop_last=False).dataloader) == 6
    with pytest.raises(DataError, match="22 samples do not fill one batch of 23"):
        build(folder, batch_size=23)


def test_options_are_passed_to_the_dataloader(folder: str) -> None:
    loader = build(folder, num_workers=1, prefetch_factor=3, pin_memory=False).dataloader
    assert (loader.num_workers, loader.prefetch_factor) == (1, 3)
    assert loader.persistent_workers
    assert build(folder, num_workers="auto").dataloader.num_workers >= 1
    with pytest.raises(DataError, match=r"num_classes: 254 is out of range; use 2 to 253"):
        build(folder, num_classes=254)


def test_batch_is_split_into_micro_batches_without_a_warning(
    folder: str, recwarn: pytest.WarningsRecorder
) -> None:
    spec = build(folder, split="val")
    batch = next(iter(spec.dataloader))
    for size, lengths in ((3, [3, 1]), (4, [4]), (8, [4])):
        parts = spec.split_batch(batch, size)
        assert [len(image) for image, _ in parts] == [len(target) for _, target in parts] == lengths
        assert torch.equal(torch.cat([target for _, target in parts]), batch[1])
    assert not recwarn.list


def test_epochs_differ_and_are_reproducible(folder: str, expected: list[list[str]]) -> None:
    assert len({digest for epoch in expected for digest in epoch}) == 60  # all samples differ
    assert digests(batches(build(folder), 1)) == expected[1]
    assert digests(batches(build(folder, seed=18), 1)) != expected[1]
    order = build(folder, shuffle_seed=5)
    order.dataloader.sampler.set_epoch(1)
    indices = [index for _, index, _ in order.dataloader.sampler]
    assert indices != [index for _, index, _ in build(folder).dataloader.sampler]


def test_samples_do_not_depend_on_the_batch_size(folder: str, expected: list[list[str]]) -> None:
    for size in (1, 3, 7):
        samples = digests(batches(build(folder, batch_size=size), 1))
        assert samples[:20] == expected[1][: len(samples)]


def test_loader_uses_no_global_random_numbers(folder: str) -> None:
    spec = build(folder)
    states = (random.getstate, lambda: pickle.dumps(np.random.get_state()), torch.get_rng_state)
    before = [state() for state in states]
    sample = spec.dataloader.dataset[(1, 3, -1)]
    first = spec.microbatch_transforms(spec.dataloader.collate_fn([sample]))
    list(spec.dataloader.sampler)
    assert torch.equal(before[2], torch.get_rng_state())
    assert before[:2] == [state() for state in states[:2]]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    sample = spec.dataloader.dataset[(1, 3, -1)]
    again = spec.microbatch_transforms(spec.dataloader.collate_fn([sample]))
    assert digests([first]) == digests([again])


def test_skipped_samples_are_not_read(folder: str) -> None:
    spec = build(folder)
    dataset = spec.dataloader.dataset
    dataset.load_state_dict({"epoch": 1, "sample_in_epoch": 16})
    dataset.samples = list(dataset.samples)
    order = dataset.order(np.arange(len(dataset)), 17, 1)
    for place in range(16):
        dataset.samples[order[place]] = None  # reading this sample would raise an error
    assert len(batches(spec, 1)) == 1
