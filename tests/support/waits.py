"""Fixtures that shorten waits and measurements."""

import pytest

from extras.preparation import check_command


@pytest.fixture(autouse=True)
def short_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_command, "SPEED_SECONDS", 0.01)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries of a download follow each other at once."""
    monkeypatch.setattr("dataset.downloads.time.sleep", lambda seconds: None)
