"""ADE20K, or any data set in its layout, from folders or from MDS shards.

python data.py PATH                # check a data set before training on it
python data.py s3://... LOCAL

A sample of training is a function of (seed, epoch, sample id) alone.
"""

from __future__ import annotations

from command_lines import parse_data, start

if __name__ == "__main__":
    start(parse_data)  # before the slow imports

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader

from dataset.description import Description, ade20k
from dataset.encoded import EncodedSamples, Transforms, collate
from dataset.labels import IGNORED, Labels
from dataset.mask_decoder import Masks
from dataset.matching import list_samples as list_samples  # part of the public interface
from dataset.paths import FOLDERS, Sample
from dataset.sampler import EpochSampler, EvalSampler, random_keys, random_order
from dataset.source import DataSource, ShardOptions, check_labels
from dataset.workers import available_cores, use_one_core
from errors import DataError
from training.build_recipe import count_training
from training.config import class_infos, data_sources
from training.distributed import LoaderContext, init_worker
from training.schema import Config
from transforms import DeviceTransform, build_ade20k_transformations

if TYPE_CHECKING:
    from dataset.counts import Counts


class ADE20k(EncodedSamples):
    """Photos and masks from folders, as (3, H, W) and (H, W) uint8 tensors.

    Args:
        datadir: See `list_samples`; of a described data set, its root.
        split: 'train' or 'val'.
        both_transforms: Transforms the (photo, mask) pair: what `build_ade20k_transformations`
            returns, or anything that takes a pair of Pillow images.
        image_transforms: Then transforms the photo.
        target_transforms: Then transforms the mask.
        seed: Seed of the random transforms.
        labels: What the masks hold.
        description: What the masks hold, and where they and the photos are, in place of ADE20K's
            layout.
        source: The split, in place of `datadir`, `split`, `labels` and `description`.

    Raises:
        DataError: Here, if folders or masks are missing; on access, if a file is not as it should.
    """

    def __init__(
        self,
        datadir: str,
        split: str = "train",
        both_transforms: Callable | None = None,
        image_transforms: Callable | None = None,
        target_transforms: Callable | None = None,
        seed: int = 17,
        labels: Labels | None = None,
        description: Description | None = None,
        source: DataSource | None = None,
    ) -> None:
        if split not in FOLDERS:
            raise DataError(f"split is {split!r}; use one of {', '.join(FOLDERS)}")
        if source is None:
            source = DataSource(datadir, split, description or ade20k(labels))
        transforms = both_transforms, image_transforms, target_transforms
        super().__init__(transforms, seed, source.masks())
        self.samples: Sequence[Sample] = source.samples()

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[str, bytes, bytes, tuple[str, str]]:
        """Read a sample's uid, encoded photo, encoded mask, and what to call photo and mask."""
        sample = self.samples[index]
        try:
            with open(sample.image_path, "rb") as image, open(sample.mask_path, "rb") as mask:
                return sample.uid, image.read(), mask.read(), sample[1:]
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from error


class StreamingADE20k(EncodedSamples):
    """Photos and masks from MDS shards, transformed as `ADE20k`'s.

    Shards have the columns `uid`, `x` (the encoded photo) and `y` (the encoded mask). Samples can
    be had in any order, so that it is the order of the same data in folders; only if `cache_limit`
    is less than the data set, the order goes through as many shards at a time as fit.

    Args:
        remote: Folder or URL (s3://...) with the folders `train` and `val`.
        local: Folder of the cache; None reads a `remote` folder in place.
        split: 'train' or 'val'.
        shuffle: Kept for the reference's scripts; the sampler shuffles.
        base_size: See `build_ade20k_transformations`, as for the next three.
        min_resize_scale: Least random scale.
        max_resize_scale: Greatest random scale.
        final_size: Side of what comes out, pixels.
        batch_size: Kept for the reference's scripts.
        seed: Seed of the random transforms.
        labels: What the masks hold.
        transforms: Of the pair, the photo and the mask, in place of those that the sizes give.
        **cache: See `dataset.shards.Shards`.

    Raises:
        DataError: Here or on access, if shards are missing or damaged.
    """

    def __init__(
        self,
        remote: str | None,
        local: str | None,
        split: str,
        shuffle: bool = True,
        base_size: int = 512,
        min_resize_scale: float = 0.5,
        max_resize_scale: float = 2.0,
        final_size: int = 512,
        batch_size: int | None = None,
        seed: int = 17,
        labels: Labels | None = None,
        transforms: Transforms | None = None,
        **cache: Any,
    ) -> None:
        if transforms is None:
            transforms = build_ade20k_transformations(
                split, base_size, min_resize_scale, max_resize_scale, final_size
            )
        super().__init__(transforms, seed, Masks(labels or Labels()))
        from dataset.shards import Shards

        self.shards = Shards(remote, local, split, **cache)

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, index: int) -> tuple[str, bytes, bytes, tuple[str, str]]:
        """Read a sample's uid, encoded photo, encoded mask, and what to call photo and mask."""
        return self.shards.read(index)

    def prefetch(self, index: int) -> None:
        """Have a sample's shard fetched in the background."""
        self.shards.prefetch(index)

    def order(self, items: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Return an epoch's samples in its order."""
        at_once = self.shards.shards_at_once
        if at_once is None:
            return super().order(items, seed, epoch)
        place = random_order(len(self.shards.shards), seed, epoch).argsort()  # of each shard
        group = place[self.shards.shard_of(items % len(self))] // at_once
        return items[np.lexsort((random_keys(len(items), seed, epoch), group))]


def build_ade20k_dataspec(
    path: str,
    is_streaming: bool = True,
    local: str | None = "/tmp/mds-cache/mds-ade20k/",
    *,
    batch_size: int,
    split: str = "train",
    drop_last: bool = True,
    shuffle: bool = True,
    base_size: int = 512,
    min_resize_scale: float = 0.5,
    max_resize_scale: float = 2.0,
    final_size: int = 512,
    ignore_background: bool = True,
    seed: int = 17,
    num_classes: int = 150,
    ignore_label: int | None = None,
    color_distortion: bool = True,
    shuffle_seed: int | None = None,
    predownload: int | None = None,
    cache_limit: int | str | None = None,
    download_retry: int = 6,
    download_timeout: float = 60,
    validate_hash: str | None = "auto",
    num_workers: int | str = "auto",
    description: Description | None = None,
    max_class_share: float = 0.75,
    rare_class_sampling: float | None = None,
    counts: Counts | None = None,
    source: DataSource | None = None,
    **dataloader_kwargs: Any,
) -> DataSpec:
    """Build a split's data for Composer's Trainer.

    Batches are photos (N, 3, H, W) and labels (N, H, W), both uint8, until `DeviceTransform` makes
    them what the model takes. Evaluation sees every sample once and in order.

    Args:
        path: Folder of the data set, or root of a described one; of shards, folder or URL.
        is_streaming: Whether it is MDS shards.
        local: Folder that shards are kept in; None reads those of a folder in place.
        batch_size: Samples in a rank's batch.
        split: 'train' or 'val'.
        drop_last: Whether training leaves out the last, smaller batch.
        shuffle: Whether training shuffles.
        base_size: See `build_ade20k_transformations`, as for the next three.
        min_resize_scale: Least random scale.
        max_resize_scale: Greatest random scale.
        final_size: Side of what comes out, pixels.
        ignore_background: See `dataset.labels.Labels`, as for `num_classes` and `ignore_label`.
        seed: Seed of order and augmentation.
        num_classes: Number of classes, 2 to 253.
        ignore_label: A further label to ignore.
        color_distortion: Whether training distorts colours.
        shuffle_seed: Seed of the order alone; None: `seed`.
        predownload: How many samples ahead shards are fetched; None: eight batches.
        cache_limit: See `dataset.shards.Shards`, as for the next three.
        download_retry: How often to try again.
        download_timeout: Seconds to wait for an answer.
        validate_hash: Hash to check each downloaded shard with.
        num_workers: Loader processes; 'auto': one a core that this rank has, eight at most.
        description: Of a data set that is not in ADE20K's layout; it says what its masks hold, in
            place of `num_classes`, `ignore_background` and `ignore_label`.
        max_class_share: See `transforms.RandomCrop`.
        rare_class_sampling: Share of the photos below which a class is rare, and training takes
            those that show it more often; see `training.class_weights.repeat_factors`.
        counts: Of the training masks, where they are known; else they are counted for that.
        source: The split. It takes the place of the arguments that say where the data set is and
            what its masks hold.
        **dataloader_kwargs: For torch's DataLoader. By default workers persist, and memory is
            pinned if there is a GPU.

    Raises:
        DataError: The data set is not as it should be.
    """
    if not 2 <= num_classes < IGNORED:
        raise DataError(f"num_classes is {num_classes}, not in 2..{IGNORED - 1}")
    is_train = split == "train"
    if source is None:
        labels = Labels(num_classes, ignore_background, ignore_label)
        options = ShardOptions(local, cache_limit, download_retry, download_timeout, validate_hash)
        description = description or ade20k(labels)
        source = DataSource(path, split, description, options if is_streaming else None)
    labels = source.labels
    sizes = (base_size, min_resize_scale, max_resize_scale, final_size)
    transforms = build_ade20k_transformations(split, *sizes, max_class_share, labels.classes())
    dataset = open_dataset(source, transforms, seed)
    distance = (8 * batch_size if predownload is None else predownload) if is_streaming else 0
    sampler: EpochSampler | EvalSampler
    if is_train:
        factors = None
        if rare_class_sampling:
            from training.class_weights import sample_factors

            factors = sample_factors(source, rare_class_sampling, counts)
        order_seed = seed if shuffle_seed is None else shuffle_seed
        sampler = EpochSampler(
            dataset, batch_size, order_seed, shuffle, drop_last, distance, repeat_factors=factors
        )
        dataset.resume_with(sampler)
        if len(sampler) < (batch_size if drop_last else 1):
            batch = batch_size * sampler.num_replicas
            raise DataError(f"{path}: {len(dataset)} samples do not fill one batch of {batch}")
    else:
        sampler = EvalSampler(dataset, distance)
    workers = _default_workers() if isinstance(num_workers, str) else num_workers
    options = dict(
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=collate,
        worker_init_fn=use_one_core,
    )
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last and is_train,
        num_workers=workers,
        **{**options, **dataloader_kwargs},
    )
    transform = DeviceTransform(labels, color_distortion and is_train, seed, lambda: sampler.epoch)
    return DataSpec(
        loader,
        microbatch_transforms=transform,
        # Composer's defaults are methods of the DataSpec: a cycle, which is collected with workers
        # that wait for 5 s each.
        batch_transforms=lambda batch: batch,
        get_num_samples_in_batch=lambda batch: len(batch[0]),
        get_num_tokens_in_batch=lambda batch: 0,
    )


def open_dataset(
    source: DataSource, transforms: Transforms = (None, None, None), seed: int = 17
) -> ADE20k | StreamingADE20k:
    """Open a split of a data set, folders or MDS shards.

    Args:
        source: The split.
        transforms: Of the pair, the image and the mask; without any, samples are Pillow images.
        seed: Seed of the random transforms.

    Raises:
        DataError: The data set is not as it should be.
    """
    path, split = source.path, source.split
    if source.shards is None:
        return ADE20k(path, split, *transforms, seed=seed, source=source)
    options = asdict(source.shards)
    labels, local = source.labels, options.pop("local")
    return StreamingADE20k(
        path, local, split, seed=seed, labels=labels, transforms=transforms, **options
    )


def _default_workers() -> int:
    """Return how many loader processes this rank has cores for, eight at most."""
    return min(8, max(1, available_cores() // dist.get_local_world_size()))


def build_data(
    config: Config, split: str, counts: Counts | None = None, source: DataSource | None = None
) -> DataSpec:
    """Build a split of a run for this process, after a look at whether its labels fit the model.

    Args:
        config: The run's.
        split: 'train' or 'val'.
        counts: What `class_weights.count_training` found, where rare classes need it.
        source: The split, if it is open already.

    Raises:
        DataError: The data set is not as it should be, or its labels do not fit.
        ClassError: Shards were written with other classes than the run's.
    """
    dataset = config.train_dataset if split == "train" else config.eval_dataset
    source = source or data_sources(config)[split]
    arguments = asdict(dataset)
    arguments["batch_size"] //= dist.get_world_size()
    if source.shards is None:
        check_labels(source)
    else:
        from checkpointing.saver import on_first_process
        from dataset.shard_classes import check_shard_classes

        # Shards hold class indices, whose order the config cannot change any more.
        classes = class_infos(config)
        on_first_process(lambda: check_shard_classes(source, classes))
    if arguments["num_workers"] != 0 and sys.platform == "linux":
        arguments |= {"worker_init_fn": init_worker, "multiprocessing_context": LoaderContext()}
    return build_ade20k_dataspec(
        **arguments,
        split=split,
        shuffle=split == "train",
        seed=config.seed,
        num_classes=config.model.num_classes,
        counts=counts,
        source=source,
    )


def build_run_data(config: Config) -> tuple[DataSpec | None, DataSpec, Counts | None]:
    """Build a run's training data, its evaluation data, and the counts of its training masks.

    An evaluation has no training data. The counts are None unless the config needs them. Errors are
    those of `build_data`.
    """
    sources = data_sources(config)
    counts = count_training(config, sources["train"])
    train = build_data(config, "train", counts, sources["train"]) if config.is_train else None
    return train, build_data(config, "val", source=sources["val"]), counts


def check_dataloader() -> None:
    """Check the data set that the command line names, and print the report.

    Raises:
        SystemExit: Training on it would fail, or the command line is wrong.
    """
    from extras.preparation.check_command import main

    if status := main(sys.argv[1:], build_ade20k_dataspec):
        sys.exit(status)


if __name__ == "__main__":
    check_dataloader()
