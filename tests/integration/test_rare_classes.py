"""Rare-class sampling and class weights from pixel counts, for any number of workers and ranks."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

import data
import main as program
from convert_ade20k import convert
from data import build_ade20k_dataspec
from dataset.counts import Counts, count_classes
from dataset.labels import Labels
from dataset.sampler import EpochSampler, length_of_repeated
from tests.support.balance import folders, present  # noqa: F401
from training.class_weights import auto_weights, repeat_factors


def build(path: str, **options: Any) -> Any:
    settings: dict[str, Any] = dict(
        is_streaming=False, batch_size=4, num_classes=12, base_size=32, final_size=32, num_workers=0
    )
    return build_ade20k_dataspec(path, **{**settings, "rare_class_sampling": 0.5, **options})


def digests(spec: Any, epoch: int) -> list[str]:
    """Return the digests of all samples of an epoch, after the device transforms."""
    spec.dataloader.sampler.set_epoch(epoch)
    words = []
    for batch in spec.dataloader:
        for parts in zip(*spec.microbatch_transforms(batch)):
            content = b"".join(part.contiguous().numpy().tobytes() for part in parts)
            words.append(hashlib.sha1(content).hexdigest())
    return words


def test_rare_class_sampling_is_equal_for_any_workers_and_ranks(
    synthetic: str, present: np.ndarray, tmp_path: Path
) -> None:
    counts = count_classes(folders(synthetic, Labels(12)), workers=1)
    factors = repeat_factors(present, 0.5)
    epoch_length = length_of_repeated(factors)
    assert epoch_length > 16 + 4  # some images are repeated
    spec = build(synthetic, counts=counts)
    assert len(spec.dataloader) == epoch_length // 4
    expected = [digests(spec, epoch) for epoch in range(2)]
    assert len(set(expected[0] + expected[1])) == 2 * (
        epoch_length // 4 * 4
    )  # repeated images have different crops
    assert [
        digests(build(synthetic), epoch) for epoch in range(2)
    ] == expected  # the loader counts the classes itself
    several = build(synthetic, counts=counts, num_workers=2)
    assert [digests(several, epoch) for epoch in range(2)] == expected
    convert(synthetic, str(tmp_path), workers=1)
    shards = build(str(tmp_path), is_streaming=True, local=None, counts=counts)
    assert digests(shards, 1) == expected[1]
    for ranks in (2, 4):
        sides = []
        for rank in range(ranks):
            spec = build(synthetic, counts=counts)
            options = dict(num_replicas=ranks, rank=rank, repeat_factors=factors)
            dataset = spec.dataloader.dataset
            sampler = EpochSampler(dataset, 4 // ranks, **options)
            dataset.sampler = sampler
            dataset.load_state_dict({"epoch": 1, "sample_in_epoch": 8})
            loader = DataLoader(dataset, 4 // ranks, sampler=sampler, collate_fn=data.collate)
            spec.microbatch_transforms.epoch = lambda sampler=sampler: sampler.epoch
            spec.dataloader = loader
            sides.append(digests(spec, 1))
        size = 4 // ranks
        steps = [
            word
            for start in range(0, len(sides[0]), size)
            for side in sides
            for word in side[start : start + size]
        ]
        assert steps == expected[1][8:]


def test_images_of_rare_classes_are_sampled_more_often(synthetic: str, present: np.ndarray) -> None:
    counts = Counts(np.zeros(12), present)
    spec = build(synthetic, counts=counts)
    sample_counts = np.zeros(16)
    for epoch in range(40):
        spec.dataloader.sampler.set_epoch(epoch)
        sample_counts += np.bincount(
            [item.index % 16 for item in spec.dataloader.sampler], minlength=16
        )
    factors = repeat_factors(present, 0.5)
    assert np.corrcoef(sample_counts, factors)[0, 1] > 0.9
    off = build(synthetic, rare_class_sampling=None)
    assert off.dataloader.sampler.repeat_factors is None


def test_max_class_share_is_passed_to_random_crop(synthetic: str) -> None:
    for share in (0.4, 1.0):
        spec = build(synthetic, rare_class_sampling=None, max_class_share=share)
        assert spec.dataloader.dataset.both_transforms.max_class_share == share


def test_run_logs_class_weights_computed_from_pixel_counts(
    tiny: dict[str, Any], synthetic: str, small_network: None
) -> None:
    from composer.loggers import InMemoryLogger

    tiny["model"]["class_weights"] = "auto"
    tiny["train_dataset"]["rare_class_sampling"] = 0.5
    logger = InMemoryLogger()
    program.main(tiny, loggers=[logger]).close()
    counts = count_classes(folders(synthetic, Labels(12)), workers=1)
    expected = auto_weights(counts.pixels)
    line = ", ".join(f"class {i} {weight:.4g}" for i, weight in enumerate(expected))
    assert logger.hyperparameters["class_weights"] == line
