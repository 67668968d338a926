"""One split of a data set: its location, the meaning of its masks, and methods to read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset.description import Description, ade20k
from dataset.labels import Labels
from dataset.mask_decoder import Masks, UnknownValues
from dataset.matching import Listing, Samples, list_splits, require
from dataset.paths import Sample, find_root
from dataset.workers import chunked
from errors import DataError

if TYPE_CHECKING:
    from dataset.shards import Shards


@dataclass(frozen=True)
class ShardOptions:
    """Options for downloading and caching MDS shards; see `dataset.shards.Shards`."""

    local: str | None = None
    cache_limit: int | str | None = None
    download_retry: int = 6
    download_timeout: float = 60
    validate_hash: str | None = "auto"


@dataclass(frozen=True)
class DataSource:
    """One split of a data set.

    Attributes:
        path: Folder of the data set, or folder or URL of MDS shards.
        split: 'train' or 'val'.
        description: Layout of the folders and meaning of the mask values. Masks in shards already
            contain labels, as defined by the description that the shards were written with.
        shards: Options for MDS shards, or None if the data set is in folders.
    """

    path: str
    split: str = "train"
    description: Description = field(default_factory=ade20k)
    shards: ShardOptions | None = None
    _listings: dict[str, Listing] = field(default_factory=dict, compare=False, repr=False)

    @property
    def labels(self) -> Labels:
        """The meaning of the labels that the loader returns."""
        return self.description.labels

    @property
    def root(self) -> str:
        """The folder that the layout's paths are relative to."""
        return self.path if self.description.built_in is None else str(find_root(self.path))

    def of_split(self, split: str) -> DataSource:
        """Return a split of the same data set that shares the cached listings of its folders.

        Args:
            split: 'train' or 'val'.
        """
        return replace(self, split=split)

    def listing(self) -> Listing:
        """Return the split's image and mask pairs, and any problems with their file names.

        The files are listed only once per process.
        """
        if self.split not in self._listings:
            self._listings.update(list_splits(self.description, self.split, self.root))
        return self._listings[self.split]

    def samples(self) -> Samples:
        """Return the samples of a split stored in folders, sorted by name.

        Raises:
            DataError: The split has no images, or an image has no mask.
        """
        return require(self.listing())

    def masks(self) -> Masks:
        """Return a decoder for the split's masks.

        Raises:
            DataError: The JSON file of the panoptic segments cannot be read.
        """
        if self.shards is not None:
            return Masks(self.labels)
        return Masks.of(self.description, self.split, self.root)

    def open_shards(self) -> Shards:
        """Open the split's shards with the options of this source.

        Raises:
            DataError: The shards are missing or damaged.
        """
        from dataset.shards import Shards

        assert self.shards is not None
        return Shards(self.path, split=self.split, **asdict(self.shards))

    def chunks(self, samples: Samples | None = None) -> list[tuple[Chunk, Masks]]:
        """Divide the split into chunks for worker processes, each with a decoder for its masks.

        Args:
            samples: Samples to put into chunks, or None for all samples of the split. This argument
                is ignored if the split is stored as shards.
        """
        masks = self.masks()
        if self.shards is None:
            samples = self.samples() if samples is None else samples
            return [
                (FileChunk(part), masks.only(sample.mask_path for sample in part))
                for part in chunked(samples)
            ]
        from dataset.shards import open_shards

        location = self.path, self.shards.local, self.split
        shards = open_shards(*location).shards
        return [
            (ShardChunk(location, number, len(shard)), masks) for number, shard in enumerate(shards)
        ]


@dataclass(frozen=True)
class FileChunk:
    """A chunk of samples that are stored in folders."""

    samples: list[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def masks(self) -> Iterator[tuple[str, bytes]]:
        """Yield the name (for error messages) and the encoded file of each mask."""
        for sample in self.samples:
            try:
                data = Path(sample.mask_path).read_bytes()
            except OSError as error:
                raise DataError(f"{sample.mask_path}: {error.strerror}") from error
            yield sample.mask_path, data


@dataclass(frozen=True)
class ShardChunk:
    """A chunk that consists of one MDS shard.

    Attributes:
        location: Arguments of `dataset.shards.open_shards`.
        number: Number of the shard.
        size: Number of samples in the shard.
    """

    location: tuple[str, str | None, str]
    number: int
    size: int

    def __len__(self) -> int:
        return self.size

    def open(self) -> Shards:
        """Open the split that this shard belongs to."""
        from dataset.shards import cached_shards

        return cached_shards(*self.location)

    def masks(self) -> Iterator[tuple[str, bytes]]:
        """Yield the name (for error messages) and the encoded file of each mask."""
        from dataset.shards import read_shard

        shards = self.open()
        was_there = Path(shards.path(self.number)).exists()
        for uid, _, mask in read_shard(shards, self.number):
            yield f"{shards.location}, mask of {uid}", mask
        # If the shard was not in the cache before, remove it again, because training may limit the
        # cache's size.
        if shards.is_cache and not was_there:
            shards.shards[self.number].evict()


Chunk = FileChunk | ShardChunk


def check_labels(source: DataSource, max_masks: int = 64) -> None:
    """Check a sample of the masks for labels that do not match the model's classes.

    Args:
        source: The split to check.
        max_masks: Maximum number of masks to check, spread evenly over the split.

    Raises:
        DataError: A mask cannot be read or contains a label that is not a class.
    """
    samples, masks = source.samples(), source.masks()
    places = np.linspace(0, len(samples) - 1, min(max_masks, len(samples))).astype(int)
    for mask_path, data in FileChunk([samples[place] for place in places]).masks():
        try:
            masks.decode(data, mask_path)
        except ValueError as error:
            remedy = ""
            if isinstance(error, UnknownValues) and source.description.built_in is not None:
                remedy = "; set model.num_classes or ignore_label"
            raise DataError(f"{mask_path}: {error}{remedy}") from error
