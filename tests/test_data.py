"""Data sets in folders: what is found, what is refused, and that nothing but the seed decides."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import pickle
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from composer import ComposerModel, Trainer
from composer.core import DataSpec, Precision
from PIL import Image
from torch.utils.data import DataLoader

import data
from data import ADE20k, build_ade20k_dataspec
from dataset.labels import IGNORED, PADDING
from dataset.matching import list_samples
from dataset.paths import FOLDERS
from dataset.sampler import EpochSampler, EvalSampler
from errors import DataError
from transforms import RandomCrop, build_ade20k_transformations

SIZES = [(40, 56), (33, 64), (64, 48), (20, 90), (51, 51)]


def make_data(root: Path, training: int = 22, validation: int = 7, classes: int = 9) -> Path:
    """Photos of several sizes with masks, in ADE20K's folders and with its names."""
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
    """An epoch as the model gets it."""
    spec.dataloader.sampler.set_epoch(epoch)
    return [spec.microbatch_transforms(batch) for batch in spec.dataloader]


def digests(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[str]:
    """A word for each sample."""
    return [
        hashlib.sha1(image.numpy().tobytes() + target.numpy().tobytes()).hexdigest()[:12]
        for images, targets in batches
        for image, target in zip(images.contiguous(), targets)
    ]


# What is found


def test_finds_samples_with_any_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image, mask = np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.uint8)
    for name in ("ADE_train_00000002", "b", "street/7", "a.b"):
        save(tmp_path, "train", name, image, mask)
    images, masks = tmp_path / "images/training", tmp_path / "annotations/training"
    Image.fromarray(image).save(images / "UPPER.JPG", "JPEG")
    Image.fromarray(mask).save(masks / "UPPER.PNG", "PNG")
    for name in ("Thumbs.db", ".DS_Store", "._b.jpg", "notes.txt", "b.json"):
        (images / name).write_bytes(b"something else")
    (images / ".cache").mkdir()
    (images / ".cache/c.jpg").write_bytes(b"something else")
    Image.fromarray(mask).save(masks / "alone.png")
    with caplog.at_level(logging.WARNING):
        samples = list_samples(str(tmp_path), "train")
    assert [sample.uid for sample in samples] == ["00000002", "UPPER", "a.b", "b", "street/7"]
    assert samples[1].image_path.endswith("UPPER.JPG") and samples[1].mask_path.endswith(".PNG")
    assert "alone.png" in caplog.text


def test_looks_into_ade20ks_own_folder(tmp_path: Path) -> None:
    make_data(tmp_path / "ADEChallengeData2016", 2, 1)
    assert len(list_samples(str(tmp_path), "train")) == 2
    assert len(list_samples(str(tmp_path / "ADEChallengeData2016"), "val")) == 1


def test_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"images/training: folder is missing"):
        list_samples(str(tmp_path), "train")
    make_data(tmp_path, 5, 1)
    with pytest.raises(DataError, match="split is 'test'; use one of train, val"):
        list_samples(str(tmp_path), "test")
    for number in (2, 4):
        (tmp_path / f"annotations/training/ADE_train_{number:08d}.png").unlink()
    with pytest.raises(
        DataError, match=r"00000002.jpg: its mask is missing, .*training \(and 1 more such\)"
    ):
        list_samples(str(tmp_path), "train")
    for path in (tmp_path / "images/training").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="holds no photos"):
        list_samples(str(tmp_path), "train")
    save(tmp_path, "train", "a", np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.uint8))
    (tmp_path / "images/training/a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"same name as .*a\.jpg"):
        list_samples(str(tmp_path), "train")


# What the reference's scripts do


def test_transforms_of_ones_own_get_pillow_images(folder: str) -> None:
    def both(pair: tuple[Image.Image, Image.Image]) -> tuple[Image.Image, Image.Image]:
        assert [image.mode for image in pair] == ["RGB", "L"]
        return tuple(image.resize((30, 20), Image.NEAREST) for image in pair)

    dataset = ADE20k(folder, "val", both, TF.to_tensor, np.array)
    image, target = dataset[0]
    assert image.shape == (3, 20, 30) and image.dtype == torch.float32
    assert target.shape == (20, 30)
    image, target = ADE20k(folder, "val")[0]
    assert isinstance(image, Image.Image) and isinstance(target, Image.Image)


def test_own_transforms_can_follow_the_built_ones(folder: str) -> None:
    both, *_ = build_ade20k_transformations("train", 32, final_size=32)
    image, target = ADE20k(folder, "train", both, lambda image: image / 255, lambda t: t.long())[3]
    assert image.shape == (3, 32, 32) and image.max() <= 1
    assert target.dtype == torch.int64


def test_a_plain_dataloader_takes_the_data_set(folder: str) -> None:
    transforms = build_ade20k_transformations("train", 32, final_size=32)
    loader = DataLoader(ADE20k(folder, "train", *transforms), batch_size=4, shuffle=True)
    image, target = next(iter(loader))
    assert image.shape == (4, 3, 32, 32) and target.shape == (4, 32, 32)
    assert image.dtype == target.dtype == torch.uint8


# Batches


def test_batches_of_training_and_evaluation(folder: str) -> None:
    train, val = build(folder), build(folder, split="val")
    assert len(train.dataloader) == 5  # 22 samples: two are left out
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


@pytest.mark.processes
def test_options_reach_the_dataloader(folder: str) -> None:
    loader = build(folder, num_workers=1, prefetch_factor=3, pin_memory=False).dataloader
    assert (loader.num_workers, loader.prefetch_factor) == (1, 3)
    assert loader.persistent_workers
    assert build(folder, num_workers="auto").dataloader.num_workers >= 1
    with pytest.raises(DataError, match=r"num_classes is 254, not in 2..253"):
        build(folder, num_classes=254)


def test_labels_become_classes(tmp_path: Path) -> None:
    mask = np.repeat(np.array([0, 1, 2, 7, 255], np.uint8), 8)[None].repeat(40, 0)
    save(tmp_path, "val", "a", np.zeros((40, 40, 3), np.uint8), mask)

    def classes(**options: Any) -> list[int]:
        (_, target), *_ = batches(build(str(tmp_path), split="val", final_size=40, **options))
        return target[0, 0, ::8].tolist()

    assert classes(num_classes=7) == [-1, 0, 1, 6, -1]
    assert classes(num_classes=8, ignore_background=False) == [0, 1, 2, 7, -1]
    assert classes(num_classes=2, ignore_label=7) == [-1, 0, 1, -1, -1]
    assert classes(num_classes=9, ignore_label=2) == [-1, 0, -1, 6, -1]
    assert classes(num_classes=3, ignore_background=False, ignore_label=7) == [0, 1, 2, -1, -1]
    for options in ({"num_classes": 6}, {"num_classes": 7, "ignore_background": False}):
        with pytest.raises(DataError, match=r"a\.png: label 7 on .* classes are [01]\.\.6"):
            classes(**options)


def test_only_padding_is_black(tmp_path: Path) -> None:
    mask = np.ones((40, 40), np.uint8)
    mask[:20] = 255
    save(tmp_path, "train", "a", np.full((40, 40, 3), 200, np.uint8), mask)
    options = dict(batch_size=1, min_resize_scale=0.5, max_resize_scale=0.5, final_size=32)
    spec = build(str(tmp_path), **options)
    raw, labels = next(iter(spec.dataloader))
    assert set(labels.unique().tolist()) == {1, IGNORED, PADDING}
    image, target = spec.microbatch_transforms((raw, labels))
    assert ((image == 0).all(1) == (labels == PADDING)).all()
    assert ((target == -1) == (labels > 9)).all()


# What is refused, while training


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, workers: int) -> None:
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
        ("mask_path", "not an image"),
        ("image_path", "the photo is 51x51, its mask 5x5"),
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
            iterator._shutdown_workers()  # without waiting for the garbage collector


def test_a_data_error_stays_itself() -> None:
    error = DataError("a.jpg: not an image")
    assert str(pickle.loads(pickle.dumps(error))) == "a.jpg: not an image"
    wrapped = (
        f"Caught DataError in DataLoader worker process 0.\nTraceback:\nshards.DataError: {error}\n"
    )
    assert str(DataError(wrapped)) == "a.jpg: not an image"


# What decides


@pytest.fixture(scope="module")
def expected(folder: str) -> list[list[str]]:
    """The samples of three epochs, one after the other, in one process."""
    spec = build(folder)
    return [digests(batches(spec, epoch)) for epoch in range(3)]


def test_epochs_differ_and_repeat(folder: str, expected: list[list[str]]) -> None:
    assert len({digest for epoch in expected for digest in epoch}) == 60  # no sample twice alike
    assert digests(batches(build(folder), 1)) == expected[1]
    assert digests(batches(build(folder, seed=18), 1)) != expected[1]
    order = build(folder, shuffle_seed=5)
    order.dataloader.sampler.set_epoch(1)
    indices = [index for _, index, _ in order.dataloader.sampler]
    assert indices != [index for _, index, _ in build(folder).dataloader.sampler]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.processes
def test_any_number_of_workers(folder: str, expected: list[list[str]], workers: int) -> None:
    spec = build(folder, num_workers=workers)
    assert [digests(batches(spec, epoch)) for epoch in range(3)] == expected


def test_any_batch_size(folder: str, expected: list[list[str]]) -> None:
    for size in (1, 3, 7):
        found = digests(batches(build(folder, batch_size=size), 1))
        assert found[:20] == expected[1][: len(found)]


def on_rank(spec: DataSpec, rank: int, ranks: int, **options: Any) -> DataSpec:
    """The same data for one of several ranks."""
    loader = spec.dataloader
    size = loader.batch_size // ranks
    sampler = EpochSampler(loader.dataset, size, num_replicas=ranks, rank=rank, **options)
    loader.dataset.sampler = sampler
    loader = DataLoader(
        loader.dataset, size, sampler=sampler, collate_fn=data.collate, drop_last=sampler.drop_last
    )
    spec.microbatch_transforms.epoch = lambda: sampler.epoch
    return DataSpec(loader, microbatch_transforms=spec.microbatch_transforms)


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks(folder: str, expected: list[list[str]], ranks: int) -> None:
    sides = [batches(on_rank(build(folder), rank, ranks), 2) for rank in range(ranks)]
    assert {len(side) for side in sides} == {5}
    together = [parts for step in zip(*sides) for parts in step]  # a batch's parts, rank by rank
    assert digests(together) == expected[2]


def test_no_global_random_numbers(folder: str) -> None:
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


def test_a_samples_crop_depends_on_its_name_not_on_its_place(folder: str) -> None:
    spec, less = build(folder), build(folder)
    less.dataloader.dataset.samples = less.dataloader.dataset.samples[5:]
    for a, b in zip(spec.dataloader.dataset[(2, 8, -1)], less.dataloader.dataset[(2, 3, -1)]):
        assert torch.equal(a, b)


def test_every_order_is_a_permutation() -> None:
    class Numbers:
        def __len__(self) -> int:
            return 1000

        def order(self, items: np.ndarray, seed: int, epoch: int) -> np.ndarray:
            return items[data.random_order(1000, seed, epoch)]

    first = [EpochSampler(Numbers(), 10, num_replicas=1, rank=0) for _ in range(2)]
    first[1].set_epoch(1)
    orders = [[index for _, index, _ in sampler] for sampler in first]
    assert [sorted(order) for order in orders] == [list(range(1000))] * 2
    # Neither near its place nor near the other epoch's: correlations within 4 standard deviations
    matrix = np.corrcoef([*orders, np.arange(1000)])
    assert np.abs(matrix - np.eye(3)).max() < 4 / 1000**0.5


def test_incomplete_batches_are_shared_out(folder: str) -> None:
    dataset = build(folder).dataloader.dataset  # 22 samples
    options = dict(shuffle=False, drop_last=False, num_replicas=4)
    parts = [EpochSampler(dataset, 2, rank=rank, **options) for rank in range(4)]
    seen = [[index for _, index, _ in part] for part in parts]
    assert [len(part) for part in parts] == [len(each) for each in seen] == [6] * 4
    assert [each[4:] for each in seen] == [[16, 17], [18, 19], [20, 21], [16, 17]]
    one_more = [EpochSampler(dataset, 5, rank=rank, **options) for rank in range(4)]
    assert [[index for _, index, _ in part][5:] for part in one_more] == [[20], [21], [20], [21]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_evaluation_sees_every_sample_once(
    folder: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = build(folder, split="val").dataloader.dataset
    seen: list[list[int]] = []
    for rank in range(ranks):
        monkeypatch.setattr("dataset.sampler.dist.get_world_size", lambda: ranks)
        monkeypatch.setattr("dataset.sampler.dist.get_global_rank", lambda rank=rank: rank)
        sampler = EvalSampler(dataset, prefetch_distance=2)
        items = list(sampler)
        seen.append([index for _, index, _ in items])
        assert [later for *_, later in items] == [*seen[-1][2:], -1, -1]
    # As Composer does: the last sample of the last ranks is padding.
    padding = sampler.total_size - len(dataset)
    kept = [each[:-1] if rank >= ranks - padding else each for rank, each in enumerate(seen)]
    assert sorted(index for each in kept for index in each) == list(range(7))


# Resuming


class Recorder(ComposerModel):
    """Remembers the samples it is given."""

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


@pytest.mark.parametrize("spin_dataloaders", [False, True])
@pytest.mark.processes
def test_a_resumed_run_sees_the_rest(
    folder: str, expected: list[list[str]], tmp_path: Path, spin_dataloaders: bool
) -> None:
    options = dict(max_duration="3ep", spin_dataloaders=spin_dataloaders)
    whole, trainer = train(build(folder), tmp_path, **options)
    everything = [digest for epoch in expected for digest in epoch]
    assert whole.seen == everything
    for batch in (3, 5, 7):  # in mid-epoch, at the end of one, and in a later one
        model, trainer = train(
            build(folder, num_workers=2),
            tmp_path / str(batch),
            load_path=str(tmp_path / f"{batch}.pt"),
            **options,
        )
        assert model.seen == everything[4 * batch :]
        assert trainer.state.timestamp.epoch == 3 and trainer.state.timestamp.batch == 15


def test_a_run_that_ends_and_goes_on_in_mid_epoch(
    folder: str, expected: list[list[str]], tmp_path: Path
) -> None:
    train(build(folder), tmp_path, max_duration="7ba")
    model, trainer = train(
        build(folder), tmp_path / "b", load_path=str(tmp_path / "7.pt"), max_duration="10ba"
    )
    assert model.seen == expected[1][8:]
    # Ten batches are two epochs of five: the epoch's end is noticed though only 3 were loaded.
    assert trainer.state.timestamp.epoch == 2


@pytest.mark.parametrize(("ranks", "seen"), [(1, 8), (2, 8), (4, 8), (2, 12)])
def test_resuming_with_another_number_of_ranks(
    folder: str, expected: list[list[str]], ranks: int, seen: int
) -> None:
    state = build(folder).dataloader.dataset.state_dict(seen, True)
    sides = []
    for rank in range(ranks):
        spec = on_rank(build(folder), rank, ranks)
        spec.dataloader.dataset.load_state_dict(state)
        assert len(spec.dataloader) == 5  # the whole epoch's, which Composer compares with
        sides.append(batches(spec, 0))
        assert digests(batches(spec, 1))[:1] == [expected[1][rank * 4 // ranks]]
    together = [parts for step in zip(*sides) for parts in step]
    assert digests(together) == expected[0][seen:]


def test_skipped_samples_are_not_read(folder: str) -> None:
    spec = build(folder)
    dataset = spec.dataloader.dataset
    dataset.load_state_dict({"epoch": 1, "sample_in_epoch": 16})
    dataset.samples = list(dataset.samples)
    order = dataset.order(np.arange(len(dataset)), 17, 1)
    for place in range(16):
        dataset.samples[order[place]] = None  # would raise if it were read
    assert len(batches(spec, 1)) == 1


@pytest.mark.processes
def test_data_sets_can_be_sent_to_spawned_workers(folder: str) -> None:
    dataset = pickle.loads(pickle.dumps(build(folder).dataloader.dataset))
    assert isinstance(dataset.both_transforms, RandomCrop)
    assert len(dataset) == 22


def test_the_number_of_cores_is_asked_for_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no os.sched_getaffinity."""
    from dataset.workers import available_cores

    assert available_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores() == os.cpu_count()
    root = Path(__file__).parent.parent
    files = [
        *root.glob("*.py"),
        *(root / "dataset").glob("*.py"),
        *(root / "training").glob("*.py"),
    ]
    assert [f.name for f in files if "sched_getaffinity" in f.read_text()] == ["workers.py"]
