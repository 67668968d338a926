"""Tests of dataset/downloads.py."""

from pathlib import Path

import pytest

from dataset import downloads
from dataset.downloads import fetch_beside, is_final, is_missing
from errors import StoreError
from tests.support.source import client_error


def test_failed_downloads_are_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [ConnectionResetError("reset"), client_error("503")]

    def download(remote: str, local: str) -> None:
        if answers:
            raise answers.pop()
        Path(local).write_text("x")

    monkeypatch.setattr(downloads.CloudDownloader, "direct_download", download)
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    assert fetch_beside("s3://b/set", "description.yaml", str(tmp_path)) is not None
    answers += [ConnectionResetError("reset")] * 9
    with pytest.raises(StoreError, match="reset"):
        fetch_beside("s3://b/set", "description.yaml", str(tmp_path))


@pytest.mark.parametrize(
    ("error", "missing", "final"),
    [
        pytest.param(client_error("404"), True, True, id="HTTP 404"),
        pytest.param(client_error("NoSuchKey"), True, True, id="S3 NoSuchKey"),
        pytest.param(client_error("403"), False, True, id="HTTP 403"),
        pytest.param(client_error("503"), False, False, id="HTTP 503"),
        pytest.param(ConnectionResetError("reset"), False, False, id="connection reset"),
        pytest.param(FileNotFoundError("a"), True, True, id="missing local file"),
        pytest.param(
            OSError("object gs://b/a does not exist"), True, False, id="missing Google Cloud object"
        ),
    ],
)
def test_download_errors_are_classified_as_missing_or_permanent(
    error: Exception, missing: bool, final: bool
) -> None:
    assert is_missing(error) is missing
    assert is_final(error) is final


def test_description_beside_local_shards_is_found(tmp_path: Path) -> None:
    (tmp_path / "description.yaml").touch()
    assert fetch_beside(str(tmp_path), "description.yaml", "unused") == str(
        tmp_path / "description.yaml"
    )
    assert fetch_beside(str(tmp_path), "other.yaml", "unused") is None
