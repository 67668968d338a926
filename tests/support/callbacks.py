"""The trainer and the save folder of a finished run, as a fixture."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.artifacts import finished_run


@pytest.fixture(scope="module")
def run() -> tuple[Any, str]:
    return finished_run()
