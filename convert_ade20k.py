"""Convert ADE20K, or another data set, to MDS shards for Streaming.

    python convert_ade20k.py --path ./ade20k --out ./ade20k-mds
    python convert_ade20k.py --path ./ade20k --out s3://bucket/ade20k --compression zstd
    python convert_ade20k.py --path my.yaml --out ./my-mds    # a data set with a description

To train on the shards, set `is_streaming: true` and set `path` to the value of --out. Shards have
the columns of Streaming's public ADE20K converter: `uid`, `x` (the unchanged image file) and `y`
(the mask file). For a data set with a description, the mask values are translated to labels: 0 is
ignored, and label k is class k - 1. The file `description.yaml`, which is stored next to the
splits, lists the classes. If the command is interrupted, run it again to continue with the next
shard. Every shard is read back through Streaming and compared with the original files. The file
`index.json` is written last and marks a split as complete. The exit status is 0 if all shards are
written and verified, 1 after an error, and 130 after an interruption.
"""

from __future__ import annotations

from command_lines import parse_convert_ade20k, start

if __name__ == "__main__":
    start(parse_convert_ade20k)  # Answer --help and reject bad options before the slow imports.

import fcntl
import hashlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streaming.base.compression import is_compression
from streaming.base.hashing import is_hash
from streaming.base.util import bytes_to_int

from dataset.description import ade20k, as_yaml, describe_labels, open_description
from dataset.paths import FOLDERS
from dataset.shards import DESCRIPTION
from dataset.source import DataSource
from dataset.workers import available_cores
from errors import DataError, UserError
from extras.preparation import shard_writer
from extras.preparation.shard_writer import Target, convert_split, remove_empty, upload
from files import check_outputs, is_remote, write_file


def find_sources(path: str, root: str | None) -> list[DataSource]:
    """Return the splits of a data set in folders; one may be missing in ADE20K's layout."""
    path, description = open_description(path, root)
    source = DataSource(path, "train", description or ade20k())
    splits = list(FOLDERS)
    if description is None:
        images = Path(source.root, "images")
        splits = [split for split in splits if (images / FOLDERS[split]).is_dir()] or splits
    return [source.of_split(split) for split in splits]


def convert(
    path: str,
    out: str,
    compression: str | None = None,
    hashes: tuple[str, ...] = ("sha1", "xxh64"),
    size_limit: str = "4mb",
    workers: int | None = None,
    staging: str | None = None,
    root: str | None = None,
) -> dict[str, int]:
    """Write every split of a data set as shards, and verify the shards.

    Args:
        path: Folder of the data set (see `data.list_samples`), or path of its description.
        out: Folder for the shards, or URL in a store that Streaming can write to. Each split gets a
            subfolder.
        compression: Compression in Streaming's notation, such as 'zstd' or 'zstd:7', or None for no
            compression.
        hashes: Names of hash functions. The index lists these hashes of each shard.
        size_limit: Maximum size of an uncompressed shard, such as '4mb'.
        workers: Number of processes, or None for one process per core.
        staging: Folder for shards that are not uploaded yet and for records of finished uploads.
            None selects a temporary folder whose name depends on `path` and `out`.
        root: Root folder to use instead of the description's root, or None.

    Returns:
        The number of samples in each split.

    Raises:
        DataError: A file is unusable for training, an option is invalid, or the store rejects a
            request.
    """
    if compression and not is_compression(compression):
        raise DataError(
            f"compression: Streaming does not support {compression!r}; use a name such as zstd"
        )
    if unknown := [name for name in hashes if not is_hash(name)]:
        raise DataError(
            f"hash: Streaming does not support {unknown[0]!r}; use a name such as sha1 or xxh64"
        )
    out = out.rstrip("/")
    to_store = is_remote(out)
    is_our_staging = staging is None
    if staging is None:
        key = hashlib.sha1(f"{os.path.abspath(path)} {out}".encode()).hexdigest()[:12]
        staging = os.path.join(tempfile.gettempdir(), f"convert-ade20k-{key}")
    folder = staging if to_store else out
    try:
        options = (compression, sorted(hashes), bytes_to_int(size_limit))
    except ValueError:
        raise DataError(
            f"size limit: {size_limit!r} is not a number of bytes; write a size such as 4mb"
        ) from None
    workers = workers or available_cores()
    sources = find_sources(path, root)
    splits = {source.split: list(source.samples()) for source in sources}
    description = sources[0].description
    is_described = description.built_in is None
    if is_described and not to_store:
        check_outputs([os.path.join(out, DESCRIPTION)], [path])
    is_new = not os.path.isdir(folder)
    with _only_one(folder):
        for source in sources:
            split = source.split
            remote = f"{out}/{split}" if to_store else None
            masks = source.masks() if is_described else None
            target = Target(os.path.join(folder, split), remote, *options, workers, masks)
            convert_split(splits[split], out, split, target)
        if is_described:
            text = as_yaml(describe_labels(description.classes))
            write_file(Path(folder, DESCRIPTION), text)
            if to_store:
                upload(Target(folder, out, *options, workers), DESCRIPTION)
    if to_store:  # All shards are uploaded, so remove the empty staging folders.
        for split in splits:
            remove_empty(os.path.join(folder, split))
        if is_new or is_our_staging:
            remove_empty(folder)
    return {split: len(samples) for split, samples in splits.items()}


@contextmanager
def _only_one(folder: str) -> Iterator[None]:
    """Lock a folder until the context or the process ends, without creating a lock file.

    download_ade20k.py contains a copy of this function, because that script works without the rest
    of the repository.

    Raises:
        DataError: Another process holds the lock.
    """
    os.makedirs(folder, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another conversion to {folder} is running; wait until it ends"
            ) from None
        yield
    finally:
        os.close(descriptor)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = parse_convert_ade20k(arguments)
    options.hashes = tuple(filter(None, options.hashes.split(",")))
    # Restore Python's SIGINT handler, because Composer's handler ends the process immediately on
    # Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    shard_writer.log.setLevel(logging.INFO)
    # Silence Streaming's warning that the staging folder is in use.
    logging.getLogger("streaming").setLevel(logging.ERROR)
    try:
        convert(**vars(options))
    except KeyboardInterrupt:
        print("interrupted; run the command again to continue", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
