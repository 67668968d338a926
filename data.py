"""ADE20K, or any data set in its layout, from local folders or from MDS shards.

    python data.py PATH               # check a data set before training on it
    python data.py s3://… LOCAL

What a sample becomes is a function of (seed, epoch, sample id) alone, whatever the number of workers and ranks, and
wherever a run resumes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import cv2
import numpy as np
import torch
from composer.core import DataSpec
from composer.utils import dist
from filelock import FileLock
from PIL import Image
from streaming.base.stream import Stream
from streaming.base.util import bytes_to_int
from streaming.base.world import World
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from transforms import (
    IGNORED,
    DeviceTransform,
    RandomCrop,
    Resize,
    build_ade20k_transformations,
    decode_image,
    decode_photo,
    decode_mask,
)

log = logging.getLogger(__name__)

FOLDERS = {"train": "training", "val": "validation"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
MASK_SUFFIXES = {".png", ".bmp", ".tif", ".tiff", ".gif"}


class DataError(ValueError):
    """The data set is not as training needs it. The message is one line that names the file or folder."""

    def __init__(self, message: str):
        # A DataLoader raises its worker's error again with the worker's traceback as the message.
        super().__init__(str(message).strip().rpartition("DataError: ")[2])


class Sample(NamedTuple):
    """One photo and its mask."""

    uid: str
    image_path: str
    mask_path: str


def list_samples(datadir: str, split: str) -> list[Sample]:
    """Every photo of a split with its mask, sorted by name.

    Args:
        datadir (str): Folder that holds `images/{training,validation}` and `annotations/{training,validation}`, or
            `ADEChallengeData2016` with these inside. Folders may be nested; names begin with anything.
        split (str): 'train' or 'val'.

    Returns:
        list[Sample]: `uid` is the photo's path without its extension and without ADE20K's `ADE_train_`.

    Raises:
        DataError: If a folder is missing or empty, or a photo has no mask.
    """
    if split not in FOLDERS:
        raise DataError(f"split is {split!r}, not 'train' or 'val'")
    root = Path(datadir)
    if not (root / "images").is_dir() and (root / "ADEChallengeData2016").is_dir():
        root = root / "ADEChallengeData2016"
    image_dir, mask_dir = (root / kind / FOLDERS[split] for kind in ("images", "annotations"))
    images, masks = _files(image_dir, IMAGE_SUFFIXES), _files(mask_dir, MASK_SUFFIXES)
    missing = [path for name, path in images.items() if name not in masks]
    if missing:
        more = f" (and {len(missing) - 1} more photos)" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]} has no mask in {mask_dir}{more}")
    if not images:
        raise DataError(f"{image_dir} holds no photos")
    if len(masks) > len(images):
        extra = min(path for name, path in masks.items() if name not in images)
        log.warning("%s has no photo in %s (%d such)", extra, image_dir, len(masks) - len(images))
    prefix = f"ADE_{split}_"
    return [
        Sample(name.removeprefix(prefix), str(images[name]), str(masks[name]))
        for name in sorted(images)
    ]


def _files(folder: Path, suffixes: set[str]) -> dict[str, Path]:
    """Files below `folder` with one of the suffixes, by path without suffix; hidden ones do not count."""
    if not folder.is_dir():
        raise DataError(f"folder {folder} does not exist")
    files: dict[str, Path] = {}
    for parent, directories, names in os.walk(folder, followlinks=True):
        directories[:] = [name for name in directories if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if path.suffix.lower() not in suffixes or name.startswith("."):
                continue
            key = path.relative_to(folder).with_suffix("").as_posix()
            if key in files:
                raise DataError(f"{path} and {files[key].name} have the same name")
            files[key] = path
    return files


class _Samples(Dataset):
    """What :class:`ADE20k` and :class:`StreamingADE20k` share: from encoded bytes to a transformed sample.

    An item is asked for by index, or by (epoch, index, index of a sample that is wanted soon).
    """

    def __init__(
        self,
        both_transforms: Callable | None,
        image_transforms: Callable | None,
        target_transforms: Callable | None,
        seed: int,
        num_classes: int,
        ignore_label: int | None,
    ):
        self.both_transforms = both_transforms
        self.image_transforms, self.target_transforms = image_transforms, target_transforms
        self.seed, self.num_classes, self.ignore_label = seed, num_classes, ignore_label
        self.sampler: EpochSampler | None = None

    def read(self, index: int) -> tuple[str, bytes, bytes, str]:
        """A sample's uid, encoded photo, encoded mask, and its name in messages."""
        raise NotImplementedError

    def prefetch(self, index: int) -> None:
        """The sample is wanted soon."""

    def __getitem__(self, item: int | tuple[int, int, int]) -> tuple[Any, Any]:
        epoch, index, ahead = (0, item, -1) if isinstance(item, (int, np.integer)) else item
        if ahead >= 0:
            self.prefetch(ahead)
        uid, photo, mask, name = self.read(index)
        try:
            return self._transform(uid, photo, mask, epoch)
        except ValueError as error:
            raise DataError(f"{name}: {error}") from error

    def _transform(self, uid: str, photo: bytes, mask: bytes, epoch: int) -> tuple[Any, Any]:
        labels = self._labels(decode_mask(mask))

        def image(reduction: int = 1) -> np.ndarray:
            return decode_photo(photo, labels.shape, reduction)

        if isinstance(self.both_transforms, (RandomCrop, Resize)):
            key = hashlib.blake2b(f"{self.seed}/{epoch}/{uid}".encode(), digest_size=16).digest()
            rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
            pair = self.both_transforms.apply(image, labels, rng)
        else:
            pair = Image.fromarray(image()), Image.fromarray(labels)
            if self.both_transforms:
                pair = self.both_transforms(pair)
        image_or_array, target = pair
        if self.image_transforms:
            image_or_array = self.image_transforms(image_or_array)
        if self.target_transforms:
            target = self.target_transforms(target)
        return image_or_array, target

    def _labels(self, mask: np.ndarray) -> np.ndarray:
        """Check the labels, and give ignored ones one value."""
        valid = mask <= self.num_classes
        if valid.all() and self.ignore_label is None:
            return mask
        ignored = mask >= IGNORED
        if self.ignore_label is not None:
            ignored |= mask == self.ignore_label
        bad = mask[~(valid | ignored)]
        if bad.size:
            raise ValueError(f"label {bad[0]} in the mask is not in 0..{self.num_classes}")
        return np.where(ignored, np.uint8(IGNORED), mask)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, int]:
        """What Composer saves: where in the epoch training is."""
        return {"epoch": self.sampler.epoch if self.sampler else 0, "sample_in_epoch": num_samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there; Composer then does not spin through the samples that were already seen."""
        if self.sampler and state:
            self.sampler.resume(state["epoch"], state["sample_in_epoch"])


class ADE20k(_Samples):
    """Photos and masks from local folders.

    Args:
        datadir (str): See :func:`list_samples`.
        split (str): 'train' or 'val'. Default: 'train'.
        both_transforms (Callable, optional): Applied to the (photo, mask) pair; either the one that
            :func:`transforms.build_ade20k_transformations` returns, or anything that takes a pair of Pillow images.
        image_transforms (Callable, optional): Applied to the photo.
        target_transforms (Callable, optional): Applied to the mask.
        seed (int): Seed of the random transforms. Default: 17.
        num_classes (int): Labels are 0..num_classes. Default: 150.
        ignore_label (int, optional): A label that is ignored, besides 255. Default: None.
    """

    def __init__(
        self,
        datadir: str,
        split: str = "train",
        both_transforms: Callable | None = None,
        image_transforms: Callable | None = None,
        target_transforms: Callable | None = None,
        seed: int = 17,
        num_classes: int = 150,
        ignore_label: int | None = None,
    ):
        super().__init__(
            both_transforms, image_transforms, target_transforms, seed, num_classes, ignore_label
        )
        self.samples = list_samples(datadir, split)

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[str, bytes, bytes, str]:
        uid, image_path, mask_path = self.samples[index]
        try:
            return uid, Path(image_path).read_bytes(), Path(mask_path).read_bytes(), image_path
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from error


class StreamingADE20k(_Samples):
    """Photos and masks from MDS shards with columns `uid`, `x` (encoded photo) and `y` (encoded mask).

    Shards are fetched when a sample of theirs, or one `predownload` samples ahead, is asked for, so that samples can be
    asked for in any order.

    Args:
        remote (str, optional): Folder or URL of any store that Streaming knows; None if `local` holds the shards.
        local (str, optional): Folder to keep shards in; None reads a `remote` folder in place.
        split (str): 'train' or 'val'.
        shuffle (bool): Whether :func:`build_ade20k_dataspec` shuffles. Default: True.
        base_size, min_resize_scale, max_resize_scale, final_size: See
            :func:`transforms.build_ade20k_transformations`.
        batch_size (int, optional): Unused; the reference needs it.
        seed, num_classes, ignore_label: See :class:`ADE20k`.
        cache_limit (int | str, optional): Bytes of shards to keep in `local`, as 10gb; least recently used ones go
            first. Default: None, no limit.
        download_retry (int): How often a failed download is tried again, waiting 1, 2, 4, ... s. Default: 6.
        download_timeout (float): Seconds to wait for a store's answer. Default: 60.
        validate_hash (str, optional): Hash to check downloaded shards with; 'auto' is the first that the index has.
            Default: 'auto'.

    Raises:
        DataError: If the index or a shard cannot be fetched or is damaged.
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
        num_classes: int = 150,
        ignore_label: int | None = None,
        cache_limit: int | str | None = None,
        download_retry: int = 6,
        download_timeout: float = 60,
        validate_hash: str | None = "auto",
    ):
        transforms = build_ade20k_transformations(
            split, base_size, min_resize_scale, max_resize_scale, final_size
        )
        super().__init__(*transforms, seed, num_classes, ignore_label)
        self.shuffle = shuffle
        self.cache_limit = bytes_to_int(cache_limit) if cache_limit else None
        if local is None and remote and "://" not in remote:
            remote, local = None, remote
        self.location = os.path.join(remote or local, split)
        try:
            self.stream = Stream(
                remote=remote,
                local=local,
                split=split,
                download_retry=1 + download_retry,
                download_timeout=download_timeout,
                keep_zip=False,
            )
            self.shards = self.stream.get_shards(World.detect(), False)
        except Exception as error:
            raise DataError(f"{self.location}: {_one_line(error)}") from error
        for shard in self.shards:
            if not {"uid", "x", "y"} <= set(shard.column_names):
                raise DataError(f"{self.location}: columns {shard.column_names}, not uid, x and y")
            encodings = dict(zip(shard.column_names, shard.column_encodings))
            shard.column_encodings = [
                "bytes" if name in ("x", "y") else encodings[name] for name in shard.column_names
            ]
        info = self.shards[0].zip_data or self.shards[0].raw_data
        if validate_hash == "auto":
            validate_hash = next(iter(sorted(info.hashes)), None)
        self.stream.validate_hash = validate_hash
        self.ends = np.cumsum([shard.samples for shard in self.shards])
        self.prefetcher: ThreadPoolExecutor | None = None
        self.wanted: set[int] = set()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "prefetcher": None, "wanted": set()}

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, int(index - (self.ends[shard] - self.shards[shard].samples))

    def read(self, index: int) -> tuple[str, bytes, bytes, str]:
        number, row = self._locate(index)
        shard = self.shards[number]
        while True:
            try:
                sample = shard[row]
                break
            except FileNotFoundError:
                self.fetch(number)
            except Exception as error:
                raise DataError(f"{self._path(number)} is damaged: {_one_line(error)}") from error
        uid = sample["uid"]
        uid = uid.decode() if isinstance(uid, bytes) else str(uid)
        if self.cache_limit:
            os.utime(self._path(number))
        return (
            uid,
            sample["x"],
            sample["y"],
            f"{self.location}/{shard.raw_data.basename}: sample {uid}",
        )

    def _path(self, number: int) -> str:
        return os.path.join(
            self.stream.local, self.stream.split, self.shards[number].raw_data.basename
        )

    def prefetch(self, index: int) -> None:
        number, _ = self._locate(index)
        if number in self.wanted or os.path.exists(self._path(number)):
            return
        self.wanted.add(number)
        self.prefetcher = self.prefetcher or ThreadPoolExecutor(1)
        self.prefetcher.submit(self._fetch_quietly, number)

    def _fetch_quietly(self, number: int) -> None:
        try:
            self.fetch(number)
        except DataError as error:
            log.warning("%s; it will be tried again", error)
        finally:
            self.wanted.discard(number)

    def fetch(self, number: int) -> None:
        """Have a shard in the cache, making room for it; one process of a machine fetches it."""
        shard, path = self.shards[number], self._path(number)
        with FileLock(path + ".lock"):
            if os.path.exists(path):
                return
            try:
                if self.cache_limit:
                    self._make_room(shard.get_max_size())
                self.stream.prepare_shard(shard)
            except Exception as error:
                shard.evict()
                name = f"{self.location}/{shard.raw_data.basename}"
                raise DataError(f"{name}: {_one_line(error)}") from error

    def _make_room(self, size: int) -> None:
        with FileLock(os.path.join(self.stream.local, self.stream.split, "cache.lock")):
            present = [n for n in range(len(self.shards)) if os.path.exists(self._path(n))]
            used = sum(self.shards[n].get_raw_size() for n in present)
            present.sort(key=lambda n: os.path.getmtime(self._path(n)), reverse=True)
            while present and used + size > self.cache_limit:
                used -= self.shards[present.pop()].evict()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's samples, a permutation of range(length)."""
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(length), kind="stable")


class EpochSampler(DistributedSampler):
    """A rank's samples of an epoch, in an order and with batches that do not depend on the number of ranks.

    The b-th batch of the run is the b-th piece of the epoch's order, and each rank has a contiguous part of it. Subclasses
    torch's sampler so that Composer calls `set_epoch`. Yields (epoch, index, index of the sample `ahead` places later).

    Args:
        dataset (_Samples): What is sampled.
        batch_size (int): Samples of a batch on one rank.
        seed (int): Seed of the order.
        shuffle (bool): Whether to shuffle.
        drop_last (bool): Whether a last, smaller batch is left out; otherwise it is filled up from the epoch's start
            until the ranks have equal parts.
        ahead (int): See above.
        num_replicas (int, optional): Number of ranks. Default: None, Composer's.
        rank (int, optional): This rank. Default: None, Composer's.
    """

    def __init__(
        self,
        dataset: _Samples,
        batch_size: int,
        seed: int = 17,
        shuffle: bool = True,
        drop_last: bool = True,
        ahead: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ):
        num_replicas = dist.get_world_size() if num_replicas is None else num_replicas
        rank = dist.get_global_rank() if rank is None else rank
        super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last)
        self.batch_size, self.ahead = batch_size, ahead
        self.resumed = (-1, 0)  # epoch, samples of it that were seen
        self.num_samples = len(self._part(len(dataset), 0))
        self.total_size = self.num_samples * num_replicas

    def resume(self, epoch: int, sample_in_epoch: int) -> None:
        """Leave out an epoch's first samples (counted over all ranks)."""
        self.resumed = (epoch, sample_in_epoch)

    def _part(self, length: int, start: int) -> np.ndarray:
        """Positions in the epoch's order that are this rank's, from `start` on."""
        batch = self.batch_size * self.num_replicas
        positions = np.arange(start, length)
        whole = len(positions) // batch * batch
        parts = (
            positions[:whole].reshape(-1, self.num_replicas, self.batch_size)[:, self.rank].ravel()
        )
        if self.drop_last or whole == len(positions):
            return parts
        rest = positions[whole:]
        rest = np.resize(rest, -(-len(rest) // self.num_replicas) * self.num_replicas)
        return np.concatenate([parts, rest.reshape(self.num_replicas, -1)[self.rank]])

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        length = len(self.dataset)
        order = epoch_order(length, self.seed, self.epoch) if self.shuffle else np.arange(length)
        start = self.resumed[1] if self.epoch == self.resumed[0] else 0
        indices = order[self._part(length, start)]
        later = np.full(len(indices), -1)
        if 0 < self.ahead < len(indices):
            later[: -self.ahead] = indices[self.ahead :]
        return zip([self.epoch] * len(indices), indices.tolist(), later.tolist())


class EvalSampler(DistributedSampler):
    """torch's sampler without shuffling (Composer takes its padding out again), yielding :class:`_Samples`' items."""

    def __init__(self, dataset: _Samples, ahead: int = 0):
        super().__init__(dataset, dist.get_world_size(), dist.get_global_rank(), shuffle=False)
        self.ahead = ahead

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        indices = list(super().__iter__())
        later = (indices[self.ahead :] if self.ahead else []) + [-1] * len(indices)
        return ((0, index, next_) for index, next_ in zip(indices, later))


def collate(samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples to a batch: photos (N, 3, H, W) uint8, in memory channels-last, and labels (N, H, W) uint8."""
    images, labels = zip(*samples)
    batch = torch.empty((len(images), *images[0].shape), dtype=torch.uint8)
    np.stack(images, out=batch.numpy())
    return batch.permute(0, 3, 1, 2), torch.from_numpy(np.stack(labels))


def _init_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def build_ade20k_dataspec(
    path: str,
    is_streaming: bool,
    local: str | None = None,
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
    distort: bool = True,
    shuffle_seed: int | None = None,
    cache_limit: int | str | None = None,
    predownload: int | None = None,
    download_retry: int = 6,
    download_timeout: float = 60,
    validate_hash: str | None = "auto",
    **dataloader_kwargs: Any,
) -> DataSpec:
    """Build the data of a split for Composer's Trainer. Evaluation sees every sample once, in order.

    Args:
        path (str): The data set's folder, or of shards the folder or URL.
        is_streaming (bool): Whether it is MDS shards.
        local (str, optional): Where shards are kept.
        batch_size (int): Samples of a batch on one rank.
        split (str): 'train' or 'val'. Default: 'train'.
        drop_last, shuffle (bool): For training; evaluation does neither. Default: True.
        base_size, min_resize_scale, max_resize_scale, final_size: See
            :func:`transforms.build_ade20k_transformations`.
        ignore_background (bool): Whether label 0 is ignored, and not a class. Default: True.
        seed (int): Seed of the order and the transforms. Default: 17.
        num_classes (int): Labels are 0..num_classes. Default: 150.
        ignore_label (int, optional): A label that is ignored, besides 255. Default: None.
        distort (bool): Whether training distorts colours. Default: True.
        shuffle_seed (int, optional): Seed of the order, if it differs from `seed`. Default: None.
        cache_limit, download_retry, download_timeout, validate_hash: See :class:`StreamingADE20k`.
        predownload (int, optional): How many samples ahead shards are fetched. Default: None, 8 batches.
        **dataloader_kwargs: For torch's DataLoader. Default: `num_workers` the cores that there are for a rank,
            `persistent_workers` True, `pin_memory` True if there is a GPU.

    Returns:
        DataSpec: Batches (N, 3, H, W) uint8 and (N, H, W) uint8 that :class:`transforms.DeviceTransform` prepares.

    Raises:
        DataError: If the data set is not as expected.
    """
    is_train = split == "train"
    sizes = dict(
        base_size=base_size,
        min_resize_scale=min_resize_scale,
        max_resize_scale=max_resize_scale,
        final_size=final_size,
    )
    labels = dict(seed=seed, num_classes=num_classes, ignore_label=ignore_label)
    if is_streaming:
        dataset = StreamingADE20k(
            path,
            local,
            split,
            shuffle,
            **sizes,
            **labels,
            cache_limit=cache_limit,
            download_retry=download_retry,
            download_timeout=download_timeout,
            validate_hash=validate_hash,
        )
    else:
        dataset = ADE20k(path, split, *build_ade20k_transformations(split, **sizes), **labels)
    ahead = (8 * batch_size if predownload is None else predownload) if is_streaming else 0
    if is_train:
        order_seed = seed if shuffle_seed is None else shuffle_seed
        sampler = EpochSampler(dataset, batch_size, order_seed, shuffle, drop_last, ahead)
        dataset.sampler = sampler
        if len(sampler) == 0 or (drop_last and len(sampler) < batch_size):
            raise DataError(f"{path}: {len(dataset)} training samples do not fill one batch")
    else:
        sampler = EvalSampler(dataset, ahead)
    dataloader_kwargs.setdefault(
        "num_workers", max(1, len(os.sched_getaffinity(0)) // dist.get_local_world_size())
    )
    if dataloader_kwargs["num_workers"] > 0:
        dataloader_kwargs.setdefault("persistent_workers", True)
        dataloader_kwargs.setdefault("worker_init_fn", _init_worker)
    dataloader_kwargs.setdefault("pin_memory", torch.cuda.is_available())
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last and is_train,
        collate_fn=collate,
        **dataloader_kwargs,
    )
    transform = DeviceTransform(
        num_classes, ignore_background, distort and is_train, seed, lambda: sampler.epoch
    )
    return DataSpec(loader, microbatch_transforms=transform)


def check_dataloader() -> None:
    """Check the data set that the command line names."""
    import validate

    sys.exit(validate.main(sys.argv[1:]))


if __name__ == "__main__":
    check_dataloader()
