"""Tests of extras/preparation/hugging_face.py."""

from __future__ import annotations

from typing import Any

import pytest

from errors import DataError
from extras.preparation import hugging_face
from tests.support.convert_dataset import COUNT, columns, convert, expected, image_folder, masks_of  # noqa: F401
from tests.support.waits import short_measurement  # noqa: F401


def test_failed_download_of_class_names_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    errors: list[Exception] = [
        EntryNotFoundError.__new__(EntryNotFoundError),
        LocalEntryNotFoundError("the hub cannot be reached"),
        OSError(101, "Network is unreachable"),
        RuntimeError("503 Service Unavailable"),
    ]

    def download(*arguments: Any, **options: Any) -> str:
        raise errors[0]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert hugging_face._names("owner/name", None) == {}
    while errors := errors[1:]:
        with pytest.raises(
            DataError,
            match=r"owner/name: cannot download the class names in id2label.json.*--names",
        ):
            hugging_face._names("owner/name", None)
