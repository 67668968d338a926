"""Data sets in shards give the same samples as in folders, also on resume and in a shared cache."""

from __future__ import annotations

import json
import pickle
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import main as program
from dataset import shards
from errors import TRY_AGAIN, DataError
from tests.support.data import batches, build, digests, on_rank, train
from tests.support.streaming import expected, folder, mds, stream  # noqa: F401

pytestmark = pytest.mark.usefixtures("small_network")


def test_shards_give_same_validation_samples_as_folders(
    mds: str, folder: str, tmp_path: Path
) -> None:
    spec = stream(mds, tmp_path, split="val", num_workers=1)
    assert digests(batches(spec)) == digests(batches(build(folder, split="val")))


@pytest.mark.parametrize("ranks", [1, 2])
def test_streaming_resumes_in_mid_epoch_on_any_number_of_ranks(
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


def test_resumed_run_streams_remaining_samples(
    mds: str, expected: list[list[str]], tmp_path: Path
) -> None:
    train(stream(mds, tmp_path / "a"), tmp_path, max_duration="7ba")
    model, _ = train(
        stream(mds, tmp_path / "b", num_workers=1),  # an empty cache, as on another machine
        tmp_path / "resumed",
        load_path=str(tmp_path / "7.pt"),
        max_duration="2ep",
    )
    assert model.seen == [*expected[0][28:], *expected[1]]


def test_streaming_data_set_can_be_pickled(mds: str, tmp_path: Path) -> None:
    dataset = stream(mds, tmp_path).dataloader.dataset
    dataset.prefetch(40)
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(a, b) for a, b in zip(copy[5], dataset[5]))


def test_shard_cache_stays_below_cache_limit(
    mds: str, expected: list[list[str]], tmp_path: Path
) -> None:
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
    assert set(seen) == set(expected[0])  # the same samples in a different order
    # The samples come from two shards at a time, so that each shard is fetched only once.
    assert fetched == len(sizes)
    spec = stream(mds, tmp_path / "b", cache_limit=limit, num_workers=2)
    assert digests(batches(spec)) == seen
    assert digests(batches(spec, 1)) != seen
    # If all shards fit into the cache, the limit does not change the order.
    spec = stream(mds, tmp_path / "c", cache_limit=sum(sizes))
    assert digests(batches(spec)) == expected[0]
    with pytest.raises(DataError, match=r"cache_limit 1kb is too small for .*/train; use at least"):
        stream(mds, tmp_path, cache_limit="1kb")


def test_several_loaders_share_a_shard_cache(
    mds: str, expected: list[list[str]], tmp_path: Path
) -> None:
    digests_by_number: dict[int, list[str]] = {}

    def run(number: int) -> None:
        digests_by_number[number] = digests(batches(stream(mds, tmp_path, predownload=9)))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(digests_by_number.values()) == [expected[0]] * 3


@pytest.mark.parametrize("workers", [0, 1])
def test_run_ends_with_retry_exit_status_if_store_is_down(
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
