"""Where a data set's photos and masks are, and which belong together."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from errors import DataError

log = logging.getLogger(__name__)

ADE20K = "ADEChallengeData2016"  # the folder in ADE20K's archive
FOLDERS = {"train": "training", "val": "validation"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
MASK_SUFFIXES = {".png", ".bmp", ".gif", ".tif", ".tiff"}


class Sample(NamedTuple):
    """A photo and its mask."""

    uid: str
    image_path: str
    mask_path: str


def find_root(path: str | Path) -> Path:
    """Return the folder that holds `images` and `annotations`: `path`, or ADE20K's folder in it."""
    return Path(path) if Path(path, "images").is_dir() else Path(path, ADE20K)


def list_samples(datadir: str, split: str) -> list[Sample]:
    """List the photos of a split and their masks, sorted by name.

    Args:
        datadir: Folder with `images/{training,validation}` and
            `annotations/{training,validation}`, or with `ADEChallengeData2016` that has these.
            There may be folders in them, and files of other kinds, which are left alone.
        split: 'train' or 'val'.

    Returns:
        Samples, whose `uid` is the photo's path without extension and ADE20K's `ADE_train_`.

    Raises:
        DataError: There are no photos, or photos without a mask.
    """
    if split not in FOLDERS:
        raise DataError(f"split is {split!r}, not one of {', '.join(FOLDERS)}")
    root = find_root(datadir)
    image_dir, mask_dir = (root / kind / FOLDERS[split] for kind in ("images", "annotations"))
    images, masks = _by_name(image_dir, IMAGE_SUFFIXES), _by_name(mask_dir, MASK_SUFFIXES)
    if not images:
        raise DataError(f"{image_dir} has no photos ({', '.join(sorted(IMAGE_SUFFIXES))})")
    alone = sorted(images.keys() - masks.keys())
    if alone:
        others = f" (as {len(alone) - 1} more)" if len(alone) > 1 else ""
        raise DataError(f"{images[alone[0]]} has no mask in {mask_dir}{others}")
    extra = sorted(masks.keys() - images.keys())
    if extra:
        log.warning("%d masks without photo, as %s", len(extra), masks[extra[0]])
    prefix = f"ADE_{split}_"
    return [
        Sample(name.removeprefix(prefix), str(images[name]), str(masks[name]))
        for name in sorted(images)
    ]


def _by_name(folder: Path, suffixes: set[str]) -> dict[str, Path]:
    """Find the files that end as one of the suffixes, by path without it."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    files: dict[str, Path] = {}
    for name, path in visible_files(folder):
        if path.suffix.lower() in suffixes:
            if name in files:
                raise DataError(f"{files[name]} and {path} differ in their extension only")
            files[name] = path
    return files


def visible_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Find all files in a folder and below, but for hidden ones.

    A link to a folder is followed unless that is below `folder`, where it is found without the
    link, holds `folder`, or was followed to before. So no link leads round in circles.

    Yields:
        A file's path below `folder` without its extension, and its path, in order.
    """
    top, seen = os.path.realpath(folder), set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(parent))
        below = []
        for name in sorted(folders):
            path = os.path.join(parent, name)
            real = os.path.realpath(path)
            known = os.path.islink(path) and os.path.commonpath([top, real]) in (top, real)
            if not name.startswith(".") and not known and real not in seen:
                below.append(name)
                seen.add(real)
        folders[:] = below
        for name in sorted(names):
            if not name.startswith("."):
                path = Path(parent, name)
                yield path.relative_to(folder).with_suffix("").as_posix(), path
