"""Tests of extras/evaluation_data.py; integration/test_evaluate.py evaluates complete datasets."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from errors import ConfigError
from extras.evaluation_data import compare_background, data_source
from segmentation.classes import load_classes


@pytest.mark.parametrize(
    ("ours", "recorded", "outcome"),
    [
        pytest.param(True, {}, "fine", id="no recorded setting"),
        pytest.param(True, {"ignore_background": True}, "fine", id="same setting"),
        pytest.param(
            False,
            {"ignore_background": True, "path": "a"},
            "refused",
            id="different setting, same dataset",
        ),
        pytest.param(
            False,
            {"ignore_background": True, "path": "b"},
            "warned",
            id="different setting and dataset",
        ),
    ],
)
def test_label_0_must_mean_the_same_as_in_training(
    ours: bool, recorded: dict[str, Any], outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = {"ignore_background": ours, "path": "a"}
    if outcome == "refused":
        with pytest.raises(ConfigError, match="remove --ignore-background"):
            compare_background(arguments, recorded)
    else:
        compare_background(arguments, recorded)
        assert bool(caplog.records) is (outcome == "warned")


def options(**changes: Any) -> argparse.Namespace:
    """Return the default command-line options with the given changes."""
    names = ("config", "data", "path", "local", "ignore_background")
    return argparse.Namespace(**{**dict.fromkeys(names), "batch_size": 8, **changes})


def model(path: str | None = None) -> Any:
    """Return a model with three classes and the validation folder of its run."""
    config = {"eval_dataset": {"path": path, "ignore_background": False}} if path else {}
    return SimpleNamespace(config=config, classes=load_classes(["a", "b", "c"], 3))


def test_command_line_overrides_the_validation_set_of_the_run(tmp_path: Path) -> None:
    source, arguments = data_source(options(), model("recorded"))
    assert source.path == "recorded" and source.split == "val"
    assert arguments["ignore_background"] is False and not arguments["shuffle"]
    source, _ = data_source(options(path=str(tmp_path)), model("recorded"))
    assert source.path == str(tmp_path) and source.shards is None
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "index.json").touch()
    assert data_source(options(path=str(tmp_path)), model("recorded"))[0].shards is not None


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        pytest.param({}, "does not name a validation set", id="no dataset"),
        pytest.param(
            {"path": "s3://bucket/set"}, "set a cache folder with --local", id="remote dataset"
        ),
    ],
)
def test_missing_validation_set_gives_an_error(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        data_source(options(**changes), model())
