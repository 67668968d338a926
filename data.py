"""Data sets and loaders for ADE20K and other data, stored in folders or MDS shards.

python data.py PATH                # check a data set before training on it
python data.py s3://... LOCAL

A training sample depends only on its ID, the seed and the epoch, even after a resume.
"""

from __future__ import annotations

from command_lines import parse_data, start

if __name__ == "__main__":
    start(parse_data)  # Answer --help and reject bad options before the slow imports.

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
from dataset.matching import list_samples as list_samples  # Part of the public API.
from dataset.paths import FOLDERS, Sample
from dataset.sampler import EpochSampler, EvalSampler, random_keys, random_order
from dataset.source import DataSource, ShardOptions, check_labels
from dataset.workers import default_workers, use_one_core
from errors import DataError
from training.build_recipe import count_training
from training.config import class_infos, data_sources
from training.distributed import LoaderContext, init_worker
from training.schema import Config
from transforms import DeviceTransform, build_ade20k_transformations

if TYPE_CHECKING:
    from dataset.counts import Counts


class ADE20k(EncodedSamples):
    """A data set stored in folders, with images (3, H, W) and masks (H, W) as uint8 tensors.

    Args:
        datadir: Folder of the data set (see `list_samples`), or root of a described data set.
        split: 'train' or 'val'.
        both_transforms: Transform of the (image, mask) pair (see `build_ade20k_transformations`),
            or a function that takes a pair of Pillow images.
        image_transforms: Transform of the image alone, applied after `both_transforms`.
        target_transforms: Transform of the mask alone, applied after `both_transforms`.
        seed: Seed of the random transforms.
        labels: Meaning of the labels in the masks.
        description: Layout of the folders and meaning of the masks; None for ADE20K's layout.
        source: Split to use instead of `datadir`, `split`, `labels` and `description`.

    Raises:
        DataError: Folders or masks are missing. A damaged file raises it when the file is read.
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
            raise DataError(f"split: {split!r} is unknown; use {' or '.join(FOLDERS)}")
        source = source or DataSource(datadir, split, description or ade20k(labels))
        transforms = both_transforms, image_transforms, target_transforms
        super().__init__(transforms, seed, source.masks())
        self.samples: Sequence[Sample] = source.samples()

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[str, bytes, bytes, tuple[str, str]]:
        """Return a sample's ID, its encoded image and mask, and the names of both files."""
        sample = self.samples[index]
        # Return the encoded files, because the mask decides at which size the image is decoded.
        try:
            with open(sample.image_path, "rb") as image, open(sample.mask_path, "rb") as mask:
                return sample.uid, image.read(), mask.read(), sample[1:]
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from error


class StreamingADE20k(EncodedSamples):
    """A data set stored in MDS shards, with the same samples and transforms as `ADE20k`.

    Shards have the columns `uid`, `x` (the encoded image) and `y` (the encoded mask). The samples
    are in the same order as in `ADE20k`. If the data set is larger than `cache_limit`, samples are
    instead shuffled within groups of shards that fit in the cache.

    Args:
        remote: Folder or URL (s3://...) that contains the folders `train` and `val`.
        local: Cache folder, or None to read shards from a `remote` folder without copying them.
        split: 'train' or 'val'.
        shuffle: Unused, because the sampler shuffles; kept for scripts written for MosaicML's code.
        base_size: See `build_ade20k_transformations`.
        min_resize_scale: Smallest random scale.
        max_resize_scale: Largest random scale.
        final_size: Side of the resulting square, in pixels.
        batch_size: Unused; kept for scripts written for MosaicML's code.
        seed: Seed of the random transforms.
        labels: Meaning of the labels in the masks.
        transforms: Transforms of the pair, of the image and of the mask, to use instead of the
            transforms built from the sizes above.
        **cache: Options for downloads and the cache; see `dataset.shards.Shards`.

    Raises:
        DataError: Shards are missing or damaged. Some damage is found only when a sample is read.
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
        # Import this module lazily, because a run on image folders does not need Streaming.
        from dataset.shards import Shards

        self.shards = Shards(remote, local, split, **cache)

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, index: int) -> tuple[str, bytes, bytes, tuple[str, str]]:
        """Return a sample's ID, its encoded image and mask, and their names for error messages."""
        return self.shards.read(index)

    def prefetch(self, index: int) -> None:
        """Start downloading a sample's shard in the background."""
        self.shards.prefetch(index)

    def order(self, items: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Return the sample indices in the order in which this epoch visits them."""
        at_once = self.shards.shards_at_once
        if at_once is None:  # The cache can hold all shards, so shuffle all samples freely.
            return super().order(items, seed, epoch)
        # Shuffle the shards, split them into groups that fit in the cache, and shuffle within
        # groups. A fully random order would download a shard for almost every sample.
        place = random_order(len(self.shards.shards), seed, epoch).argsort()
        group = place[self.shards.shard_of(items % len(self))] // at_once
        # lexsort's last key has priority, so this sorts by group and shuffles within each group.
        return items[np.lexsort((random_keys(len(items), seed, epoch), group))]


# The parameters up to `ignore_background` match MosaicML's code; the later ones are new.
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
    """Build the DataSpec of a split for Composer's Trainer.

    Batches contain images (N, 3, H, W) and labels (N, H, W), both uint8. On the device,
    `DeviceTransform` turns batches into the model's input. Evaluation keeps the samples in order.

    Args:
        path: Folder of the data set, or folder or URL of its shards.
        is_streaming: Whether the data set is in MDS shards.
        local: Cache folder for shards, or None to read a folder of shards without copying them.
        batch_size: Number of samples per batch and rank.
        split: 'train' or 'val'.
        drop_last: Whether training skips the last batch of an epoch if it is incomplete.
        shuffle: Whether to shuffle the training samples.
        base_size: See `build_ade20k_transformations`.
        min_resize_scale: Smallest random scale.
        max_resize_scale: Largest random scale.
        final_size: Side of the resulting square, in pixels.
        ignore_background: See `dataset.labels.Labels`.
        seed: Seed of the sample order and of the augmentation.
        num_classes: Number of classes, 2 to 253.
        ignore_label: Additional label to ignore, or None.
        color_distortion: Whether to distort the colours of training images at random.
        shuffle_seed: Separate seed for the sample order, or None to use `seed`.
        predownload: Number of samples to download ahead, or None for eight batches.
        cache_limit: See `dataset.shards.Shards`.
        download_retry: Number of retries of a failed download.
        download_timeout: Seconds to wait for the store's response.
        validate_hash: Name of the hash used to verify each downloaded shard.
        num_workers: Number of loader processes per rank, or 'auto' for one per core, at most 8.
        description: Description of a data set that does not use ADE20K's layout. The description
            replaces `num_classes`, `ignore_background` and `ignore_label`.
        max_class_share: See `transforms.RandomCrop`.
        rare_class_sampling: Share of the images below which a class is considered rare. Training
            repeats images of rare classes; see `training.class_weights.repeat_factors`.
        counts: Class counts of the training masks. By default, they are counted here if rare-class
            sampling needs them.
        source: Split to use; it replaces the arguments for the data set's location and labels.
        **dataloader_kwargs: Other arguments of torch's DataLoader. By default, workers are
            persistent, and memory is pinned if there is a GPU.

    Raises:
        DataError: The data set cannot be read, or it is too small for one batch.
    """
    # Label 254 marks ignored pixels and label 255 marks padding, so neither can be a class.
    if not 2 <= num_classes < IGNORED:
        raise DataError(f"num_classes: {num_classes} is out of range; use 2 to {IGNORED - 1}")
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
    ranks = dist.get_world_size(), dist.get_global_rank()
    sampler: EpochSampler | EvalSampler
    if is_train:
        factors = None
        if rare_class_sampling:
            from training.class_weights import sample_factors

            factors = sample_factors(source, rare_class_sampling, counts)
        order = (seed if shuffle_seed is None else shuffle_seed, shuffle, drop_last, distance)
        sampler = EpochSampler(dataset, batch_size, *order, *ranks, repeat_factors=factors)
        dataset.sampler = sampler
        if len(sampler) < (batch_size if drop_last else 1):
            size = f"{len(dataset)} samples do not fill one batch of {batch_size * ranks[0]}"
            raise DataError(f"{path}: {size}; lower batch_size")
    else:
        sampler = EvalSampler(dataset, distance, *ranks)
    workers = default_workers() if isinstance(num_workers, str) else num_workers
    loader_options: dict[str, Any] = dict(
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=collate,
        worker_init_fn=use_one_core,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last and is_train,
        num_workers=workers,
    )
    loader = DataLoader(dataset, **{**loader_options, **dataloader_kwargs})
    # Transform one micro-batch at a time, because float32 takes four times the memory of uint8.
    transform = DeviceTransform(labels, color_distortion and is_train, seed, lambda: sampler.epoch)
    return DataSpec(
        loader,
        microbatch_transforms=transform,
        # Composer's default batch_transforms creates a reference cycle, which takes 5 s per worker
        # to collect. Its default split_batch warns if a batch is smaller than a micro-batch.
        batch_transforms=lambda batch: batch,
        split_batch=lambda batch, size: list(zip(*(part.split(size) for part in batch))),
        get_num_samples_in_batch=lambda batch: len(batch[0]),
        get_num_tokens_in_batch=lambda batch: 0,
    )


def open_dataset(
    source: DataSource, transforms: Transforms = (None, None, None), seed: int = 17
) -> ADE20k | StreamingADE20k:
    """Open a split of a data set that is stored in folders or MDS shards.

    Args:
        source: Location of the split and meaning of its labels.
        transforms: Transforms of the image and mask together, of the image alone, and of the mask
            alone. Without transforms, samples are pairs of Pillow images.
        seed: Seed of the random transforms.

    Raises:
        DataError: The data set cannot be read.
    """
    path, split = source.path, source.split
    if source.shards is None:
        return ADE20k(path, split, *transforms, seed=seed, source=source)
    options = asdict(source.shards)
    return StreamingADE20k(
        path, split=split, seed=seed, labels=source.labels, transforms=transforms, **options
    )


def build_data(
    config: Config, split: str, counts: Counts | None = None, source: DataSource | None = None
) -> DataSpec:
    """Build the DataSpec of one split, after checking that the labels match the model's classes.

    Args:
        config: Config of the run.
        split: 'train' or 'val'.
        counts: Class counts from `training.build_recipe.count_training`, needed for rare-class
            sampling.
        source: The split, if it has already been opened.

    Raises:
        DataError: The data set cannot be read, or its labels do not match the model's classes.
        ClassError: The classes of the shards differ from the classes of the run.
    """
    source = source or data_sources(config)[split]
    arguments = asdict(config.train_dataset if split == "train" else config.eval_dataset)
    # The batch size in the YAML is the total over all ranks. The config check has ensured that the
    # ranks can share it equally.
    arguments["batch_size"] //= dist.get_world_size()
    # Check the labels now, because an unknown label would end the run in the middle of an epoch.
    if source.shards is None:
        check_labels(source)
    else:
        from checkpointing.saver import on_first_process
        from dataset.shard_classes import check_shard_classes

        # Shards store the classes in a fixed order, which the config cannot change.
        classes = class_infos(config)
        on_first_process(lambda: check_shard_classes(source, classes))
    # Loader processes ignore SIGTERM, because the run needs them to finish its current batch.
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
    """Build a run's training and evaluation data, and count the classes in its training masks.

    Return None for data and counts that the run does not need. See `build_data` for the errors.
    """
    sources = data_sources(config)
    counts = count_training(config, sources["train"])
    train = build_data(config, "train", counts, sources["train"]) if config.is_train else None
    return train, build_data(config, "val", source=sources["val"]), counts


def check_dataloader() -> None:
    """Check the data set named on the command line, and print a report.

    Raises:
        SystemExit: Training on the data set would fail, or the command line is invalid.
    """
    from extras.preparation.check_command import main

    if status := main(sys.argv[1:], build_ade20k_dataspec):
        sys.exit(status)


if __name__ == "__main__":
    check_dataloader()
