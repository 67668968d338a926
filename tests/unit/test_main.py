"""Tests of main.py."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("error", "status", "output", "errors"),
    [
        pytest.param(
            Stopped("stopped after batch 3"), 75, "stopped after batch 3\n", "", id="stop"
        ),
        pytest.param(DataError("a.png: empty"), 2, "", "error: a.png: empty\n", id="bad input"),
        pytest.param(Lost("rank 1 ended"), 75, "", "error: rank 1 ended\n", id="lost process"),
    ],
)
def test_error_during_a_run_gives_one_line_and_its_status(
    tiny: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    status: int,
    output: str,
    errors: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    config = tmp_path / "run.yaml"
    OmegaConf.save(tiny, config)
    monkeypatch.setattr(main_module, "build_trainer", fail)
    assert run([str(config)]) == status
    assert capsys.readouterr() == (output, errors)


def test_unknown_error_during_a_run_keeps_its_traceback(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    config = tmp_path / "run.yaml"
    OmegaConf.save(tiny, config)
    monkeypatch.setattr(main_module, "build_trainer", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run([str(config)])


def test_run_whose_processes_do_not_connect_ends_with_one_line(
    tiny: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise Lost("the 2 processes of the run did not connect")

    config = tmp_path / "run.yaml"
    OmegaConf.save(tiny, config)
    monkeypatch.setattr(main_module, "join_processes", fail)
    assert run([str(config)]) == 75
    assert capsys.readouterr().err == "error: the 2 processes of the run did not connect\n"
