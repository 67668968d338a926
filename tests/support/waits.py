"""Fixtures that shorten speed measurements and skip the pauses before retries."""

import functools
from typing import Any

import pytest

from extras.preparation import check_command
from extras.preparation.check_command import measure_loader


@pytest.fixture(autouse=True)
def short_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the speed measurement of data.py load only a few images, without loader processes."""

    def measure(build_dataspec: Any, *arguments: Any) -> Any:
        return measure_loader(functools.partial(build_dataspec, num_workers=0), *arguments)

    monkeypatch.setattr(check_command, "SPEED_SECONDS", 0.01)
    monkeypatch.setattr(check_command, "SPEED_BATCH", 4)
    monkeypatch.setattr(check_command, "measure_loader", measure)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the pauses between the attempts of a download."""
    monkeypatch.setattr("dataset.downloads.time.sleep", lambda seconds: None)
