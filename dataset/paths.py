"""Which files a folder holds, and which of them can be images and masks.

Only the standard library is imported here, so that a wrong config is reported quickly.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

ADE20K = "ADEChallengeData2016"  # the folder in ADE20K's archive
FOLDERS = {"train": "training", "val": "validation"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
MASK_SUFFIXES = {".png", ".bmp", ".gif", ".tif", ".tiff"}


class Sample(NamedTuple):
    """An image and its mask."""

    uid: str
    image_path: str
    mask_path: str


class Finding(NamedTuple):
    """Something wrong with a file."""

    path: str
    reason: str
    fatal: bool  # training would fail; otherwise it is odd, but training works


def find_root(path: str | Path) -> Path:
    """Return the folder that holds `images` and `annotations`: `path`, or ADE20K's folder in it."""
    return Path(path) if Path(path, "images").is_dir() else Path(path, ADE20K)


def list_files(folder: str | Path) -> list[str]:
    """List all files in a folder and below, without hidden ones.

    A link to a folder is followed unless that folder is below `folder`, where it is read without
    the link, holds `folder`, or was followed before. So no link leads round in circles.

    Returns:
        Paths below `folder`, sorted within each folder, and files before the folders beside them.
    """
    files: list[str] = []
    top = os.path.realpath(folder)
    seen = {top}
    waiting = [("", top)]  # folders to read: path below `folder` with a slash, and the real path
    while waiting:
        below, real = waiting.pop()
        try:
            with os.scandir(os.path.join(folder, below)) as scan:
                entries = [entry for entry in scan if entry.name[0] != "."]
        except OSError as error:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                log.warning("%s: its files are left out: %s", error.filename, error.strerror)
            continue
        folders = [(entry.name, entry.is_symlink()) for entry in entries if _is_folder(entry)]
        names = [entry.name for entry in entries]
        if folders:
            inner_names = {name for name, _ in folders}
            names = [name for name in names if name not in inner_names]
        names.sort()
        files += [below + name for name in names] if below else names
        inner = []
        for name, is_link in sorted(folders):
            target = os.path.join(real, name)
            if is_link:
                target = os.path.realpath(target)
                if os.path.commonpath([top, target]) in (top, target):
                    continue
            if target not in seen:
                seen.add(target)
                inner.append((f"{below}{name}/", target))
        waiting += reversed(inner)
    return files


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def visible_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield each file of `list_files`: its path below `folder` without extension, and its path."""
    for name in list_files(folder):
        path = Path(folder, name)
        yield path.relative_to(folder).with_suffix("").as_posix(), path
