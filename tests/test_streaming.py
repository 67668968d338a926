"""Data sets in shards: the samples of the folders, from anywhere, in spite of what goes wrong."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import DataSpec
from streaming import MDSWriter
from test_data import batches, build, digests, make_data, on_rank, train

import main as program
from benchmarks.faulty_store import FaultyStore
from benchmarks.s3_server import S3Server, s3_server
from data import StreamingADE20k
from dataset import shards
from dataset.matching import list_samples
from errors import TRY_AGAIN, DataError, StoreError

COLUMNS = {"uid": "str", "x": "jpeg", "y": "png"}


def write(
    source: str,
    out: Path,
    columns: dict[str, str] = COLUMNS,
    uid: str = "{}",
    **options: Any,
) -> str:
    """MDS shards of a few samples each."""
    settings: dict[str, Any] = dict(hashes=["sha1", "xxh64"], size_limit=8_000)
    for split in ("train", "val"):
        folder = str(out / split)
        with MDSWriter(out=folder, columns=columns, **{**settings, **options}) as writer:
            for sample in list_samples(source, split):
                photo, mask = (Path(path).read_bytes() for path in sample[1:])
                row = {"uid": uid.format(sample.uid), "x": photo, "y": mask, "more": 1}
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
    """What the folders give in two epochs, and evaluation."""
    spec = build(folder)
    return [digests(batches(spec, epoch)) for epoch in range(2)]


def stream(path: str, local: Path | str | None, **options: Any) -> DataSpec:
    settings = dict(is_streaming=True, local=local and str(local), download_retry=0)
    return build(path, **{**settings, **options})


# The same samples


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_shards_give_what_folders_give(
    mds: str, expected: list[list[str]], tmp_path: Path, workers: int
) -> None:
    spec = stream(mds, tmp_path, num_workers=workers)
    assert [digests(batches(spec, epoch)) for epoch in range(2)] == expected


@pytest.mark.processes
def test_evaluation_gives_what_folders_give(mds: str, folder: str, tmp_path: Path) -> None:
    spec = stream(mds, tmp_path, split="val", num_workers=1)
    assert digests(batches(spec)) == digests(batches(build(folder, split="val")))


@pytest.mark.parametrize(
    "options",
    [
        {"columns": {"uid": "bytes", "x": "jpeg", "y": "png"}},  # as Streaming's own converter has
        {"columns": {"uid": "str", "x": "bytes", "y": "bytes", "more": "int"}},
        {"uid": "ADE_train_{}"},
        {"compression": "zstd"},
        {"hashes": []},
    ],
)
def test_shards_of_others(
    folder: str, expected: list[list[str]], tmp_path: Path, options: dict[str, Any]
) -> None:
    path = write(folder, tmp_path / "mds", **options)
    assert digests(batches(stream(path, tmp_path / "cache"))) == expected[0]
    assert digests(batches(stream(path, None))) == expected[0]


def test_reads_a_folder_in_place(mds: str, expected: list[list[str]]) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(mds).rglob("*")}
    for spec in (stream(mds, None), stream(mds, mds, cache_limit="1gb")):
        assert digests(batches(spec)) == expected[0]
    assert {path: path.stat().st_mtime_ns for path in Path(mds).rglob("*")} == before


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumes_in_mid_epoch_with_any_number_of_ranks(
    mds: str, expected: list[list[str]], tmp_path: Path, ranks: int
) -> None:
    state = stream(mds, tmp_path).dataloader.dataset.state_dict(12, True)
    sides = []
    for rank in range(ranks):
        spec = on_rank(stream(mds, tmp_path), rank, ranks, prefetch_distance=3)
        spec.dataloader.dataset.load_state_dict(state)
        sides.append(batches(spec, 0))
    together = [parts for step in zip(*sides) for parts in step]
    assert digests(together) == expected[0][12:]


@pytest.mark.processes
def test_a_resumed_run_sees_the_rest(mds: str, expected: list[list[str]], tmp_path: Path) -> None:
    train(stream(mds, tmp_path / "a"), tmp_path, max_duration="7ba")
    model, _ = train(
        stream(mds, tmp_path / "b", num_workers=1),  # as on another machine
        tmp_path / "resumed",
        load_path=str(tmp_path / "7.pt"),
        max_duration="2ep",
    )
    assert model.seen == [*expected[0][28:], *expected[1]]


@pytest.mark.processes
def test_a_stream_can_be_sent_to_spawned_workers(mds: str, tmp_path: Path) -> None:
    dataset = stream(mds, tmp_path).dataloader.dataset
    dataset.prefetch(40)
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(a, b) for a, b in zip(copy[5], dataset[5]))


# The cache


def test_fetches_ahead(mds: str, tmp_path: Path) -> None:
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


@pytest.mark.processes
def test_stays_below_its_limit(mds: str, expected: list[list[str]], tmp_path: Path) -> None:
    sizes = [shard.raw_data.bytes for shard in stream(mds, None).dataloader.dataset.shards.shards]
    limit = 4 * max(sizes)
    assert limit < sum(sizes) / 1.5
    spec = stream(mds, tmp_path, cache_limit=limit, predownload=4)
    dataset, most, fetched = spec.dataloader.dataset, 0, 0
    prepare = dataset.shards._prepare

    def count(*arguments: Any) -> None:
        nonlocal most, fetched
        prepare(*arguments)
        used = sum(path.stat().st_size for path in tmp_path.glob("train/*.mds"))
        most, fetched = max(most, used), fetched + 1

    dataset.shards._prepare = count
    seen = digests(batches(spec))
    assert 0 < most <= limit
    assert len(seen) == len(set(seen)) == 44
    assert set(seen) == set(expected[0])  # another order, no other samples
    # The order goes through two shards at a time, so that each is fetched once.
    assert fetched == len(sizes)
    spec = stream(mds, tmp_path / "b", cache_limit=limit, num_workers=2)
    assert digests(batches(spec)) == seen
    assert digests(batches(spec, 1)) != seen
    # With room for all of it, it is the order without a limit.
    spec = stream(mds, tmp_path / "c", cache_limit=sum(sizes))
    assert digests(batches(spec)) == expected[0]
    with pytest.raises(DataError, match=r"cache_limit 1kb is less than 4 shards of .*/train, the"):
        stream(mds, tmp_path, cache_limit="1kb")


def test_the_shard_that_was_not_read_for_longest_makes_room(mds: str, tmp_path: Path) -> None:
    dataset = stream(mds, tmp_path, cache_limit="1gb").dataloader.dataset
    shards = dataset.shards
    for shard in range(4):
        shards.fetch(shard)
        os.utime(shards.path(shard), (shard + 1, shard + 1))
    dataset.read(0)  # the oldest, which is then the newest
    shards.cache_limit = sum(os.path.getsize(shards.path(shard)) for shard in range(4))
    shards.fetch(4)
    assert os.path.exists(shards.path(0)) and not os.path.exists(shards.path(1))


def test_a_cache_of_other_data_is_refused(folder: str, mds: str, tmp_path: Path) -> None:
    path = Path(shutil.copytree(mds, tmp_path / "mds"))
    stream(str(path), tmp_path / "cache")
    stream(str(path), tmp_path / "cache")
    shutil.rmtree(path)
    write(folder, path, size_limit=9_000)
    with pytest.raises(DataError, match=f"cache/train has an earlier version of {path}/train"):
        stream(str(path), tmp_path / "cache")
    assert sorted(os.listdir(tmp_path / "cache/train")) == ["index.json", "index.json.lock"]


def test_processes_share_a_cache(mds: str, expected: list[list[str]], tmp_path: Path) -> None:
    found: dict[int, list[str]] = {}

    def run(number: int) -> None:
        found[number] = digests(batches(stream(mds, tmp_path, predownload=9)))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [expected[0]] * 3


# What goes wrong


def spoil(path: Path, offset: int = 2000) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + 20] = bytes(20)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}])
def test_a_damaged_shard_is_named(
    folder: str, tmp_path: Path, options: dict[str, Any], workers: int
) -> None:
    path = write(folder, tmp_path / "mds", **options)
    name = "shard.00001.mds" + (".zstd" if options else "")
    spoil(tmp_path / "mds/train" / name)
    spec = stream(path, tmp_path / "cache", num_workers=workers)
    with pytest.raises(DataError, match=f"^{path}/train/{name}: is damaged: Checksum failure.*$"):
        batches(spec)
    if workers:
        spec.dataloader._iterator._shutdown_workers()
    assert not list((tmp_path / "cache/train").glob("shard.00001.mds*[!k]"))  # but its lock
    shutil.copy(Path(write(folder, tmp_path / "good", **options), "train", name), path + "/train")
    assert len(batches(stream(path, tmp_path / "cache"))) == 11  # nothing of it was kept


def test_a_shard_that_went_bad_in_the_cache_is_named(mds: str, tmp_path: Path) -> None:
    batches(stream(mds, tmp_path))
    path = tmp_path / "train/shard.00001.mds"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"shard\.00001\.mds"):
        batches(stream(mds, tmp_path))
    path.unlink()
    assert len(batches(stream(mds, tmp_path))) == 11


def test_what_is_missing_is_named(mds: str, folder: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/nowhere/train/index\.json: "):
        stream("/nowhere", None)
    with pytest.raises(DataError, match=r"/nowhere/train/index\.json: "):
        stream("/nowhere", tmp_path / "a")
    with pytest.raises(DataError, match=r"^s3://bucket/set: no local folder is given"):
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
    with pytest.raises(DataError, match=r"other/train: columns \['text'\], not"):
        stream(str(tmp_path / "other"), None)
    with pytest.raises(DataError, match=r"train/shard\.0000\d\.mds: .*Hash algorithm `md5`"):
        batches(stream(mds, tmp_path / "e", validate_hash="md5"))


def test_a_bad_photo_in_a_shard_is_named(mds: str, folder: str, tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path / "train"), columns=COLUMNS) as writer:
        sample = list_samples(folder, "train")[0]
        mask = Path(sample.mask_path).read_bytes()
        writer.write({"uid": "street/7", "x": b"<html>", "y": mask})
    dataset = StreamingADE20k(None, str(tmp_path), "train")
    expected = r"/train/shard\.00000\.mds, sample street/7, photo: not an image$"
    with pytest.raises(DataError, match=expected):
        dataset[0]


def test_tries_again_and_says_so(
    mds: str,
    expected: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(shards.time, "sleep", waited.append)
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


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_whose_store_stays_away_is_to_be_begun_again(
    mds: str,
    tiny: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    def refuse(*_: Any) -> None:
        raise ConnectionError("connection refused")

    monkeypatch.setattr(shards.Shards, "_prepare", refuse)
    stored = dict(is_streaming=True, path=mds, local=str(tmp_path), download_retry=0)
    tiny["train_dataset"] |= stored | {"num_workers": workers}
    (tmp_path / "run.yaml").write_text(json.dumps(tiny))
    assert program.run([str(tmp_path / "run.yaml")]) == TRY_AGAIN
    error = capfd.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"error: {mds}/train/shard\.0000\d\.mds: connection refused", error)


# From S3


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def url(s3: S3Server, mds: str) -> str:
    return s3.upload(mds, "set")


def test_trains_from_s3_with_an_empty_cache_and_a_full_one(
    s3: S3Server, url: str, expected: list[list[str]], tmp_path: Path
) -> None:
    for number, workers in enumerate((2, 0)):
        spec = stream(url, tmp_path / "cache", num_workers=workers)
        model, _ = train(spec, tmp_path / str(number), max_duration="2ep")
        assert model.seen == [*expected[0], *expected[1]]
        s3.kill()  # the second run needs it no more
    s3.start()


@pytest.mark.processes
def test_an_outage_costs_a_retry_not_the_run(
    s3: S3Server, url: str, expected: list[list[str]], tmp_path: Path
) -> None:
    spec = stream(url, tmp_path, num_workers=1, predownload=0, download_retry=6, prefetch_factor=1)
    found = []
    for number, batch in enumerate(spec.dataloader):
        found += digests([spec.microbatch_transforms(batch)])
        if number == 0:
            cached = len(list(tmp_path.glob("train/*.mds")))
            s3.kill()
            threading.Timer(2, s3.start).start()
    assert found == expected[0]
    assert cached < len(
        spec.dataloader.dataset.shards.shards
    )  # some were fetched after it was gone


@pytest.mark.parametrize("fault", ["503", "cut", "silent"])
def test_a_store_at_fault_costs_retries_not_the_run(
    s3: S3Server,
    url: str,
    expected: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    store = FaultyStore(s3.ports["s3"])
    monkeypatch.setenv("S3_ENDPOINT_URL", store.url)
    spec = stream(url, tmp_path, predownload=0, download_retry=6)

    def recover() -> None:
        with store.having(fault):
            at_fault.set()
            time.sleep(4)

    at_fault, began = threading.Event(), time.monotonic()
    threading.Thread(target=recover).start()
    at_fault.wait()
    assert digests(batches(spec)) == expected[0]
    assert time.monotonic() - began > 4  # as long as the store had it
    said = "; trying again in" in caplog.text
    assert said == (fault != "silent")  # which passes before a time-out
    store.close()


def test_what_s3_refuses_is_said_at_once(
    s3: S3Server, url: str, mds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: pytest.fail("it waited"))
    options = dict(download_retry=6, predownload=0)
    with pytest.raises(DataError, match=r"^s3://data/typo/train/index\.json: .*not found"):
        stream("s3://data/typo", tmp_path / "a", **options)
    with pytest.raises(DataError, match=r"^s3://no-bucket/set/train/index\.json: "):
        stream("s3://no-bucket/set", tmp_path / "b", **options)
    s3.client.delete_object(Bucket="data", Key="set/train/shard.00003.mds")
    with pytest.raises(DataError, match=r"^s3://data/set/train/shard\.00003\.mds: .*not found"):
        batches(stream(url, tmp_path / "c", **options))
    s3.client.put_object(Bucket="data", Key="set/train/shard.00003.mds", Body=b"something else")
    with pytest.raises(DataError, match=r"^s3://data/set/train/shard\.00003\.mds: is damaged"):
        batches(stream(url, tmp_path / "d", **options))
    s3.upload(mds, "set")
