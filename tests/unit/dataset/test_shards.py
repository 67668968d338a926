"""Tests of dataset/shards.py."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from streaming import MDSWriter

from data import StreamingADE20k
from dataset import downloads
from dataset.matching import list_samples
from errors import DataError, StoreError
from tests.support.data import batches, digests
from tests.support.streaming import COLUMNS, expected, folder, mds, stream, write  # noqa: F401


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_shards_give_the_same_batches_as_folders(
    mds: str, expected: list[list[str]], tmp_path: Path, workers: int
) -> None:
    spec = stream(mds, tmp_path, num_workers=workers)
    assert [digests(batches(spec, epoch)) for epoch in range(2)] == expected


@pytest.mark.parametrize(
    "options",
    [
        # Streaming's own converter writes these columns.
        {"columns": {"uid": "bytes", "x": "jpeg", "y": "png"}},
        {"columns": {"uid": "str", "x": "bytes", "y": "bytes", "more": "int"}},
        {"uid": "ADE_train_{}"},
        {"compression": "zstd"},
        {"hashes": []},
    ],
)
def test_shards_written_by_other_programs_are_read(
    folder: str, expected: list[list[str]], tmp_path: Path, options: dict[str, Any]
) -> None:
    path = write(folder, tmp_path / "mds", **options)
    assert digests(batches(stream(path, tmp_path / "cache"))) == expected[0]
    assert digests(batches(stream(path, None))) == expected[0]


def test_local_shards_are_read_in_place(mds: str, expected: list[list[str]]) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(mds).rglob("*")}
    for spec in (stream(mds, None), stream(mds, mds, cache_limit="1gb")):
        assert digests(batches(spec)) == expected[0]
    assert {path: path.stat().st_mtime_ns for path in Path(mds).rglob("*")} == before


def test_shards_are_prefetched(mds: str, tmp_path: Path) -> None:
    dataset = stream(mds, tmp_path).dataloader.dataset
    last = dataset.shards.path(len(dataset.shards.shards) - 1)
    assert not os.path.exists(last)
    dataset[(0, 0, len(dataset) - 1)]
    deadline = time.monotonic() + 60
    while not os.path.exists(last) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.path.exists(last)
    sampler = stream(mds, tmp_path, predownload=6).dataloader.sampler
    items = list(sampler)
    assert [later for *_, later in items] == [index for _, index, _ in items[6:]] + [-1] * 6


def test_least_recently_read_shard_is_evicted(mds: str, tmp_path: Path) -> None:
    dataset = stream(mds, tmp_path, cache_limit="1gb").dataloader.dataset
    shards = dataset.shards
    for shard in range(4):
        shards.fetch(shard)
        os.utime(shards.path(shard), (shard + 1, shard + 1))
    dataset.read(0)  # shard 0 is now the most recently read
    shards.cache_limit = sum(os.path.getsize(shards.path(shard)) for shard in range(4))
    shards.fetch(4)
    assert os.path.exists(shards.path(0)) and not os.path.exists(shards.path(1))


def test_shard_that_is_evicted_before_each_read_is_reported(mds: str, tmp_path: Path) -> None:
    dataset = stream(mds, tmp_path, cache_limit="1gb").dataloader.dataset
    dataset.shards.fetch = lambda shard: None  # as if another process deleted each shard at once
    with pytest.raises(DataError, match="was deleted before it could be read; increase cache_lim"):
        dataset.read(0)


def test_index_without_shards_is_reported(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/index.json").write_text('{"version": 2, "shards": []}')
    with pytest.raises(DataError, match=r"train/index\.json lists no shards; convert the data set"):
        stream(str(tmp_path), None)


def test_cache_of_another_dataset_is_rejected(folder: str, mds: str, tmp_path: Path) -> None:
    path = Path(shutil.copytree(mds, tmp_path / "mds"))
    stream(str(path), tmp_path / "cache")
    stream(str(path), tmp_path / "cache")
    shutil.rmtree(path)
    write(folder, path, size_limit=9_000)
    with pytest.raises(DataError, match=f"cache/train contains an earlier version of {path}/train"):
        stream(str(path), tmp_path / "cache")
    assert sorted(os.listdir(tmp_path / "cache/train")) == ["index.json", "index.json.lock"]


def damage(path: Path, offset: int = 2000) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + 20] = bytes(20)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}])
def test_error_names_the_damaged_shard(
    folder: str, tmp_path: Path, options: dict[str, Any], workers: int
) -> None:
    path = write(folder, tmp_path / "mds", **options)
    name = "shard.00001.mds" + (".zstd" if options else "")
    damage(tmp_path / "mds/train" / name)
    spec = stream(path, tmp_path / "cache", num_workers=workers)
    with pytest.raises(DataError, match=f"^{path}/train/{name}: is damaged: Checksum failure.*$"):
        batches(spec)
    if workers:
        spec.dataloader._iterator._shutdown_workers()
    # A lock file may remain.
    assert not list((tmp_path / "cache/train").glob("shard.00001.mds*[!k]"))
    shutil.copy(Path(write(folder, tmp_path / "good", **options), "train", name), path + "/train")
    assert len(batches(stream(path, tmp_path / "cache"))) == 11  # the damaged shard was deleted


def test_error_names_the_damaged_cached_shard(mds: str, tmp_path: Path) -> None:
    batches(stream(mds, tmp_path))
    path = tmp_path / "train/shard.00001.mds"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"shard\.00001\.mds"):
        batches(stream(mds, tmp_path))
    path.unlink()
    assert len(batches(stream(mds, tmp_path))) == 11


def test_error_names_missing_shards_and_columns(mds: str, folder: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/nowhere/train/index\.json: "):
        stream("/nowhere", None)
    with pytest.raises(DataError, match=r"/nowhere/train/index\.json: "):
        stream("/nowhere", tmp_path / "a")
    with pytest.raises(DataError, match=r"^s3://bucket/set: remote shards need a cache; set local"):
        stream("s3://bucket/set", None)
    with pytest.raises(DataError, match=r"nothing://set.*Unsupported remote path"):
        stream("nothing://set", tmp_path / "b")
    path = Path(shutil.copytree(mds, tmp_path / "mds"))
    (path / "train/shard.00002.mds").unlink()
    with pytest.raises(DataError, match=r"mds/train/shard\.00002\.mds: "):
        batches(stream(str(path), tmp_path / "c"))
    (path / "val/index.json").write_text("{")
    with pytest.raises(DataError, match=r"mds/val/index\.json: .*corrupted"):
        stream(str(path), tmp_path / "d", split="val")
    with MDSWriter(out=str(tmp_path / "other/train"), columns={"text": "str"}) as writer:
        writer.write({"text": "a"})
    with pytest.raises(
        DataError, match=r"other/train: the shards have the columns \['text'\] instead of"
    ):
        stream(str(tmp_path / "other"), None)
    with pytest.raises(DataError, match=r"train/shard\.0000\d\.mds: .*Hash algorithm `md5`"):
        batches(stream(mds, tmp_path / "e", validate_hash="md5"))


def test_error_names_the_shard_and_sample_of_an_invalid_image(
    mds: str, folder: str, tmp_path: Path
) -> None:
    with MDSWriter(out=str(tmp_path / "train"), columns=COLUMNS) as writer:
        sample = list_samples(folder, "train")[0]
        mask = Path(sample.mask_path).read_bytes()
        writer.write({"uid": "street/7", "x": b"<html>", "y": mask})
    dataset = StreamingADE20k(None, str(tmp_path), "train")
    expected = r"/train/shard\.00000\.mds, sample street/7, image: unknown image format$"
    with pytest.raises(DataError, match=expected):
        dataset[0]


def test_failed_shard_downloads_are_retried_and_logged(
    mds: str,
    expected: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(downloads.time, "sleep", waited.append)
    spec = stream(mds, tmp_path, download_retry=3, predownload=0)
    stream_of_thread, failures = spec.dataloader.dataset.shards.stream, 3
    prepare = stream_of_thread.prepare_shard

    def fail(shard: Any) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise ConnectionError("connection refused")
        prepare(shard)

    stream_of_thread.prepare_shard = fail
    with caplog.at_level(logging.WARNING):
        assert digests(batches(spec)) == expected[0]
    assert waited == [1, 2, 4]
    assert f"{mds}/train/shard.0000" in caplog.text
    assert "connection refused; trying again in 4 s" in caplog.text
    failures = 100
    for path in tmp_path.glob("train/*.mds"):
        path.unlink()
    with pytest.raises(StoreError, match=r"train/shard\.0000\d\.mds: connection refused$"):
        batches(spec)
