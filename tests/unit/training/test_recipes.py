"""Tests of training/recipes.py."""

from __future__ import annotations

from typing import Any

import pytest

from errors import ConfigError
from tests.support.paths import ROOT
from training.build_recipe import build_algorithms
from training.config import help_text, resolve
from training.recipes import BASELINE, RECIPES


def test_recipe_settings_can_be_set_in_the_yaml(tiny: dict[str, Any]) -> None:
    tiny["recipe_name"] = "hot"
    tiny["hot"] = {
        "ema": {"half_life": "7ba", "update_interval": "2ba"},
        "sam": {"rho": 0.5, "interval": 3},
        "mixup": {"alpha": 0.9},
    }
    _, ema, sam, mixup = build_algorithms(resolve(tiny))
    assert ema.smoothing == pytest.approx(2 ** (-2 / 7))
    assert (sam.rho, sam.interval, mixup.alpha) == (0.5, 3, 0.9)


def test_keys_of_algorithms_outside_the_recipe_are_rejected(tiny: dict[str, Any]) -> None:
    tiny |= {"recipe_name": "mild", "mild": {"sam": {"rho": 0.1}}}
    with pytest.raises(ConfigError, match=r"unknown key mild\.sam"):
        resolve(tiny)
    assert "mild.sam.rho" not in help_text() and "hot.sam.rho" in help_text()


def test_documentation_lists_the_settings_of_all_recipes() -> None:
    page = (ROOT / "docs/recipes.md").read_text()
    for name, recipe in {"(empty)": BASELINE, **RECIPES}.items():
        ema, sam, mixup = recipe.ema, recipe.sam, recipe.mixup
        cells = (
            name,
            recipe.max_duration,
            recipe.schedule,
            f"half-life {ema.half_life}, every {ema.update_interval}" if ema else "no",
            f"rho {sam.rho}, every {sam.interval}ba" if sam else "no",
            f"alpha {mixup.alpha}" if mixup else "no",
        )
        assert f"\n| {' | '.join(cells)} |\n" in page
