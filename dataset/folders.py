"""ADE20K's own layout: a description that is built in."""

from __future__ import annotations

from dataset.description import Description, Source
from dataset.labels import Labels
from dataset.matching import list_described
from dataset.paths import (
    ADE20K,
    FOLDERS,
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    Sample,
    find_root,
    visible_files,
)
from errors import DataError

__all__ = ["ADE20K", "FOLDERS", "IMAGE_SUFFIXES", "MASK_SUFFIXES", "Sample", "ade20k"]
__all__ += ["find_root", "list_samples", "visible_files"]

_SOURCES = {
    split: Source(f"images/{name}", f"annotations/{name}") for split, name in FOLDERS.items()
}


def ade20k(labels: Labels | None = None) -> Description:
    """Return the description of ADE20K's layout, with masks that hold labels as they stand."""
    return Description(None, _SOURCES, 0.0, (), None, False, built_in=labels or Labels())


def list_samples(datadir: str, split: str) -> list[Sample]:
    """List the images of a split and their masks, sorted by name.

    Args:
        datadir: Folder with `images/{training,validation}` and
            `annotations/{training,validation}`, or with `ADEChallengeData2016` that has these.
            There may be folders in them, and files of other kinds, which are left alone.
        split: 'train' or 'val'.

    Returns:
        Samples, whose `uid` is the image's path without extension and ADE20K's `ADE_train_`.

    Raises:
        DataError: There are no images, or images without a mask.
    """
    if split not in FOLDERS:
        raise DataError(f"split is {split!r}; use one of {', '.join(FOLDERS)}")
    return list(list_described(ade20k(), split, str(find_root(datadir))))
