"""How many pixels of each class a split has, and which of its photos show the class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dataset.description import Description
from dataset.folders import list_samples
from dataset.labels import Labels
from dataset.masks import Masks
from dataset.matching import list_described
from dataset.shards import cached_shards, open_shards, read_shard
from dataset.workers import available_cores, in_processes
from errors import DataError

CHUNK = 64  # masks a process counts between two reports


class Counts(NamedTuple):
    """What a split's masks hold.

    Attributes:
        pixels: (C,) int64, of each class.
        present: (samples, C) bool, in the order of the data set.
    """

    pixels: np.ndarray
    present: np.ndarray


def count_classes(
    path: str,
    local: str | None,
    is_streaming: bool,
    split: str,
    labels: Labels,
    description: Description | None = None,
    workers: int | None = None,
) -> Counts:
    """Count every mask of a split, in parallel, with a progress bar on stderr.

    Args:
        path: See `data.build_dataset`, as for the next two.
        local: Folder that shards are kept in.
        is_streaming: Whether it is MDS shards.
        split: 'train' or 'val'.
        labels: What the masks hold.
        description: Of a data set in another layout.
        workers: How many processes; None: one a core.

    Raises:
        DataError: A mask cannot be read, or holds what is no class.
    """
    tasks: dict[tuple[int, int], tuple] = {}  # by first sample and number of samples
    if is_streaming:
        shards = open_shards(path, local, split)
        for number, end in enumerate(shards.ends.tolist()):
            size = len(shards.shards[number])
            tasks[end - size, size] = _count_shard, path, local, split, number, Masks(labels)
    else:
        if description is None:
            samples, masks = list_samples(path, split), Masks(labels)
        else:
            samples = list_described(description, split, path)
            masks = Masks.of(description, split, path)
        paths = [sample.mask_path for sample in samples]
        for first in range(0, len(paths), CHUNK):
            chunk = paths[first : first + CHUNK]
            tasks[first, len(chunk)] = _count_files, chunk, masks.only(chunk)
    found: dict[int, np.ndarray] = {}
    total = sum(size for _, size in tasks)
    workers = workers or available_cores()
    with tqdm(total=total, unit=" masks", desc=f"count {split}", disable=None) as bar:
        for (first, size), counts in in_processes(tasks, workers):
            found[first] = counts
            bar.update(size)
    counts = np.concatenate([found[first] for first in sorted(found)])
    return Counts(counts.sum(0), counts > 0)


def _count(masks: Masks, data: bytes, path: str) -> np.ndarray:
    """Return (C,) pixels of each class in a mask."""
    labels = masks.labels
    try:
        counts = np.bincount(masks.decode(data, path).ravel(), minlength=256)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    classes = counts[labels.first : labels.last + 1]
    return np.where(labels.classes()[labels.first : labels.last + 1], classes, 0)


def _count_files(paths: list[str], masks: Masks) -> np.ndarray:
    try:
        return np.stack([_count(masks, Path(path).read_bytes(), path) for path in paths])
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error


def _count_shard(path: str, local: str | None, split: str, number: int, masks: Masks) -> np.ndarray:
    shards = cached_shards(path, local, split)
    was_there = os.path.exists(shards.path(number))
    samples = read_shard(shards, number)
    counts = [_count(masks, mask, f"{shards.location}, mask of {uid}") for uid, _, mask in samples]
    if shards.is_cache and not was_there:  # the cache may have a limit, which is training's
        shards.shards[number].evict()
    return np.stack(counts)
