"""Tests of checkpointing/remote_store.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
