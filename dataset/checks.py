"""What can be wrong with a data set: names, decoding, sizes and labels of files, hashes of shards.

`check()` looks at every file in parallel and returns a `Tally` for each split, of which
report.py makes the report; convert_ade20k.py reads what it wrote back with the same functions.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from dataset.decoding import decode_image, decode_photo
from dataset.description import Description, parse_description, read_description
from dataset.folders import (
    FOLDERS,
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    find_root,
    list_samples,
    visible_files,
)
from dataset.labels import Labels
from dataset.masks import Masks, UnknownValues
from dataset.matching import find_samples, list_described
from dataset.shards import DESCRIPTION, cached_shards, fetch_beside, open_shards, read_shard
from dataset.workers import decoder_complaint, in_processes
from errors import ClassError, DataError, one_line
from segmentation.classes import ClassInfo, first_difference, match_classes

CHUNK = 64  # samples a process checks between two reports


class Finding(NamedTuple):
    """Something wrong with a file."""

    path: str
    reason: str
    fatal: bool  # training would fail; otherwise it is odd, but trained on


@dataclass
class Tally:
    """What was seen of a split, or of a part of it."""

    photos: int = 0
    masks: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)  # width, height of each good pair
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # of each label
    present: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # masks with it
    findings: list[Finding] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add what was seen of another part."""
        self.photos += other.photos
        self.masks += other.masks
        self.sizes += other.sizes
        self.pixels += other.pixels
        self.present += other.present
        self.findings += other.findings

    def find(self, path: str | Path, reason: str, fatal: bool = True) -> None:
        """Note something wrong with a file."""
        self.findings.append(Finding(str(path), reason, fatal))

    def check(self, photo: bytes, mask: bytes, names: tuple[str, str], masks: Masks) -> None:
        """Decode a pair as training does, and count its labels. `names` are the files' names."""
        target = self._decode(lambda mask: masks.decode(mask, names[1]), mask, names[1])
        if target is None:
            self._decode(decode_image, photo, names[0])
            return
        image = self._decode(lambda photo: decode_photo(photo, target.shape), photo, names[0])
        counts = np.bincount(target.ravel(), minlength=256)
        if not counts[masks.labels.classes()].any():
            self.find(names[1], "not one pixel has a class, nothing is learnt", fatal=False)
        if image is not None:
            self.sizes.append((image.shape[1], image.shape[0]))
            self.pixels += counts
            self.present += counts > 0

    def _decode(self, decoder: Callable, content: bytes, name: str) -> np.ndarray | None:
        try:
            image = decoder(content)
        except (ValueError, MemoryError, cv2.error) as error:
            self.find(name, one_line(error))
            image = None
        if (complaint := decoder_complaint()) and image is not None:
            self.find(name, f"damaged inside, though it decodes ({complaint})", fatal=False)
        return image


def scan(
    path: str, split: str, description: Description | None = None
) -> tuple[list[tuple[str, str]], Tally]:
    """Pair a split's photos and masks in local folders, and find what is wrong with their names."""
    tally = Tally()
    if description is not None:
        samples, problems = find_samples(description, split, path)
        tally.photos = tally.masks = len(samples)
        for problem in problems:
            tally.find(*problem)
        return [sample[1:] for sample in samples], tally
    root = find_root(path)
    folders = [root / kind / FOLDERS[split] for kind in ("images", "annotations")]
    images = _files(folders[0], IMAGE_SUFFIXES, "photo", tally)
    masks = _files(folders[1], MASK_SUFFIXES, "mask", tally)
    tally.photos, tally.masks = len(images), len(masks)
    for name in sorted(images.keys() - masks.keys()):
        tally.find(images[name], f"its mask is missing, {folders[1] / name}.png")
    for name in sorted(masks.keys() - images.keys()):
        tally.find(masks[name], f"its photo is missing, {folders[0] / name}.jpg", fatal=False)
    if folders[0].is_dir() and not images:
        tally.find(folders[0], "holds no photos")
    for folder in folders:
        for file in folder.parent.glob("[!.]*") if split == "train" else ():
            if file.is_file():
                tally.find(file, f"not in {' or '.join(FOLDERS.values())}", fatal=False)
    return [(images[name], masks[name]) for name in sorted(images.keys() & masks.keys())], tally


def _files(folder: Path, suffixes: set[str], kind: str, tally: Tally) -> dict[str, str]:
    """Files by name as training matches them, with a finding for each that it does not use."""
    if not folder.is_dir():
        tally.find(folder, "folder is missing")
    files: dict[str, str] = {}
    for name, file in visible_files(folder):
        if file.suffix.lower() not in suffixes:
            tally.find(file, f"not the name of a {kind}, training does not use it", fatal=False)
        elif name in files:
            tally.find(file, f"same name as {Path(files[name]).name}")
        else:
            files[name] = str(file)
    return files


def check_files(pairs: list[tuple[str, str]], masks: Masks) -> Tally:
    """Check pairs of files."""
    tally = Tally()
    for names in pairs:
        content = []
        for name in names:
            try:
                content.append(Path(name).read_bytes())
            except OSError as error:
                tally.find(name, f"cannot be read: {error.strerror}")
        if len(content) == 2:
            tally.check(content[0], content[1], names, masks)
    return tally


def check_shard(path: str, local: str | None, split: str, number: int, masks: Masks) -> Tally:
    """Check one shard: its hash and every sample."""
    tally = Tally()
    shards = cached_shards(path, local, split)
    info = shards.shards[number].zip_data or shards.shards[number].raw_data
    name = f"{shards.location}/{info.basename}"
    try:
        for uid, photo, mask in read_shard(shards, number):
            tally.photos, tally.masks = tally.photos + 1, tally.masks + 1
            tally.check(photo, mask, (f"{name}: x of {uid}", f"{name}: y of {uid}"), masks)
    except DataError as error:
        tally.find(name, str(error).removeprefix(f"{name}: "))
    return tally


def check(
    path: str,
    local: str | None,
    is_streaming: bool,
    labels: Labels,
    workers: int,
    description: Description | None = None,
) -> dict[str, Tally]:
    """Check every sample of every split, with a progress bar on stderr."""
    tallies: dict[str, Tally] = {}
    tasks: dict[tuple[str, int, int], tuple] = {}  # by split, first sample and number of samples
    for split in FOLDERS:
        tallies[split], masks = Tally(), Masks(labels)
        if is_streaming:
            try:
                shards = open_shards(path, local, split)
            except DataError as error:
                location = os.path.join(path, split)
                tallies[split].find(location, str(error).removeprefix(f"{location}: "))
                continue
            for number, shard in enumerate(shards.shards):
                tasks[split, number, len(shard)] = check_shard, path, local, split, number, masks
        else:
            pairs, tallies[split] = scan(path, split, description)
            if description is not None and pairs:
                masks = Masks.of(description, split, path)
            for first in range(0, len(pairs), CHUNK):
                chunk = pairs[first : first + CHUNK]
                few = masks.only(mask for _, mask in chunk)
                tasks[split, first, len(chunk)] = check_files, chunk, few
    total = sum(count for _, _, count in tasks)
    with tqdm(total=total, unit=" samples", desc="check", disable=None) as bar:
        for (split, _, count), tally in in_processes(tasks, workers):
            tallies[split].add(tally)
            bar.update(count)
    for tally in tallies.values():
        tally.findings.sort()
    return tallies


def shard_classes(path: str) -> tuple[ClassInfo, ...] | None:
    """Return the classes of shards that were written from a description, which lies beside them.

    Args:
        path: Folder or URL of the shards.

    Returns:
        Names and colours in the order of the class indices, or None if nothing describes them.

    Raises:
        ConfigError: The description is not valid.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = fetch_beside(path, DESCRIPTION, folder)
        if file is None:
            return None
        return parse_description(read_description(file), f"{path}/{DESCRIPTION}").classes


def check_shard_classes(path: str, classes: Sequence[ClassInfo]) -> None:
    """Compare the classes that shards were written with and those of a run.

    Args:
        path: Folder or URL of the shards.
        classes: The run's, in the order of the class indices.

    Raises:
        ClassError: They have other names, or the same names in another order.
    """
    ours = shard_classes(path)
    where = f"{path}/{DESCRIPTION}"
    if match_classes(ours, classes, where, "the run") is not None:
        assert ours is not None
        raise ClassError(
            f"{first_difference(ours, classes, where, 'the run')}; give the run's classes in the "
            "order of the shards"
        )


def check_labels(
    path: str,
    split: str,
    labels: Labels,
    description: Description | None = None,
    max_masks: int = 64,
) -> None:
    """Take a quick look, before training, at whether labels fit the masks of a local data set.

    Args:
        path: See `dataset.folders.list_samples`; of a described data set, its root.
        split: 'train' or 'val'.
        labels: What the masks should hold.
        description: Of a data set in another layout.
        max_masks: How many masks to look at, spread evenly over the split.

    Raises:
        DataError: A mask cannot be read, or holds a label that is no class.
    """
    if description is None:
        samples, masks = list_samples(path, split), Masks(labels)
        mend = "set model.num_classes, or ignore_label"
    else:
        samples = list_described(description, split, path)
        masks, mend = Masks.of(description, split, path), "name it under classes, or ignore"
    for position in np.linspace(0, len(samples) - 1, min(max_masks, len(samples))).astype(int):
        mask_path = samples[position].mask_path
        try:
            masks.decode(Path(mask_path).read_bytes(), mask_path)
        except UnknownValues as error:
            raise DataError(f"{mask_path}: {error}: {mend}") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{mask_path}: {error}") from error
