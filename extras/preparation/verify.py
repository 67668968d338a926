"""Checks of a data set: file names, decoding, sizes, labels and shard hashes.

`check()` reads every file in parallel and returns a `Tally` for each split. check_command.py builds
its report from the tallies. convert_ade20k.py uses the same functions to verify its shards.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from dataset.decoding import decode_image, decode_image_for_mask, decode_mask
from dataset.description import SPLITS
from dataset.mask_decoder import Masks
from dataset.paths import Finding, Sample
from dataset.shards import read_shard
from dataset.source import Chunk, DataSource, ShardChunk
from dataset.workers import decoder_complaint, map_chunks
from errors import DataError, one_line

log = logging.getLogger(__name__)


@dataclass
class Tally:
    """The counts and the problems of a split, or of a part of it."""

    images: int = 0
    masks: int = 0
    # Width and height of each pair of a valid image and mask.
    sizes: list[tuple[int, int]] = field(default_factory=list)
    # Number of pixels with each label.
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    # Number of masks in which each label occurs.
    present: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    findings: list[Finding] = field(default_factory=list)
    # Name of each image, indexed by a hash of the file content.
    names_by_hash: dict[bytes, str] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Add the counts and problems of another part of the split.

        Args:
            other: Tally of the other part.
        """
        self.images += other.images
        self.masks += other.masks
        self.sizes += other.sizes
        self.pixels += other.pixels
        self.present += other.present
        self.findings += other.findings
        self.names_by_hash |= other.names_by_hash

    def find(self, path: str | Path, reason: str, fatal: bool = True) -> None:
        """Record a problem with a file.

        Args:
            path: Path of the file.
            reason: Description of the problem.
            fatal: Whether training would fail because of the problem.
        """
        self.findings.append(Finding(str(path), reason, fatal))

    def check(self, image: bytes, mask: bytes, names: tuple[str, str], masks: Masks) -> None:
        """Decode an image and its mask as training does, and count the labels.

        Args:
            image: Content of the image file.
            mask: Content of the mask file.
            names: Names of the image and of the mask, for messages.
            masks: Decoder for the mask.
        """
        self.names_by_hash[hashlib.blake2b(image, digest_size=16).digest()] = names[0]
        target = self._decode(lambda mask: masks.decode(mask, names[1]), mask, names[1])
        if target is None:
            self._decode(decode_image, image, names[0])
            return
        decoded = self._decode(
            lambda data: decode_image_for_mask(data, target.shape), image, names[0]
        )
        counts = np.bincount(target.ravel(), minlength=256)
        if not counts[masks.labels.classes()].any():
            self.find(
                names[1],
                "no pixel has a class, so training learns nothing from this mask",
                fatal=False,
            )
        if decoded is not None:
            self.sizes.append((decoded.shape[1], decoded.shape[0]))
            self.pixels += counts
            self.present += counts > 0

    def _decode(self, decoder: Callable, content: bytes, name: str) -> np.ndarray | None:
        try:
            image = decoder(content)
        except (ValueError, MemoryError, cv2.error) as error:
            self.find(name, one_line(error))
            image = None
        if (complaint := decoder_complaint()) and image is not None:
            self.find(name, f"can be decoded but is damaged ({complaint})", fatal=False)
        return image


def check_chunk(chunk: Chunk, masks: Masks) -> Tally:
    """Check the samples in a chunk. If it is a shard, also check its hash.

    Args:
        chunk: Samples in folders, or a shard.
        masks: Decoder for the masks.
    """
    tally = Tally()
    if isinstance(chunk, ShardChunk):
        shards = chunk.open()
        info = shards.shards[chunk.number].zip_data or shards.shards[chunk.number].raw_data
        name = f"{shards.location}/{info.basename}"
        try:
            for uid, image, mask in read_shard(shards, chunk.number):
                tally.images, tally.masks = tally.images + 1, tally.masks + 1
                tally.check(
                    image, mask, (f"{name}: image of {uid}", f"{name}: mask of {uid}"), masks
                )
        except DataError as error:
            tally.find(name, str(error).removeprefix(f"{name}: "))
        return tally
    for _, *names in chunk.samples:
        content = []
        for name in names:
            try:
                content.append(Path(name).read_bytes())
            except OSError as error:
                tally.find(name, f"cannot be read: {error.strerror}")
        if len(content) == 2:
            tally.check(content[0], content[1], (names[0], names[1]), masks)
    return tally


def read_pair(sample: Sample, masks: Masks | None) -> tuple[bytes, bytes, np.ndarray, np.ndarray]:
    """Read and decode a sample's image and mask.

    Args:
        sample: Paths of the image and of the mask.
        masks: Decoder for the mask, or None for a mask that contains labels.

    Returns:
        The encoded image, the encoded mask, the decoded image, and the labels.

    Raises:
        DataError: A file cannot be read or decoded, or the image and the mask differ in size.
    """
    try:
        data, mask = (Path(path).read_bytes() for path in (sample.image_path, sample.mask_path))
        labels = decode_mask(mask) if masks is None else masks.decode(mask, sample.mask_path)
    except (OSError, ValueError) as error:
        raise DataError(f"{sample.mask_path}: {error}") from error
    try:
        image = decode_image_for_mask(data, labels.shape)
    except ValueError as error:
        raise DataError(f"{sample.image_path}: {error}") from error
    return data, mask, image, labels


def check(source: DataSource, workers: int | None = None) -> dict[str, Tally]:
    """Check every sample of every split in parallel, with a progress bar on stderr.

    Args:
        source: Any split of the data set.
        workers: Number of processes; by default, one per core.

    Returns:
        One tally per split, indexed by the split's name.
    """
    tallies: dict[str, Tally] = {}
    chunks: list[tuple[Chunk, Masks]] = []
    splits: list[str] = []  # The split of each chunk.
    for split in SPLITS:
        part = source.of_split(split)
        tally = tallies[split] = Tally()
        if source.shards is None:
            listing = part.listing()
            tally.images, tally.masks = listing.images, len(listing.samples)
            tally.findings += listing.findings
            if listing.samples:
                chunks += part.chunks(listing.samples)
        else:
            try:
                chunks += part.chunks()
            except DataError as error:
                location = os.path.join(source.path, split)
                tally.find(location, str(error).removeprefix(f"{location}: "))
        splits += [split] * (len(chunks) - len(splits))
    for split, tally in zip(splits, map_chunks(check_chunk, chunks, workers, "check")):
        tallies[split].add(tally)
    # Report a folder's problems only once, even if both splits use it.
    train, val = tallies["train"], tallies["val"]
    val.findings = [finding for finding in val.findings if finding not in train.findings]
    both = train.names_by_hash.keys() & val.names_by_hash.keys()
    for digest in sorted(both, key=val.names_by_hash.__getitem__):
        name, other = val.names_by_hash[digest], train.names_by_hash[digest]
        alias = "" if name == other else f", in train as {other}"
        val.find(name, f"is in both splits{alias}", fatal=False)
    return tallies
