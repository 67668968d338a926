"""Tests of extras/sharing/card.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from errors import UserError
from extras.sharing.card import read_scores

SCORES: dict[str, Any] = {"classes": [{"class": "road"}, {"class": "sky"}], "weights": "ema"}


def test_scores_of_the_same_classes_and_weights_are_read(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(SCORES))
    assert read_scores(str(path), ["road", "sky"], "ema") == SCORES


@pytest.mark.parametrize(
    ("scores", "error"),
    [
        pytest.param("no JSON", "was not written by evaluate.py --json; choose", id="text"),
        pytest.param("[1, 2]", "was not written by evaluate.py --json; choose", id="other JSON"),
        pytest.param(
            json.dumps({**SCORES, "classes": [{"class": "sky"}, {"class": "road"}]}),
            r"contains scores for different classes \(sky, road\)",
            id="other order of the classes",
        ),
        pytest.param(
            json.dumps({**SCORES, "weights": "training"}),
            "contains scores of the training weights; evaluate the ema weights instead",
            id="other weights",
        ),
    ],
)
def test_scores_that_do_not_belong_to_the_model_are_rejected(
    scores: str, error: str, tmp_path: Path
) -> None:
    path = tmp_path / "scores.json"
    path.write_text(scores)
    with pytest.raises(UserError, match=error):
        read_scores(str(path), ["road", "sky"], "ema")
