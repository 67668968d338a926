"""Tests of main.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from errors import DataError
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
