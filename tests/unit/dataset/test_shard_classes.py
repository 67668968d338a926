"""Tests of dataset/shard_classes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError

from dataset import downloads
from dataset.description import ade20k
from dataset.downloads import fetch_beside
from dataset.shard_classes import shard_classes
from dataset.source import DataSource, ShardOptions
from errors import DataError
from tests.support.source import client_error, tree


@pytest.mark.parametrize(
    ("error", "is_error"),
    [
        pytest.param(
            FileNotFoundError("Object gs://b/x not found."), False, id="missing Google Cloud object"
        ),
        pytest.param(client_error("404"), False, id="HTTP 404"),
        pytest.param(client_error("NoSuchKey"), False, id="S3 NoSuchKey"),
        pytest.param(
            RuntimeError("The specified blob does not exist."), False, id="missing Azure blob"
        ),
        pytest.param(client_error("403"), True, id="HTTP 403"),
        pytest.param(client_error("500"), True, id="HTTP 500"),
        pytest.param(client_error("SlowDown"), True, id="S3 SlowDown"),
        pytest.param(ConnectionResetError("reset by peer"), True, id="connection reset"),
        pytest.param(
            EndpointConnectionError(endpoint_url="http://x"), True, id="unreachable endpoint"
        ),
        pytest.param(PermissionError(13, "denied"), True, id="permission denied"),
        pytest.param(TimeoutError("timed out"), True, id="timeout"),
    ],
)
def test_only_a_not_found_error_means_that_no_description_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, is_error: bool
) -> None:
    def download(*_: Any) -> None:
        raise error

    monkeypatch.setattr(downloads.CloudDownloader, "direct_download", download)
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)

    def find() -> str | None:
        return fetch_beside("s3://b/set", "description.yaml", str(tmp_path))

    source = DataSource("s3://b/set", "train", ade20k(), ShardOptions(str(tmp_path / "cache")))
    if not is_error:
        assert find() is None and shard_classes(source) is None
        return
    with pytest.raises(DataError, match=r"s3://b/set/description\.yaml: "):
        find()
    with pytest.raises(DataError, match=r"s3://b/set/description\.yaml: "):
        shard_classes(source)
    # A run with a cached split continues without the store.
    tree(tmp_path, ["cache/train/index.json"])
    assert shard_classes(source) is None
