"""Tests of main.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import main as main_module
from errors import DataError, Lost, Stopped
from main import main, run


def test_fp16_on_a_cpu_is_rejected(tiny: dict[str, Any]) -> None:
    if torch.cuda.is_available():
        pytest.skip("asks what happens on a CPU")
    with pytest.raises(ValueError, match="amp_fp16 needs a GPU"):
        main({**tiny, "precision": "amp_fp16"})


def test_too_few_classes_are_reported_before_training(tiny: dict[str, Any]) -> None:
    tiny["model"]["num_classes"] = 5
    with pytest.raises(DataError, match=r"labels .*; set model.num_classes"):
        main(tiny)


def test_too_few_images_for_a_batch_are_reported_before_training(tiny: dict[str, Any]) -> None:
    tiny["train_dataset"]["batch_size"] = 32
    with pytest.raises(DataError, match=r"16 .*do not fill one batch"):
        main(tiny)


def test_help_is_printed_and_missing_arguments_are_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["--help"]) == 0
    assert "train_dataset.batch_size" in capsys.readouterr().out
    assert run([]) == 2


@pytest.fixture
def run_failing(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Exception], int]:
    """Return a function that runs a command line in which a function of main.py fails."""

    def run_with(name: str, error: Exception) -> int:
        def fail(*_: object, **__: object) -> None:
            raise error

        config = tmp_path / "run.yaml"
        OmegaConf.save(tiny, config)
        monkeypatch.setattr(main_module, name, fail)
        return run([str(config)])

    return run_with


@pytest.mark.parametrize(
    ("name", "error", "status", "output", "errors"),
    [
        pytest.param(
            "build_trainer",
            Stopped("stopped after batch 3"),
            75,
            "stopped after batch 3\n",
            "",
            id="stop",
        ),
        pytest.param(
            "build_trainer",
            DataError("a.png: empty"),
            2,
            "",
            "error: a.png: empty\n",
            id="bad input",
        ),
        pytest.param(
            "build_trainer",
            Lost("rank 1 ended"),
            75,
            "",
            "error: rank 1 ended\n",
            id="lost process",
        ),
        pytest.param(
            "join_processes",
            Lost("the 2 processes did not connect"),
            75,
            "",
            "error: the 2 processes did not connect\n",
            id="no connection",
        ),
    ],
)
def test_error_of_a_run_gives_one_line_and_its_status(
    run_failing: Callable[[str, Exception], int],
    capsys: pytest.CaptureFixture[str],
    name: str,
    error: Exception,
    status: int,
    output: str,
    errors: str,
) -> None:
    assert run_failing(name, error) == status
    assert capsys.readouterr() == (output, errors)


def test_unknown_error_of_a_run_keeps_its_traceback(
    run_failing: Callable[[str, Exception], int],
) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        run_failing("build_trainer", RuntimeError("a bug"))
