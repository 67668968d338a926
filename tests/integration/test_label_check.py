"""Runs warn about classes that no mask contains; undefined scores are null in JSON."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import evaluate
from main import main, run
from tests.support.label_check import warnings

pytestmark = pytest.mark.usefixtures("small_network", "no_curves")


Rule = Callable[[np.ndarray], np.ndarray]


@pytest.fixture
def changed(synthetic: str, tmp_path: Path) -> Callable[[str, Rule], str]:
    """Return a function that copies the data set and applies a rule to the labels of its masks."""

    def copy(name: str, rule: Rule) -> str:
        root = Path(shutil.copytree(synthetic, tmp_path / name))
        for file in root.rglob("*.png"):
            cv2.imwrite(str(file), rule(cv2.imread(str(file), 0)).astype(np.uint8))
        return str(root)

    return copy


@pytest.mark.parametrize(
    ("rule", "classes", "expected"),
    [
        pytest.param(
            lambda labels: labels == 3,
            2,
            ["has class 1; every labelled pixel is class 0", "ignore_background=false"],
            id="binary masks",
        ),
        pytest.param(
            lambda labels: labels * 0, 12, ["has a labelled pixel"], id="no labelled pixel"
        ),
        pytest.param(
            lambda labels: np.where(labels == 7, 8, labels),
            12,
            [r"has (class|the classes).* 6\b"],
            id="one class missing",
        ),
    ],
)
@pytest.mark.parametrize("section", ["train_dataset", "eval_dataset"])
def test_run_warns_about_classes_without_labels(
    tiny: dict[str, Any],
    changed: Callable[[str, Rule], str],
    caplog: pytest.LogCaptureFixture,
    rule: Rule,
    classes: int,
    expected: list[str],
    section: str,
) -> None:
    for name in ("train_dataset", "eval_dataset") if classes == 2 else (section,):
        tiny[name]["path"] = changed(name, rule)
    tiny["model"]["num_classes"] = classes
    main({**tiny, "max_duration": "2ep", "eval_interval": "1ep"})
    (line,) = (line for line in warnings(caplog) if line.startswith(section))
    patterns = (
        expected[:1] if section == "train_dataset" else expected
    )  # crops of the training set are padded with ignored pixels
    assert all(re.search(pattern, line) for pattern in patterns)


def test_run_does_not_warn_if_every_class_has_labels(
    tiny: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tiny["eval_dataset"]["final_size"] = 48
    for name in ("train_dataset", "eval_dataset"):
        tiny[name]["path"] = tiny["train_dataset"]["path"]
    main({**tiny, "max_duration": "1ep"})
    assert not [line for line in warnings(caplog) if line.startswith("train_dataset")]


def test_scores_are_null_in_json_if_no_pixel_is_labelled(
    tiny: dict[str, Any],
    changed: Callable[[str, Rule], str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main({**tiny, "max_duration": "1ba", "save_folder": str(tmp_path / "run")}).close()
    empty, file = changed("empty", lambda labels: labels * 0), tmp_path / "scores.json"
    for protocol in ("square", "paper"):
        options = ["--path", empty, "--protocol", protocol, "--json", str(file)]
        assert evaluate.main([str(tmp_path / "run"), *options]) == 0
        text = file.read_text()
        assert "NaN" not in text
        scores = json.loads(text)
        assert [scores[name] for name in ("mIoU", "mean_accuracy", "pixel_accuracy")] == [None] * 3
        assert "mIoU -   mean accuracy -   pixel accuracy -" in capsys.readouterr().out
    assert f"{empty}: no validation mask has a labelled pixel" in caplog.text


def test_evaluation_without_checkpoint_is_rejected(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    tiny |= {"save_folder": str(tmp_path / "run")}
    file.write_text(json.dumps(tiny))  # JSON is also YAML
    assert run([str(file), "is_train=false"]) == 2
    error = capsys.readouterr().err
    assert error == "error: is_train=false: an evaluation needs a checkpoint; set load_path\n"
    assert run([str(file), "is_train=false", "autoresume=true"]) == 2
    assert "contains no checkpoint to evaluate; set load_path" in capsys.readouterr().err
