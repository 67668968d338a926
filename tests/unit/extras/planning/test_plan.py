"""Tests of extras/planning/plan.py."""

from __future__ import annotations

from pathlib import Path

import pytest

import main as program
from tests.support.plan import config  # noqa: F401

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--gpu", "H100", "--gpus", "3"], "4 does not divide evenly among 3 GPUs"),
        (["--gpus", "2"], "apply only to estimates; add --gpu"),
        (["--fast"], "unknown option --fast"),
        (["train_dataset.path=nowhere", "--gpu", "H100"], "path: cannot find the folder nowhere"),
        (["--gpu", "H100", "--images", "3", "1"], "3 images do not fill one batch of 4"),
        (["activation_memory_budget=1.5"], "is out of range; use 0 to 1"),
        (["activation_memory_budget=0.5", "compile=false"], "has no effect without compile"),
    ],
)
def test_invalid_plan_command_gives_a_one_line_error(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert program.run([str(config), "--plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
