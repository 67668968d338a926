"""A local S3 server as a fixture, and a check of uploads that fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointing.remote_store import RemoteFolder
from checkpointing.stores import NewCheckpoint
from errors import RunError
from tests.support.s3_server import S3Server, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


def assert_failed_upload_keeps_checkpoint(uri: str, folder: Path, error: str) -> None:
    """Upload a checkpoint that the store rejects; the error must name a file that still exists.

    Args:
        uri: URI of the remote folder.
        folder: Local folder for the checkpoint.
        error: Start of the expected message, as a regular expression.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("checkpointing.remote_store.UPLOAD_FOR", 0)
        target = RemoteFolder(uri)
        (folder / "file").write_bytes(b"checkpoint")
        target.publish(NewCheckpoint(str(folder / "file"), "ep0-ba2-rank0.pt", keep=1))
        with pytest.raises(
            RunError, match=rf"{error}.*, but the checkpoint is still at "
        ) as caught:
            target.wait(60)
    kept = Path(str(caught.value).rpartition(" ")[2])
    del target  # this also deletes the scratch folder of the target
    assert kept.read_bytes() == b"checkpoint"
