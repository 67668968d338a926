"""Training and evaluation data: ADE20K, or any data set, in folders or MDS shards.

python data.py PATH                # check a data set before training on it
python data.py s3://... LOCAL

A training sample depends on its seed, epoch and sample ID alone, so a resumed run sees the same.
"""

from __future__ import annotations

from command_lines import parse_data, start

if __name__ == "__main__":
    start(parse_data)  # Parse the command line before the slow imports.

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
    """A data set in folders: images (3, H, W) and masks (H, W), both uint8 tensors.

    Args:
        datadir: See `list_samples`; the root folder if there is a description.
        split: 'train' or 'val'.
        both_transforms: Transform of the (image, mask) pair: either the result of
            `build_ade20k_transformations`, or a function of a pair of Pillow images.
        image_transforms: Transform of the image alone, applied next.
        target_transforms: Transform of the mask alone, applied next.
        seed: Seed of the random transforms.
        labels: Meaning of the labels in the masks.
        description: Layout of the folders and meaning of the masks; None: ADE20K's layout.
        source: The opened split; it replaces `datadir`, `split`, `labels` and `description`.

    Raises:
        DataError: Folders or masks are missing. A damaged file raises it on access.
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
        if source is None:
            source = DataSource(datadir, split, description or ade20k(labels))
        transforms = both_transforms, image_transforms, target_transforms
        super().__init__(transforms, seed, source.masks())
        self.samples: Sequence[Sample] = source.samples()

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[str, bytes, bytes, tuple[str, str]]:
        """Read a sample: its ID, the encoded image and mask, and the names of both files."""
        sample = self.samples[index]
        # `EncodedSamples` decodes the mask first, because it decides how large the image has to be.
        try:
            with open(sample.image_path, "rb") as image, open(sample.mask_path, "rb") as mask:
                return sample.uid, image.read(), mask.read(), sample[1:]
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from error


class StreamingADE20k(EncodedSamples):
    """A data set in MDS shards, with the samples and transforms of `ADE20k`.

    Shards have the columns `uid`, `x` (the encoded image) and `y` (the encoded mask). The order of
    samples is that of the same data in folders. If `cache_limit` is smaller than the data set, the
    order instead takes as many shards at a time as fit in the cache.

    Args:
        remote: Folder or URL (s3://...) that holds the folders `train` and `val`.
        local: Folder of the cache; None reads a `remote` folder in place.
        split: 'train' or 'val'.
        shuffle: Unused, because the sampler shuffles; the reference's scripts pass it.
        base_size: See `build_ade20k_transformations`.
        min_resize_scale: Smallest random scale.
        max_resize_scale: Largest random scale.
        final_size: Side of the resulting square, pixels.
        batch_size: Unused; the reference's scripts pass it.
        seed: Seed of the random transforms.
        labels: Meaning of the labels in the masks.
        transforms: Transforms of the pair, of the image and of the mask; they replace the
            transforms that the sizes describe.
        **cache: See `dataset.shards.Shards`.

    Raises:
        DataError: Shards are missing or damaged. Some damage shows only on access.
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
        # A run on folders need not import Streaming.
        from dataset.shards import Shards

        self.shards = Shards(remote, local, split, **cache)

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, index: int) -> tuple[str, bytes, bytes, tuple[str, str]]:
        """Read a sample: its ID, the encoded image and mask, and the names of both."""
        return self.shards.read(index)

    def prefetch(self, index: int) -> None:
        """Start to download a sample's shard in the background."""
        self.shards.prefetch(index)

    def order(self, items: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Return these samples in the order of an epoch."""
        at_once = self.shards.shards_at_once
        if at_once is None:  # The whole data set fits in the cache.
            return super().order(items, seed, epoch)
        # Shuffle the shards, take a group of them that fits, and shuffle the samples in each group.
        # A random order over all samples would download a shard for almost every sample.
        place = random_order(len(self.shards.shards), seed, epoch).argsort()
        group = place[self.shards.shard_of(items % len(self))] // at_once
        # lexsort orders by its last key first: by group, and by random numbers within a group.
        return items[np.lexsort((random_keys(len(items), seed, epoch), group))]


# The first arguments are those of MosaicML's reference. Newer arguments come after them.
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

    Batches hold images (N, 3, H, W) and labels (N, H, W), both uint8. On the device,
    `DeviceTransform` turns them into the input of the model. Evaluation sees every sample once and
    in order.

    Args:
        path: Folder of the data set; for shards, a folder or URL.
        is_streaming: Whether the data set is in MDS shards.
        local: Folder to cache shards in; None reads a folder of shards in place.
        batch_size: Number of samples in a batch of one rank.
        split: 'train' or 'val'.
        drop_last: Whether training leaves out the last batch of an epoch if it is not full.
        shuffle: Whether training shuffles.
        base_size: See `build_ade20k_transformations`.
        min_resize_scale: Smallest random scale.
        max_resize_scale: Largest random scale.
        final_size: Side of the resulting square, pixels.
        ignore_background: See `dataset.labels.Labels`.
        seed: Seed of the order of samples and of the augmentation.
        num_classes: Number of classes, 2 to 253.
        ignore_label: A further label to ignore.
        color_distortion: Whether training distorts colours.
        shuffle_seed: Seed of the order of samples alone; None: `seed`.
        predownload: Number of samples to download ahead; None: eight batches.
        cache_limit: See `dataset.shards.Shards`.
        download_retry: Number of retries of a failed download.
        download_timeout: Seconds to wait for an answer.
        validate_hash: Hash to check each downloaded shard with.
        num_workers: Number of loader processes; 'auto': one for each core of this rank, at most 8.
        description: Description of a data set that is not in ADE20K's layout. It replaces
            `num_classes`, `ignore_background` and `ignore_label`.
        max_class_share: See `transforms.RandomCrop`.
        rare_class_sampling: A class is rare if it is in less than this share of the images.
            Training repeats images of rare classes; see `training.class_weights.repeat_factors`.
        counts: Counts of the training masks; None: count the masks if rare classes need it.
        source: The opened split. It replaces the arguments that say where the data set is and what
            its masks hold.
        **dataloader_kwargs: Other arguments of torch's DataLoader. By default, workers persist, and
            memory is pinned if there is a GPU.

    Raises:
        DataError: The data set cannot be read, or it is too small for one batch.
    """
    # Two labels of a uint8 mask are reserved: 254 for ignored pixels and 255 for padding.
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
    sampler: EpochSampler | EvalSampler
    if is_train:
        factors = None
        if rare_class_sampling:
            from training.class_weights import sample_factors

            factors = sample_factors(source, rare_class_sampling, counts)
        order = (seed if shuffle_seed is None else shuffle_seed, shuffle, drop_last, distance)
        sampler = EpochSampler(dataset, batch_size, *order, repeat_factors=factors)
        dataset.resume_with(sampler)
        if len(sampler) < (batch_size if drop_last else 1):
            batch = batch_size * sampler.num_replicas
            count = f"{len(dataset)} samples do not fill one batch of {batch}"
            raise DataError(f"{path}: {count}; lower batch_size")
    else:
        sampler = EvalSampler(dataset, distance)  # Every image counts once.
    workers = default_workers() if isinstance(num_workers, str) else num_workers
    loader_options = dict(
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
    # On micro-batches: the float32 copy is four times as large as the uint8 batch.
    transform = DeviceTransform(labels, color_distortion and is_train, seed, lambda: sampler.epoch)
    return DataSpec(
        loader,
        microbatch_transforms=transform,
        # Composer's defaults form a reference cycle, and collecting it waits 5 s for each worker.
        batch_transforms=lambda batch: batch,
        get_num_samples_in_batch=lambda batch: len(batch[0]),
        get_num_tokens_in_batch=lambda batch: 0,
    )


def open_dataset(
    source: DataSource, transforms: Transforms = (None, None, None), seed: int = 17
) -> ADE20k | StreamingADE20k:
    """Open a split of a data set in folders or MDS shards.

    Args:
        source: Location and meaning of the split.
        transforms: Transforms of the pair, of the image and of the mask. Without any, samples are
            pairs of Pillow images.
        seed: Seed of the random transforms.

    Raises:
        DataError: The data set cannot be read.
    """
    path, split = source.path, source.split
    if source.shards is None:
        return ADE20k(path, split, *transforms, seed=seed, source=source)
    options = asdict(source.shards)
    labels, local = source.labels, options.pop("local")
    return StreamingADE20k(
        path, local, split, seed=seed, labels=labels, transforms=transforms, **options
    )


def build_data(
    config: Config, split: str, counts: Counts | None = None, source: DataSource | None = None
) -> DataSpec:
    """Build the DataSpec of one split of a run, after checking that its labels fit the model.

    Args:
        config: Config of the run.
        split: 'train' or 'val'.
        counts: Result of `training.build_recipe.count_training`, if rare classes need it.
        source: The split, if it is open already.

    Raises:
        DataError: The data set cannot be read, or its labels do not fit the model.
        ClassError: The shards were written with other classes than the run's.
    """
    dataset = config.train_dataset if split == "train" else config.eval_dataset
    source = source or data_sources(config)[split]
    arguments = asdict(dataset)
    # The YAML counts the images of all ranks. The config has been checked: the ranks divide them.
    arguments["batch_size"] //= dist.get_world_size()
    # A label without a class would otherwise end the run in the middle of an epoch.
    if source.shards is None:
        check_labels(source)
    else:
        from checkpointing.saver import on_first_process
        from dataset.shard_classes import check_shard_classes

        # Shards hold class indices, whose order the config can no longer change.
        classes = class_infos(config)
        on_first_process(lambda: check_shard_classes(source, classes))
    # Schedulers send SIGTERM to all processes. The run needs its loader until it has saved.
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
    """Build a run's training data, if it trains, its evaluation data, and the counts of its masks.

    The counts are None unless the config needs them. The errors are those of `build_data`.
    """
    sources = data_sources(config)
    counts = count_training(config, sources["train"])
    train = build_data(config, "train", counts, sources["train"]) if config.is_train else None
    return train, build_data(config, "val", source=sources["val"]), counts


def check_dataloader() -> None:
    """Check the data set that the command line names, and print the report.

    Raises:
        SystemExit: Training on the data set would fail, or the command line is wrong.
    """
    from extras.preparation.check_command import main

    if status := main(sys.argv[1:], build_ade20k_dataspec):
        sys.exit(status)


if __name__ == "__main__":
    check_dataloader()
