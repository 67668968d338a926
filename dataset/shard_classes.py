"""A check that the classes of the shards match the classes of the run."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dataset.description import Description, parse_description, read_description
from dataset.downloads import fetch_beside
from dataset.shards import DESCRIPTION
from dataset.source import DataSource
from errors import ClassError, DataError
from segmentation.classes import ClassInfo, first_difference, match_classes

log = logging.getLogger(__name__)


def shard_description(path: str, retries: int = 2) -> Description | None:
    """Return the description that the shards were written with, which is stored next to them.

    Args:
        path: Folder or URL of the shards.
        retries: Number of retries after a temporary error of the store.

    Returns:
        The description, or None if the shards have no description.

    Raises:
        ConfigError: The description is invalid.
        DataError: The store does not respond, so it is unknown whether a description exists.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = fetch_beside(path, DESCRIPTION, folder, retries)
        if file is None:
            return None
        return parse_description(read_description(file), f"{path}/{DESCRIPTION}")


def shard_classes(source: DataSource) -> tuple[ClassInfo, ...] | None:
    """Return the classes that the shards were written with.

    If the store does not respond but the split's index is in the cache, the function logs a warning
    and returns None.

    Args:
        source: A split that is stored as shards.

    Returns:
        Names and colours in the order of the class indices, or None if they are not known.

    Raises:
        ConfigError: The description of the shards is invalid.
        DataError: The store does not respond, so it is unknown whether a description exists.
    """
    assert source.shards is not None
    local = source.shards.local
    is_cached = local is not None and Path(local, source.split, "index.json").exists()
    try:
        description = shard_description(source.path, 0 if is_cached else 2)
    except DataError as error:
        if not is_cached:
            raise
        log.warning("%s; continuing with the cached shards, whose classes are not checked", error)
        return None
    return None if description is None else description.classes


def check_shard_classes(source: DataSource, classes: Sequence[ClassInfo]) -> None:
    """Check that the classes of the shards match the classes of a run.

    Args:
        source: A split that is stored as shards.
        classes: The classes of the run, in the order of the class indices.

    Raises:
        ClassError: The names differ, or they are in a different order.
    """
    ours = shard_classes(source)
    where = f"{source.path}/{DESCRIPTION}"
    if match_classes(ours, classes, where, "the run") is not None:
        assert ours is not None
        raise ClassError(
            "the run's classes differ from those of the shards "
            f"({first_difference(ours, classes, where, 'the run')}); list them in the same order"
        )
