"""Checkpoint uploads to an object store during outages."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from checkpointing.remote_store import RemoteFolder
from checkpointing.stores import NewCheckpoint
from tests.support.s3_server import S3Server
from tests.support.stores import assert_failed_upload_keeps_checkpoint, server  # noqa: F401

pytestmark = pytest.mark.usefixtures("small_network")


def test_newest_checkpoint_is_uploaded_after_an_outage(
    server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = RemoteFolder("s3://data/outage")
    target.probe()
    paths = [tmp_path / f"{batch}" for batch in (2, 4, 6)]
    for path in paths:
        path.write_bytes(os.urandom(1 << 20))
    content = paths[2].read_bytes()
    server.kill()
    target.publish(NewCheckpoint(str(paths[0]), "ep0-ba2-rank0.pt", keep=1))
    deadline, refused = time.monotonic() + 60, "cannot upload s3://data/outage/ep0-ba2-rank0.pt"
    while refused not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.1)
    assert refused in caplog.text
    target.publish(NewCheckpoint(str(paths[1]), "ep0-ba4-rank0.pt", keep=1))
    target.publish(NewCheckpoint(str(paths[2]), "ep0-ba6-rank0.pt", keep=1))
    assert not target.wait(0)
    server.start()
    assert target.wait(60)
    assert target.names()[0] == "ep0-ba6-rank0.pt"
    assert target.latest() == "ep0-ba6-rank0.pt"
    (tmp_path / "back").mkdir()
    assert Path(target.fetch("ep0-ba6-rank0.pt", f"{tmp_path}/back")).read_bytes() == content
    assert not any(path.exists() for path in paths)


def test_best_and_newest_checkpoints_are_uploaded_after_outage(
    server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = RemoteFolder("s3://data/best")

    def publish(batch: int, best: int) -> None:
        (tmp_path / "new").write_bytes(str(batch).encode())
        names = [f"ep0-ba{number}-rank0.pt" for number in (batch, best)]
        own = [f"ep0-ba{number}-rank0.pt" for number in range(batch + 1)]
        target.publish(NewCheckpoint(str(tmp_path / "new"), names[0], 1, names[1], own))

    server.kill()
    publish(2, 2)
    deadline = time.monotonic() + 60
    while "cannot upload" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.1)
    publish(2, 2)  # published again after the evaluation found it best
    for batch, best in ((4, 2), (5, 5), (6, 5), (7, 5)):
        publish(batch, best)
    assert [item.name for item in target._waiting] == ["ep0-ba5-rank0.pt", "ep0-ba7-rank0.pt"]
    server.start()
    assert target.wait(60)
    assert target.names() == ["ep0-ba7-rank0.pt", "ep0-ba5-rank0.pt"]

    def pointer() -> str | None:
        keys = target.store.list_objects("best/best-rank0.pt.symlink")
        if not keys:
            return None
        body = target.store.client.get_object(Bucket="data", Key=keys[0])["Body"]
        return body.read().decode()

    assert pointer() == "best/ep0-ba5-rank0.pt"
    target.point_best("ep0-ba7-rank0.pt")
    assert pointer() == "best/ep0-ba7-rank0.pt"
    target.point_best(None)
    assert pointer() is None
    assert os.listdir(target.scratch).count("new") == 0


def test_error_of_the_object_store_ends_the_run_but_keeps_the_local_checkpoint(
    server: S3Server, tmp_path: Path
) -> None:
    assert_failed_upload_keeps_checkpoint("s3://no-such-bucket/runs", tmp_path, "NoSuchBucket")
