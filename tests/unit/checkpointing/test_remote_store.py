"""Tests of checkpointing/remote_store.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpointing.remote_store import RemoteFolder
from errors import RunError


def test_failed_upload_ends_the_run_but_keeps_the_local_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("no such bucket")

    monkeypatch.setattr("checkpointing.remote_store.UPLOAD_FOR", 0)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    target = RemoteFolder("s3://bucket/runs")
    monkeypatch.setattr(target.store, "upload_object", fail)
    (tmp_path / "file").write_bytes(b"checkpoint")
    target.publish(str(tmp_path / "file"), "ep0-ba2-rank0.pt", keep=1)
    with pytest.raises(
        RunError, match=r"no such bucket.*, but the checkpoint is still at "
    ) as caught:
        target.wait(60)
    kept = Path(str(caught.value).rpartition(" ")[2])
    del target  # this also deletes the scratch folder of the target
    assert kept.read_bytes() == b"checkpoint"
