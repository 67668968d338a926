"""Tests of checkpointing/remote_store.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpointing.remote_store import RemoteFolder
from errors import RunError
from tests.support.s3_server import S3Server
from tests.support.stores import server  # noqa: F401

pytestmark = pytest.mark.usefixtures("small_network")


def test_failed_upload_ends_the_run_but_keeps_the_local_checkpoint(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpointing.remote_store.UPLOAD_FOR", 0)
    target = RemoteFolder("s3://no-such-bucket/runs")
    (tmp_path / "file").write_bytes(b"checkpoint")
    target.publish(str(tmp_path / "file"), "ep0-ba2-rank0.pt", keep=1)
    with pytest.raises(
        RunError, match=r"NoSuchBucket.*, but the checkpoint is still at "
    ) as caught:
        target.wait(60)
    kept = Path(str(caught.value).rpartition(" ")[2])
    del target  # this also deletes the scratch folder of the target
    assert kept.read_bytes() == b"checkpoint"
