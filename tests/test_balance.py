"""Rare classes: counts, weights, and photos that come up more often, whatever the processes."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from layouts import lay_out
from PIL import Image
from torch.utils.data import DataLoader

import data
import main as program
from convert_ade20k import convert
from data import build_ade20k_dataspec
from dataset.counts import Counts, count_classes
from dataset.description import ade20k, open_description
from dataset.labels import Labels
from dataset.matching import list_samples
from dataset.sampler import EpochSampler, length_of_repeated, repeated
from dataset.source import DataSource, ShardOptions
from errors import ConfigError, DataError
from model import ComposerDeepLabV3
from segmentation.losses import segmentation_loss
from training.class_weights import auto_weights, class_weights, repeat_factors
from training.config import resolve


@pytest.fixture(scope="module")
def present(synthetic: str) -> np.ndarray:
    """Which photo shows which class, counted one mask at a time."""
    rows = []
    for sample in list_samples(synthetic, "train"):
        values = np.unique(np.array(Image.open(sample.mask_path)))
        rows.append([label in values for label in range(1, 13)])
    return np.array(rows)


# Counting


def folders(path: str, labels: Labels) -> DataSource:
    """The training split of a data set in ADE20K's layout."""
    return DataSource(path, "train", ade20k(labels))


@pytest.mark.processes
def test_counts_of_folders_shards_and_descriptions(
    synthetic: str, present: np.ndarray, tmp_path: Path
) -> None:
    pixels = np.zeros(13, int)
    for sample in list_samples(synthetic, "train"):
        pixels += np.bincount(np.array(Image.open(sample.mask_path)).ravel(), minlength=13)
    convert(synthetic, str(tmp_path / "mds"), size_limit="40kb", workers=1)
    described = lay_out(synthetic, tmp_path / "merged", "merged", 12)
    root, description = open_description(str(described))
    assert description is not None
    mds, twelve = str(tmp_path / "mds"), ade20k(Labels(12))
    for found in (
        count_classes(folders(synthetic, Labels(12)), workers=1),
        count_classes(DataSource(mds, shards=ShardOptions(), description=twelve), workers=2),
        count_classes(DataSource(root, "train", description), workers=1),
    ):
        np.testing.assert_array_equal(found.pixels, pixels[1:])
        np.testing.assert_array_equal(found.present, present)
    ignoring = count_classes(folders(synthetic, Labels(12, True, 5)), workers=1)
    assert ignoring.pixels[4] == 0 and ignoring.pixels[3] == pixels[4]


@pytest.mark.processes
def test_a_wrong_mask_is_named(synthetic: str) -> None:
    with pytest.raises(DataError, match=r"ADE_train_\d+\.png: label .* classes are 1\.\.5"):
        count_classes(folders(synthetic, Labels(5)), workers=1)


# How often a photo is taken


def test_repeat_factors_are_those_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    present = rng.random((200, 6)) < [0.9, 0.5, 0.1, 0.02, 0.005, 0.0]
    present[7] = False
    for threshold in (0.001, 0.05, 0.3):
        expected = []
        for row in present:
            factor = 1.0
            for c in np.flatnonzero(row):
                share = sum(present[:, c]) / 200
                factor = max(factor, math.sqrt(threshold / share))
            expected.append(factor)
        np.testing.assert_allclose(repeat_factors(present, threshold), expected)
    assert repeat_factors(present, 0.3)[7] == 1


def test_takes_are_whole_and_right_on_average() -> None:
    rng = np.random.default_rng(1)
    factors = np.where(rng.random(50) < 0.3, 1 + 3 * rng.random(50), 1.0)
    length, epochs = length_of_repeated(factors), 2000
    assert 0 <= length - factors.sum() < 1
    total = np.zeros(50)
    for epoch in range(epochs):
        items = repeated(factors, 17, epoch)
        assert len(items) == length == len(set(items.tolist()))
        times = np.bincount(items % 50, minlength=50)
        stretched = factors * length / factors.sum()
        assert (times >= np.floor(stretched)).all() and (times <= np.ceil(stretched)).all()
        assert (items // 50 < times[items % 50]).all()  # the k-th take follows the others
        total += times
    chance = stretched % 1
    deviation = np.sqrt(chance * (1 - chance) / epochs)
    assert (np.abs(total / epochs - stretched) < 5 * deviation + 1e-9).all()
    np.testing.assert_array_equal(repeated(factors, 17, 3), repeated(factors, 17, 3))
    np.testing.assert_array_equal(repeated(np.ones(9), 17, 3), np.arange(9))


def build(path: str, **options: Any) -> Any:
    settings: dict[str, Any] = dict(
        is_streaming=False, batch_size=4, num_classes=12, base_size=32, final_size=32, num_workers=0
    )
    return build_ade20k_dataspec(path, **{**settings, "rare_class_sampling": 0.5, **options})


def digests(spec: Any, epoch: int) -> list[str]:
    """A word for each sample of an epoch, as the model gets it."""
    spec.dataloader.sampler.set_epoch(epoch)
    words = []
    for batch in spec.dataloader:
        for parts in zip(*spec.microbatch_transforms(batch)):
            content = b"".join(part.contiguous().numpy().tobytes() for part in parts)
            words.append(hashlib.sha1(content).hexdigest())
    return words


@pytest.mark.processes
def test_any_number_of_workers_and_ranks_and_a_resume(
    synthetic: str, present: np.ndarray, tmp_path: Path
) -> None:
    counts = count_classes(folders(synthetic, Labels(12)), workers=1)
    factors = repeat_factors(present, 0.5)
    whole = length_of_repeated(factors)
    assert whole > 16 + 4  # some are taken again
    spec = build(synthetic, counts=counts)
    assert len(spec.dataloader) == whole // 4
    expected = [digests(spec, epoch) for epoch in range(2)]
    assert len(set(expected[0] + expected[1])) == 2 * (whole // 4 * 4)  # no two crops alike
    assert [digests(build(synthetic), epoch) for epoch in range(2)] == expected  # counts by itself
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
            dataset.resume_with(sampler)
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


def test_rare_photos_come_up_more_often(synthetic: str, present: np.ndarray) -> None:
    counts = Counts(np.zeros(12), present)
    spec = build(synthetic, counts=counts)
    taken = np.zeros(16)
    for epoch in range(40):
        spec.dataloader.sampler.set_epoch(epoch)
        taken += np.bincount([item.index % 16 for item in spec.dataloader.sampler], minlength=16)
    factors = repeat_factors(present, 0.5)
    assert np.corrcoef(taken, factors)[0, 1] > 0.9
    off = build(synthetic, rare_class_sampling=None)
    assert off.dataloader.sampler.repeat_factors is None


def test_max_class_share_reaches_the_crop(synthetic: str) -> None:
    for share in (0.4, 1.0):
        spec = build(synthetic, rare_class_sampling=None, max_class_share=share)
        assert spec.dataloader.dataset.both_transforms.max_class_share == share


# Weights in the loss


def test_auto_weights_are_enets() -> None:
    pixels = np.array([400, 590, 10, 0])
    expected = [1 / math.log(1.02 + share) for share in (0.4, 0.59, 0.01, 0.0)]
    assert auto_weights(pixels) == pytest.approx(expected, rel=1e-12)
    assert auto_weights(pixels)[3] == pytest.approx(50.4983, abs=1e-3)


def weighted(tiny: dict[str, Any], given: Any, **more: Any) -> Any:
    names = str(Path(__file__).parent.parent / "yamls" / "demo_classes.txt")
    model = {**tiny["model"], "class_weights": given}
    return resolve({**tiny, "class_names": names, **more, "model": model})


def test_weights_by_list_and_by_name(tiny: dict[str, Any]) -> None:
    assert class_weights(weighted(tiny, None), None) is None
    assert class_weights(weighted(tiny, list(range(12))), None) == [float(i) for i in range(12)]
    by_name = class_weights(weighted(tiny, {"plain": 3, "waves": 0.5}), None)
    assert by_name == [3.0] + 10 * [1.0] + [0.5]
    assert class_weights(weighted(tiny, "auto", is_train=False), None) is None
    with pytest.raises(ConfigError, match="no class wave; did you mean waves"):
        class_weights(weighted(tiny, {"wave": 3}), None)
    with pytest.raises(ConfigError, match="auto counts the masks of train_dataset; give numbers"):
        class_weights(weighted(tiny, "auto"), None)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("some", "'some' is none of auto, a list and {name: weight}"),
        ([1, 2], "2 weights for 12 classes"),
        ([-1] * 12, "-1 is not a finite number of 0 or more"),
        ({"plain": "3"}, "'3' is not a finite number"),
        ([0] * 12, "all are 0: no loss is left"),
    ],
)
def test_wrong_weights_are_one_line(tiny: dict[str, Any], given: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"model.class_weights: {reason}"):
        weighted(tiny, given)


def test_the_model_hands_them_to_the_loss() -> None:
    weights = [3.0, 1.0, 0.5]
    model = ComposerDeepLabV3(torch.nn.Identity(), 3, -1, 0.375, 1.125, weights)
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.arange(2 * 16 * 16).view(2, 16, 16) % 4 - 1
    expected = segmentation_loss(logits, target, class_weights=torch.tensor(weights))
    assert model.loss(logits, (None, target)) == expected
    assert expected["total"] != segmentation_loss(logits, target)["total"]
    assert not model.state_dict()


@pytest.mark.trains
def test_a_run_counts_logs_and_resumes(
    tiny: dict[str, Any], synthetic: str, tmp_path: Path, small_network: None
) -> None:
    """With both, a run that was cut in an epoch ends with the weights of one that was not."""
    from composer.loggers import InMemoryLogger

    def run(name: str, *durations: str) -> tuple[list[torch.Tensor], str]:
        for duration in durations:
            config = {
                **tiny,
                "save_folder": str(tmp_path / name),
                "save_interval": "1ba",
                "autoresume": True,
                "max_duration": duration,
            }
            config["model"] = {**tiny["model"], "class_weights": "auto"}
            config["train_dataset"] = {**tiny["train_dataset"], "rare_class_sampling": 0.5}
            logger = InMemoryLogger()
            trainer = program.main(config, loggers=[logger])
            trainer.close()
        return list(trainer.state.model.parameters()), logger.hyperparameters["class_weights"]

    whole, line = run("whole", "9ba")
    cut, _ = run("cut", "1ba", "9ba")  # one step, as the schedule depends on the length
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    counts = count_classes(folders(synthetic, Labels(12)), workers=1)
    expected = auto_weights(counts.pixels)
    assert line == ", ".join(f"class {i} {weight:.4g}" for i, weight in enumerate(expected))


@pytest.mark.processes
def test_pixels_of_two_photos_by_hand(tmp_path: Path) -> None:
    for split in ("training", "validation"):
        for kind, name in (("images", "a.jpg"), ("annotations", "a.png")):
            (tmp_path / kind / split).mkdir(parents=True)
            cv2.imwrite(str(tmp_path / kind / split / name), np.array([[1, 2], [0, 2]], np.uint8))
    found = count_classes(folders(str(tmp_path), Labels(3)), workers=1)
    assert found.pixels.tolist() == [1, 2, 0] and found.present.tolist() == [[True, True, False]]
