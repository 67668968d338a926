"""Functions that write, upload and verify the MDS shards of a split."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import cv2
from streaming import MDSWriter
from streaming.base.storage import CloudDownloader, CloudUploader

from dataset.downloads import is_missing
from dataset.mask_decoder import Masks
from dataset.paths import Sample
from dataset.shards import cached_shards, open_shards, read_shard
from dataset.workers import map_chunks
from errors import DataError, one_line
from extras.preparation.verify import read_pair
from files import explain_output, write_file

log = logging.getLogger(__name__)

COLUMNS = {"uid": "bytes", "x": "jpeg", "y": "png"}
# Number of times to try an upload. The pauses double, and add up to about half a minute.
UPLOAD_ATTEMPTS = 6


class Mismatch(DataError):
    """An error for an --out folder that already has a complete but different data set."""


class Target(NamedTuple):
    """The destination of a split's shards, and the options for writing them.

    Attributes:
        folder: Local folder for the shards. Shards for a remote store stay here until they are
            uploaded.
        remote: URL of the remote store, or None.
        compression: Compression of the shards in Streaming's notation, or None.
        hashes: Names of the hashes to store for each shard.
        size_limit: Maximum size of a shard in bytes.
        workers: Number of processes.
        masks: Decoder for the masks of a data set with a description, or None without one.
    """

    folder: str
    remote: str | None
    compression: str | None
    hashes: list[str]
    size_limit: int
    workers: int
    masks: Masks | None = None

    @property
    def done(self) -> Path:
        """The folder that holds one record for each finished shard."""
        return Path(self.folder, ".finished")


def plan_shards(samples: list[Sample], size_limit: int) -> list[list[Sample]]:
    """Group consecutive samples into shards that are as large as the limit allows.

    Args:
        samples: Samples of the split.
        size_limit: Maximum size of a shard in bytes.
    """
    shards: list[list[Sample]] = []
    used = size_limit
    for sample in samples:
        size = os.stat(sample.image_path).st_size + os.stat(sample.mask_path).st_size + 64
        if used + size > size_limit:
            shards.append([])
            used = 0
        shards[-1].append(sample)
        used += size
    return shards


def write_shard(samples: list[Sample], number: int, target: Target) -> dict[str, Any]:
    """Write and upload a shard, unless an earlier run has finished it.

    Args:
        samples: Samples of the shard.
        number: Number of the shard.
        target: Destination and options.

    Returns:
        The shard's entry in `index.json`.

    Raises:
        DataError: A file cannot be read or decoded, or an image and its mask differ in size.
    """
    note, inputs = target.done / f"{number:05}.json", _inputs(samples, target)
    if note.exists():
        finished = json.loads(note.read_text())
        if finished["inputs"] == inputs:
            return finished["entry"]
        # A run with other options wrote this shard. Remove it, because the new shard may have
        # another name.
        _remove_shard(target, finished["entry"])
    final = Path(target.folder, f"shard.{number:05}.mds")
    with explain_output(final), tempfile.TemporaryDirectory(dir=target.done) as temporary:
        writer = MDSWriter(
            columns=COLUMNS,
            out=temporary,
            compression=target.compression,
            hashes=target.hashes,
            size_limit=None,
        )
        for sample in samples:
            image, mask = _read(sample, target.masks)
            uid = sample.uid.encode(errors="surrogateescape")
            writer.write({"uid": uid, "x": image, "y": mask})
        writer.flush_shard()
        writer.executor.shutdown()
        (entry,) = writer.shards
        for info in filter(None, (entry["raw_data"], entry["zip_data"])):
            written = info["basename"]
            info["basename"] = re.sub(r"\d+", f"{number:05}", written, count=1)
        # Write a note before writing the shard, so that a later run knows that this program wrote
        # the shard, even if this run is interrupted.
        _write(note, {"inputs": None, "entry": entry})
        os.replace(Path(temporary, written), Path(target.folder, info["basename"]))
    if target.remote:
        upload(target, info["basename"])
    _write(note, {"inputs": inputs, "entry": entry})
    return entry


def _remove_shard(target: Target, entry: dict[str, Any]) -> None:
    name = (entry["zip_data"] or entry["raw_data"])["basename"]
    Path(target.folder, name).unlink(missing_ok=True)


def _inputs(samples: list[Sample], target: Target) -> str:
    """Return a hash of the files and options that determine the shard's content."""
    files = [path for sample in samples for path in (sample.image_path, sample.mask_path)]
    stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
    rule = [] if target.masks is None else [sorted(target.masks.values.items())]
    text = json.dumps([stats, target.compression, target.hashes, *rule])
    return hashlib.sha1(text.encode()).hexdigest()


def _read(sample: Sample, masks: Masks | None) -> tuple[bytes, bytes]:
    """Return the bytes of a sample's image and mask after checking that training can use them.

    Masks of a described data set are converted to labels: 0 is ignored, and k + 1 is class k.
    """
    image, mask, _, labels = read_pair(sample, masks)
    if masks is not None:
        mask = cv2.imencode(".png", labels)[1].tobytes()
    return image, mask


def upload(target: Target, name: str) -> None:
    """Upload a file from the target's folder and delete the local copy.

    Args:
        target: Destination and options.
        name: Name of the file.

    Raises:
        DataError: The store rejects the file or does not answer.
    """
    try:
        _uploader(os.getpid(), target.folder, target.remote).upload_file(name)
    except Exception as error:
        raise DataError(f"{target.remote}/{name}: {one_line(error)}") from error


@functools.lru_cache(maxsize=2)
def _uploader(process: int, folder: str, remote: str) -> CloudUploader:
    """Return an uploader for this process, because processes must not share a connection."""
    return CloudUploader.get((folder, remote), retry=UPLOAD_ATTEMPTS, exist_ok=True)


def verify_shard(
    samples: list[Sample], number: int, out: str, cache: str, split: str, target: Target
) -> str | None:
    """Read a shard back through Streaming and compare it with the files of its samples.

    If the shard is wrong, the function deletes its record, so the next run writes the shard again.

    Args:
        samples: Samples of the shard.
        number: Number of the shard.
        out: Folder or URL of the data set.
        cache: Folder for downloaded shards.
        split: Name of the split.
        target: Destination and options.

    Returns:
        A description of the problem, or None if the shard is correct.

    Raises:
        Mismatch: The shard is undamaged but contains different samples.
    """
    shards = cached_shards(out, cache, split)
    name = shards.shards[number].raw_data.basename
    note = target.done / f"{number:05}.json"
    try:
        for sample, found in zip(samples, read_shard(shards, number), strict=True):
            if found != (sample.uid, *_read(sample, target.masks)):
                raise Mismatch(f"sample {found[0]} of {name} differs from {sample.image_path}")
    except DataError as error:
        note.unlink(missing_ok=True)
        if isinstance(error, Mismatch):
            raise
        return str(error)
    finally:
        shards.shards[number].evict()
    return None


def convert_split(samples: list[Sample], out: str, split: str, target: Target) -> None:
    """Write the shards of a split, verify them, and then write their index.

    Args:
        samples: Samples of the split.
        out: Folder or URL of the data set.
        split: Name of the split.
        target: Destination and options.

    Raises:
        DataError: A file cannot be used, a shard is wrong, or the destination contains a different
            data set.
    """
    with tempfile.TemporaryDirectory() as cache:
        index = Path(cache, split, "index.json")
        index.parent.mkdir()
        if _fetch_index(f"{out}/{split}/index.json", index):
            try:
                _verify(samples, out, cache, split, target)
            except Mismatch as error:
                raise DataError(
                    f"{out}/{split} already contains a different data set ({error}); delete it "
                    "or choose a different --out folder"
                ) from error
            log.info("%s/%s is complete and verified; nothing to do", out, split)
            return
        entries = _write_shards(samples, split, target)
        _write(index, {"version": 2, "shards": entries})
        _verify(samples, out, cache, split, target)
    # Write index.json last, because its presence marks the split as complete.
    _write(Path(target.folder, "index.json"), {"version": 2, "shards": entries})
    if target.remote:
        upload(target, "index.json")
    for note in target.done.glob("*.json"):
        # Delete extra shards, which an interrupted run with other options may have left.
        if int(note.stem) >= len(entries):
            _remove_shard(target, json.loads(note.read_text())["entry"])
        note.unlink()
    remove_empty(target.done)
    log.info("%s/%s: %d samples in %d shards", out, split, len(samples), len(entries))


def remove_empty(folder: str | Path) -> None:
    """Remove a folder unless other programs have written files to it.

    Args:
        folder: Folder to remove.
    """
    with suppress(OSError):
        os.rmdir(folder)


def _fetch_index(remote: str, index: Path) -> bool:
    """Download the index of a finished split to `index`; return False if there is none."""
    try:
        CloudDownloader.direct_download(remote, str(index))
    except Exception as error:
        if is_missing(error):
            return False
        raise DataError(f"{remote}: {one_line(error)}") from error
    return True


def _write_shards(samples: list[Sample], split: str, target: Target) -> list[dict[str, Any]]:
    if not target.done.is_dir() and (shards := sorted(Path(target.folder).glob("shard.*"))):
        raise DataError(
            f"{shards[0]} already exists and was not written by an interrupted conversion; move it "
            "or choose a different --out"
        )
    target.done.mkdir(parents=True, exist_ok=True)
    shards = plan_shards(samples, target.size_limit)
    tasks = [(shard, number, _few(target, shard)) for number, shard in enumerate(shards)]
    return map_chunks(write_shard, tasks, target.workers, f"write {split}")


def _verify(samples: list[Sample], out: str, cache: str, split: str, target: Target) -> None:
    shards = open_shards(out, cache, split)
    if len(shards) != len(samples):
        raise Mismatch(f"it has {len(shards):,} samples instead of {len(samples):,}")
    tasks: list[tuple] = []
    for number, (shard, end) in enumerate(zip(shards.shards, shards.ends)):
        if (shard.compression, shard.hashes) != (target.compression, target.hashes):
            raise Mismatch(f"it has compression {shard.compression} and hashes {shard.hashes}")
        part = samples[end - len(shard) : end]
        tasks.append((part, number, out, cache, split, _few(target, part)))
    reasons = map_chunks(verify_shard, tasks, target.workers, f"verify {split}")
    wrong = [reason for reason in reasons if reason]
    if wrong:
        raise DataError(
            f"{wrong[0]} ({len(wrong)} of {len(tasks)} shards are wrong); run the command again to "
            "rewrite them"
        )


def _few(target: Target, samples: list[Sample]) -> Target:
    """Return the target with a mask decoder for these samples only, so that its pickle is small."""
    if target.masks is None:
        return target
    return target._replace(masks=target.masks.only(sample.mask_path for sample in samples))


def _write(file: Path, content: Any) -> None:
    write_file(file, json.dumps(content, sort_keys=True))
