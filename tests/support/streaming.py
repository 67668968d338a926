"""A small data set as MDS shards, loaders that stream it, and the digests of its samples."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from composer.core import DataSpec
from streaming import MDSWriter

from dataset.matching import list_samples
from tests.support.data import batches, build, digests, make_data

COLUMNS = {"uid": "str", "x": "jpeg", "y": "png"}


def write(
    source: str,
    out: Path,
    columns: dict[str, str] = COLUMNS,
    uid: str = "{}",
    **options: Any,
) -> str:
    """Write a data set as MDS shards with a few samples each; return their folder."""
    settings: dict[str, Any] = dict(hashes=["sha1", "xxh64"], size_limit=8_000)
    # MDSWriter sleeps for whole seconds while it waits for its last shard.
    sleep = mock.patch("streaming.base.format.base.writer.sleep", lambda _: time.sleep(0.01))
    for split in ("train", "val"):
        folder = str(out / split)
        with sleep, MDSWriter(out=folder, columns=columns, **{**settings, **options}) as writer:
            for sample in list_samples(source, split):
                image, mask = (Path(path).read_bytes() for path in sample[1:])
                row = {"uid": uid.format(sample.uid), "x": image, "y": mask, "more": 1}
                if columns["uid"] == "bytes":
                    row["uid"] = row["uid"].encode()
                writer.write({name: row[name] for name in columns})
        assert len(json.loads((out / split / "index.json").read_text())["shards"]) > 1
    return str(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_data(tmp_path_factory.mktemp("data"), training=44, validation=9))


@pytest.fixture(scope="module")
def mds(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(folder, tmp_path_factory.mktemp("mds"))


@pytest.fixture(scope="module")
def expected(folder: str) -> list[list[str]]:
    """Return the sample digests of two epochs, loaded from the folders instead of the shards."""
    spec = build(folder)
    return [digests(batches(spec, epoch)) for epoch in range(2)]


def stream(path: str, local: Path | str | None, **options: Any) -> DataSpec:
    settings = dict(is_streaming=True, local=local and str(local), download_retry=0)
    return build(path, **{**settings, **options})
