"""Tests of extras/sharing/card.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from extras.sharing.card import CARD, MARK
from tests.support.artifacts import random_network
from tests.support.card import exported, front_matter, photo, weights  # noqa: F401

pytestmark = pytest.mark.usefixtures("small_network")


def test_model_card_describes_the_export(exported: Path, weights: Path, photo: Path) -> None:
    card = (exported / CARD).read_text()
    assert card.startswith("---\n") and MARK in card
    parameters = sum(p.numel() for p in random_network().parameters()) / 1e6
    assert f"12 classes: DeepLabV3+ on resnet50, {parameters:.1f} million parameters" in card
    assert "; licence: CC BY 4.0" in card and "- recipe: mild" in card
    assert "- learning rate: 0.02" in card and "- crop size, pixels: 32" in card
    assert Image.open(exported / "overlay.jpg").width > 320
    for name in ("model.safetensors", "model.onnx"):
        (row,) = [line for line in card.splitlines() if line.startswith(f"| `{name}`")]
        _, _, size, seconds, _ = row.split("|")
        assert float(size) == pytest.approx((exported / name).stat().st_size / 1e6, abs=0.06)
        assert float(seconds) > 0
    assert "60 x 45 pixels, with a shorter side of 32 at the network's input, on " in card
    assert "/" not in front_matter(card)["model-index"][0]["results"][0]["dataset"]["name"]
