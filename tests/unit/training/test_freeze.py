"""Tests of training/freeze.py."""

from __future__ import annotations

from typing import Any

import pytest

from errors import ConfigError
from training.config import resolve

pytestmark = pytest.mark.usefixtures("small_network")


def test_freeze_backbone_accepts_only_durations(tiny: dict[str, Any]) -> None:
    tiny["model"]["freeze_backbone"] = 2
    assert resolve(tiny).model.freeze_backbone == "2ep"
    tiny["model"]["freeze_backbone"] = "long"
    with pytest.raises(ConfigError, match=r"model\.freeze_backbone: 'long' is not a time"):
        resolve(tiny)
