"""Tests of training/precision.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import main
from errors import ConfigError
from tests.support.build_tools import machine  # noqa: F401
from training.config import resolve
from training.precision import check_build_tools, compiles


@pytest.mark.parametrize(
    ("setting", "gpu", "compiled", "line"),
    [
        pytest.param(
            "auto",
            True,
            False,
            "compile: auto: this run is not compiled, and computes its loss",
            id="auto",
        ),
        pytest.param(
            False, True, False, "compile: false: this run computes its loss in PyTorch", id="false"
        ),
        pytest.param("auto", False, False, None, id="auto on a CPU"),
        pytest.param(False, False, False, None, id="false on a CPU"),
    ],
)
def test_run_without_build_tools_continues_uncompiled(
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny: dict[str, Any],
    setting: bool | str,
    gpu: bool,
    compiled: bool,
    line: str | None,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    config = resolve(tiny | {"compile": setting})
    assert compiles(config) is compiled
    message = check_build_tools(config)
    assert message is None if line is None else message and message.startswith(line)
    assert "\n" not in (message or "")


@pytest.mark.parametrize("gpu", [True, False])
def test_compile_true_without_build_tools_is_rejected(
    machine: Path, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, Any], gpu: bool
) -> None:
    """The check runs before the trainer builds anything."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("training.precision.check_kernels", lambda: None)
    with pytest.raises(
        ConfigError,
        match=r"^compile: compile=true works only with a C.* compiler .*Python's headers",
    ):
        main.build_trainer(resolve(tiny | {"compile": True}))
