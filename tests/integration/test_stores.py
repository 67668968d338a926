"""Save folders and object stores that cannot be written are rejected before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from errors import ConfigError
from main import main
from tests.support.s3_server import S3Server
from tests.support.stores import server  # noqa: F401

pytestmark = pytest.mark.usefixtures("small_network", "no_curves")


def test_unwritable_object_store_is_rejected_before_training(
    tiny: dict[str, Any], server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"cannot write to s3://no-such-bucket/x: .*NoSuchBucket"):
        main({**tiny, "save_folder": "s3://no-such-bucket/x"})
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(ConfigError, match=r"cannot write to s3://data/x: .*SignatureDoesNot"):
            main({**tiny, "save_folder": "s3://data/x"})
    with monkeypatch.context() as patch:
        patch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(ConfigError, match=r"cannot write to s3://data/x: .*Could not connect"):
            main({**tiny, "save_folder": "s3://data/x"})


def test_unwritable_save_folder_is_rejected_before_training(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    for folder in (f"{tmp_path}/file/saved", "/proc/nowhere"):
        with pytest.raises(ConfigError, match=f"save_folder: cannot write to {folder}: "):
            main({**tiny, "save_folder": folder})
