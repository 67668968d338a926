"""Tests of training/pictures.py."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.callbacks import run  # noqa: F401
from tests.support.run_helpers import file_limit
from training import pictures
from training.pictures import save_file


def test_one_object_store_client_writes_all_files_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client per file would leak some MB each, because clients contain reference cycles."""
    clients, uploads = [], []

    def make(uri: str) -> SimpleNamespace:
        clients.append(uri)
        return SimpleNamespace(upload_object=lambda name, file: uploads.append(name))

    monkeypatch.setattr(pictures, "maybe_create_object_store_from_uri", make)
    for name in ("curves.png", "pictures/ep1-ba2.png"):
        assert save_file(b"data", "s3://one-client/run", name) == f"s3://one-client/run/{name}"
    assert clients == ["s3://one-client/"]
    assert uploads == ["run/curves.png", "run/pictures/ep1-ba2.png"]


def test_files_are_written_atomically(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = save_file(b"one", str(tmp_path), "a/b.png")
    assert Path(path).read_bytes() == b"one"
    save_file(b"two", str(tmp_path), "a/b.png")
    assert os.listdir(tmp_path / "a") == ["b.png"] and Path(path).read_bytes() == b"two"
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert save_file(b"", str(tmp_path / "file"), "c.png") is None
    assert "cannot write" in caplog.text
    before = sorted(tmp_path.rglob("*"))
    with file_limit(100):
        assert save_file(bytes(1000), str(tmp_path), "a/b.png") is None
    assert f"{tmp_path}/a/b.png: File too large" in caplog.text
    assert sorted(tmp_path.rglob("*")) == before


def test_files_are_uploaded_to_object_stores(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    stored = {}

    class Store:
        def upload_object(self, name: str, file: str) -> None:
            stored[name] = Path(file).read_bytes()

    monkeypatch.setattr(pictures, "maybe_create_object_store_from_uri", lambda uri: Store())
    assert (
        save_file(b"png", "s3://bucket/run", "pictures/a.png") == "s3://bucket/run/pictures/a.png"
    )
    assert stored == {"run/pictures/a.png": b"png"}
    monkeypatch.setattr(Store, "upload_object", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    assert save_file(b"png", "s3://bucket/run", "a.png") is None
    assert "gone" in caplog.text
