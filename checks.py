"""What can be wrong with a data set: names, decoding, sizes and labels of files, hashes of shards.

`check()` looks at every file in parallel and returns a :class:`Tally` for each split, of which
validate.py makes the report; convert_ade20k.py reads what it wrote back with the same functions.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from streaming.base.hashing import get_hash
from tqdm import tqdm

import data
from shards import DataError, Shards, one_line
from transforms import IGNORED, decode_image, decode_mask, decode_photo

CHUNK = 64  # samples a process checks between two reports


class Finding(NamedTuple):
    """Something wrong with a file."""

    path: str
    reason: str
    fatal: bool  # training would fail; otherwise it is odd, but trained on


class Labels(NamedTuple):
    """What the values in a mask mean; see :func:`data.build_ade20k_dataspec`."""

    num_classes: int = 150
    ignore_background: bool = True
    ignore_label: int | None = None

    def classes(self) -> np.ndarray:
        """(256,) bool: labels that are classes, the first of them being class index 0."""
        label = np.arange(256)
        first = int(self.ignore_background)
        inside = (label >= first) & (label < first + self.num_classes)
        return inside & (label != self.ignore_label)

    def ignored(self) -> np.ndarray:
        """(256,) bool: labels that are known and no class."""
        label = np.arange(256)
        zero = (label == 0) & self.ignore_background
        return (label >= IGNORED) | (label == self.ignore_label) | zero


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
        self.photos += other.photos
        self.masks += other.masks
        self.sizes += other.sizes
        self.pixels += other.pixels
        self.present += other.present
        self.findings += other.findings

    def find(self, path: str | Path, reason: str, fatal: bool = True) -> None:
        self.findings.append(Finding(str(path), reason, fatal))

    def check(self, photo: bytes, mask: bytes, names: tuple[str, str], labels: Labels) -> None:
        """Decode a pair as training does, and count its labels. `names` are the files' names."""
        target = self._decode(decode_mask, mask, names[1])
        if target is None:
            self._decode(decode_image, photo, names[0])
            return
        image = self._decode(lambda photo: decode_photo(photo, target.shape), photo, names[0])
        counts = np.bincount(target.ravel(), minlength=256)
        wrong = np.flatnonzero((counts > 0) & ~labels.classes() & ~labels.ignored())
        if wrong.size:
            first = int(labels.ignore_background)
            values = ", ".join(map(str, wrong[:5])) + (", …" if wrong.size > 5 else "")
            share, last = counts[wrong].sum() / target.size, first + labels.num_classes - 1
            reason = f"label {values} on {share:.2%} of its pixels, but classes are {first}..{last}"
            self.find(names[1], reason)
        elif not counts[labels.classes()].any():
            self.find(names[1], "not one pixel has a class, nothing is learnt", fatal=False)
        if image is not None and not wrong.size:
            self.sizes.append((image.shape[1], image.shape[0]))
            self.pixels += counts
            self.present += counts > 0

    def _decode(self, decoder: Callable, content: bytes, name: str) -> np.ndarray | None:
        try:
            image = decoder(content)
        except (ValueError, MemoryError, cv2.error) as error:
            self.find(name, one_line(error))
            image = None
        if (complaint := _decoder_complaint()) and image is not None:
            self.find(name, f"damaged inside, though it decodes ({complaint})", fatal=False)
        return image


def scan(path: str, split: str) -> tuple[list[tuple[str, str]], Tally]:
    """A split's (photo, mask) pairs in local folders, and what their names show to be wrong."""
    tally = Tally()
    root = Path(path)
    if not (root / "images").is_dir():
        root = root / "ADEChallengeData2016"
    folders = [root / kind / data.FOLDERS[split] for kind in ("images", "annotations")]
    images = _files(folders[0], data.IMAGE_SUFFIXES, "photo", tally)
    masks = _files(folders[1], data.MASK_SUFFIXES, "mask", tally)
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
                tally.find(file, f"not in {' or '.join(data.FOLDERS.values())}", fatal=False)
    return [(images[name], masks[name]) for name in sorted(images.keys() & masks.keys())], tally


def _files(folder: Path, suffixes: set[str], kind: str, tally: Tally) -> dict[str, str]:
    """Files by name as training matches them, with a finding for each that it does not use."""
    if not folder.is_dir():
        tally.find(folder, "folder is missing")
    files: dict[str, str] = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
            name = file.relative_to(folder).with_suffix("").as_posix()
            if file.suffix.lower() not in suffixes:
                tally.find(file, f"not the name of a {kind}, training does not use it", fatal=False)
            elif name in files:
                tally.find(file, f"same name as {Path(files[name]).name}")
            else:
                files[name] = str(file)
    return files


def check_files(pairs: list[tuple[str, str]], labels: Labels) -> Tally:
    """Checks pairs of files."""
    tally = Tally()
    for names in pairs:
        content = []
        for name in names:
            try:
                content.append(Path(name).read_bytes())
            except OSError as error:
                tally.find(name, f"cannot be read: {error.strerror}")
        if len(content) == 2:
            tally.check(*content, names, labels)
    return tally


def open_shards(path: str, local: str | None, split: str) -> Shards:
    """A split of MDS shards, as training opens it, but for fewer attempts."""
    return Shards(path, local, split, download_retry=2)


opened_shards = functools.lru_cache(maxsize=2)(open_shards)  # for processes that read many


def read_shard(shards: Shards, number: int) -> Iterator[tuple[str, bytes, bytes]]:
    """The uid, encoded photo and encoded mask of each sample of a shard.

    Raises:
        DataError: The shard is missing or damaged. Its hash is checked even if it was in the cache,
            which happens in training when it is downloaded only.
    """
    shards.fetch(number)
    path, shard = shards.path(number), shards.shards[number]
    content = Path(path).read_bytes()
    again = "; delete it, and it is fetched again" if shards.is_cache else ""
    if len(content) != shard.raw_data.bytes:
        size = f"{len(content):,} bytes, not {shard.raw_data.bytes:,}"
        raise DataError(f"{path} is damaged: it has {size}{again}")
    for algorithm, expected in sorted(shard.raw_data.hashes.items())[-1:]:
        if get_hash(algorithm, content) != expected:
            raise DataError(f"{path} is damaged: its {algorithm} is not the index's{again}")
    end = int(shards.ends[number])
    for index in range(end - len(shard), end):
        yield shards.read(index)[:3]


def check_shard(path: str, local: str | None, split: str, number: int, labels: Labels) -> Tally:
    """Checks one shard: its hash and every sample."""
    tally = Tally()
    shards = opened_shards(path, local, split)
    info = shards.shards[number].zip_data or shards.shards[number].raw_data
    name = f"{shards.location}/{info.basename}"
    try:
        for uid, photo, mask in read_shard(shards, number):
            tally.photos, tally.masks = tally.photos + 1, tally.masks + 1
            tally.check(photo, mask, (f"{name}: x of {uid}", f"{name}: y of {uid}"), labels)
    except DataError as error:
        tally.find(name, str(error).removeprefix(f"{name}: "))
    return tally


def in_processes(function: Callable, tasks: list[tuple], workers: int) -> Iterator[Any]:
    """Yields `function(*task)` of every task as they come; gives up the rest when interrupted."""
    with ProcessPoolExecutor(workers, initializer=_init_process) as pool:
        try:
            for future in as_completed([pool.submit(function, *task) for task in tasks]):
                yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process died, of want of memory perhaps: try fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # waits for what is being done


_captures_stderr = False  # whether this process keeps what libjpeg and libpng print


def _init_process() -> None:
    global _captures_stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the work
    if sys.platform == "linux":  # not to outlive a parent that is killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # A JPEG with damage inside decodes: all there is to know of it is libjpeg's line on stderr.
    descriptor, name = tempfile.mkstemp()
    os.unlink(name)
    os.dup2(descriptor, 2)
    _captures_stderr = True


def _decoder_complaint() -> str | None:
    """The first line that the decoders printed since the last call."""
    if not _captures_stderr or os.fstat(2).st_size == 0:
        return None
    text = os.pread(2, 2000, 0).decode(errors="replace").strip()
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    return text.splitlines()[0] if text else None


def check(
    path: str, local: str | None, is_streaming: bool, labels: Labels, workers: int
) -> dict[str, Tally]:
    """Checks every sample of every split, with a progress bar on stderr."""
    tallies: dict[str, Tally] = {}
    tasks: list[tuple] = []
    for split in data.FOLDERS:
        tallies[split] = Tally()
        if is_streaming:
            try:
                shards = open_shards(path, local, split)
            except DataError as error:
                location = os.path.join(path, split)
                tallies[split].find(location, str(error).removeprefix(f"{location}: "))
                continue
            tasks += [
                (split, len(shard), check_shard, path, local, split, number, labels)
                for number, shard in enumerate(shards.shards)
            ]
        else:
            pairs, tallies[split] = scan(path, split)
            chunks = [pairs[first : first + CHUNK] for first in range(0, len(pairs), CHUNK)]
            tasks += [(split, len(chunk), check_files, chunk, labels) for chunk in chunks]
    total = sum(task[1] for task in tasks)
    with tqdm(total=total, unit=" samples", desc="check", disable=None) as bar:
        for split, count, tally in in_processes(_run, tasks, workers):
            tallies[split].add(tally)
            bar.update(count)
    for tally in tallies.values():
        tally.findings.sort()
    return tallies


def _run(split: str, count: int, function: Callable, *arguments: Any) -> tuple[str, int, Tally]:
    return split, count, function(*arguments)
