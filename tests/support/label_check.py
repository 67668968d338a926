"""The warnings that training.label_check has logged."""

from __future__ import annotations

import pytest


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "training.label_check"]
