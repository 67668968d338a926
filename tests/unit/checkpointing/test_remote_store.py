"""Tests of checkpointing/remote_store.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpointing.remote_store import RemoteFolder
from tests.support.stores import assert_failed_upload_keeps_checkpoint


def test_failed_upload_ends_the_run_but_keeps_the_local_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("no such bucket")

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setattr("checkpointing.remote_store.S3ObjectStore.upload_object", fail)
    assert_failed_upload_keeps_checkpoint("s3://bucket/runs", tmp_path, "no such bucket")


def test_only_an_existing_pointer_to_the_best_checkpoint_is_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objects, removed = [], []
    store = "checkpointing.remote_store.S3ObjectStore"
    monkeypatch.setattr(f"{store}.list_objects", lambda self, prefix: objects)
    monkeypatch.setattr(RemoteFolder, "_delete", lambda self, name: removed.append(name))
    target = RemoteFolder("s3://bucket/runs")
    target.point_best(None)
    assert removed == []
    objects.append("runs/best-rank0.pt.symlink")
    target.point_best(None)
    assert removed == ["best-rank0.pt.symlink"]
