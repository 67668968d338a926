"""A run says which classes its masks never show; an evaluation without a label is null in JSON."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import evaluate
from main import main, run
from segmentation.classes import load_classes
from segmentation.losses import MixedTarget
from training.label_check import LabelCheck

pytestmark = pytest.mark.usefixtures("small_network")

Rule = Callable[[np.ndarray], np.ndarray]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "training.label_check"]


@pytest.fixture
def changed(synthetic: str, tmp_path: Path) -> Callable[[str, Rule], str]:
    """Copy the data set with the labels of every mask changed."""

    def copy(name: str, rule: Rule) -> str:
        root = Path(shutil.copytree(synthetic, tmp_path / name))
        for file in root.rglob("*.png"):
            cv2.imwrite(str(file), rule(cv2.imread(str(file), 0)).astype(np.uint8))
        return str(root)

    return copy


@pytest.mark.trains
@pytest.mark.parametrize(
    ("rule", "classes", "said"),
    [
        pytest.param(
            lambda labels: labels == 3,
            2,
            ["has class 1; every labelled pixel is class 0", "ignore_background=false"],
            id="masks of 0 and 1",
        ),
        pytest.param(lambda labels: labels * 0, 12, ["has a labelled pixel"], id="no label"),
        pytest.param(
            lambda labels: np.where(labels == 7, 8, labels),
            12,
            [r"has (class|the classes).* 6\b"],
            id="one missing",
        ),
    ],
)
@pytest.mark.parametrize("section", ["train_dataset", "eval_dataset"])
def test_a_run_says_which_labels_teach_nothing(
    tiny: dict[str, Any],
    changed: Callable[[str, Rule], str],
    caplog: pytest.LogCaptureFixture,
    rule: Rule,
    classes: int,
    said: list[str],
    section: str,
) -> None:
    for name in ("train_dataset", "eval_dataset") if classes == 2 else (section,):
        tiny[name]["path"] = changed(name, rule)
    tiny["model"]["num_classes"] = classes
    main({**tiny, "max_duration": "2ep", "eval_interval": "1ep"})
    (line,) = (line for line in warnings(caplog) if line.startswith(section))
    patterns = said[:1] if section == "train_dataset" else said  # crops are padded, masks are not
    assert all(re.search(pattern, line) for pattern in patterns)


@pytest.mark.trains
def test_a_run_with_every_class_says_nothing(
    tiny: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tiny["eval_dataset"]["final_size"] = 48
    for name in ("train_dataset", "eval_dataset"):
        tiny[name]["path"] = tiny["train_dataset"]["path"]
    main({**tiny, "max_duration": "1ep"})
    assert not [line for line in warnings(caplog) if line.startswith("train_dataset")]


def state(target: Any) -> Any:
    return SimpleNamespace(batch=(None, target))


def check(classes: int = 4) -> LabelCheck:
    return LabelCheck(load_classes(["sky", "road", "tree", "car"][:classes], classes), True)


def test_a_class_may_come_until_the_epoch_ends(caplog: pytest.LogCaptureFixture) -> None:
    logger: Any = None
    callback, epoch = check(), state(torch.tensor([[[0, 1, -1]]]))
    callback.epoch_start(epoch, logger)
    callback.before_forward(epoch, logger)
    callback.eval_end(epoch, logger)  # in the middle of the epoch
    assert not warnings(caplog)
    # MixUp's target has the classes of two images; every index beyond the classes is ignored.
    target = torch.tensor([[[2, 2, 7]]])
    callback.before_forward(state(MixedTarget(target, target, 0.3)), logger)
    callback.epoch_end(epoch, logger)
    assert warnings(caplog) == ["train_dataset: no training crop of the first epoch has class car"]
    callback.before_forward(epoch, logger)
    callback.fit_end(epoch, logger)
    assert len(warnings(caplog)) == 1


def test_part_of_an_epoch_after_a_resume_is_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    logger: Any = None
    callback, part = check(), state(torch.tensor([[[0, 1]]]))
    callback.before_forward(part, logger)
    callback.epoch_end(part, logger)
    assert not warnings(caplog)
    callback.epoch_start(part, logger)
    callback.before_forward(state(torch.tensor([[[2, 3]]])), logger)
    callback.epoch_end(part, logger)
    assert not warnings(caplog)


def test_crops_of_one_class_are_reported_at_the_first_evaluation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback, batch = check(2), state(torch.tensor([[[1, 1, -1]]]))
    callback.before_forward(batch, None)  # pyright: ignore[reportArgumentType]
    callback.eval_end(batch, None)  # pyright: ignore[reportArgumentType]
    line = (
        "train_dataset: no training crop so far has class sky; every labelled pixel is class road"
    )
    assert warnings(caplog) == [line]


def test_validation_says_how_many_pixels_have_no_class(caplog: pytest.LogCaptureFixture) -> None:
    callback, batch = check(2), state(torch.tensor([[[0, 1, -1, -1, -1]]]))
    callback.eval_before_forward(batch, None)  # pyright: ignore[reportArgumentType]
    callback.eval_end(batch, None)  # pyright: ignore[reportArgumentType]
    hint = "ignore_background=false makes label 0 a class"
    assert warnings(caplog) == [f"eval_dataset: 60% of the pixels have no class; {hint}"]


@pytest.mark.trains
def test_a_score_without_any_label_is_null(
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


@pytest.mark.trains
def test_an_evaluation_without_a_checkpoint_is_refused(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    tiny |= {"save_folder": str(tmp_path / "run")}
    file.write_text(json.dumps(tiny))  # which is YAML
    assert run([str(file), "is_train=false"]) == 2
    error = capsys.readouterr().err
    assert error == "error: is_train=false evaluates a checkpoint; name it with load_path\n"
    assert run([str(file), "is_train=false", "autoresume=true"]) == 2
    assert "holds no checkpoint to evaluate; give load_path" in capsys.readouterr().err
