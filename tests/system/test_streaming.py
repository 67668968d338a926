"""Training from shards on S3, through outages, network faults, and missing or damaged objects."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataset import downloads
from errors import DataError
from tests.support.data import batches, digests, train
from tests.support.faulty_store import FaultyStore
from tests.support.s3_server import S3Server, s3_server
from tests.support.streaming import expected, folder, mds, stream  # noqa: F401


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def url(s3: S3Server, mds: str) -> str:
    return s3.upload(mds, "set")


def test_run_trains_from_s3_and_then_from_its_cache(
    s3: S3Server, url: str, expected: list[list[str]], tmp_path: Path
) -> None:
    for number, workers in enumerate((2, 0)):
        spec = stream(url, tmp_path / "cache", num_workers=workers)
        model, _ = train(spec, tmp_path / str(number), max_duration="2ep")
        assert model.seen == [*expected[0], *expected[1]]
        s3.kill()  # so the second run can only read its cache
    s3.start()


def test_run_continues_after_an_outage_of_s3(
    s3: S3Server, url: str, expected: list[list[str]], tmp_path: Path
) -> None:
    spec = stream(url, tmp_path, num_workers=1, predownload=0, download_retry=6, prefetch_factor=1)
    seen = []
    for number, batch in enumerate(spec.dataloader):
        seen += digests([spec.microbatch_transforms(batch)])
        if number == 0:
            cached = len(list(tmp_path.glob("train/*.mds")))
            s3.kill()
            threading.Timer(2, s3.start).start()
    assert seen == expected[0]
    assert cached < len(
        spec.dataloader.dataset.shards.shards
    )  # some shards were downloaded after the outage


@pytest.mark.parametrize("fault", ["503", "cut", "silent"])
def test_run_continues_after_s3_errors_and_stalls(
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
    assert time.monotonic() - began > 4  # loading waited until the fault ended
    has_retried = "; trying again in" in caplog.text
    assert has_retried == (fault != "silent")  # the silent store recovers before a time-out
    store.close()


def test_missing_and_damaged_s3_objects_fail_without_retry(
    s3: S3Server, url: str, mds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: pytest.fail("it waited"))
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
