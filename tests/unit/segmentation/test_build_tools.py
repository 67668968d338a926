"""Tests of segmentation/build_tools.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from segmentation import losses
from segmentation.build_tools import missing_build_tools
from tests.support.build_tools import machine  # noqa: F401


def provide(machine: Path, *tools: str) -> None:
    for tool in tools:
        path = machine / ("include/Python.h" if tool == "Python.h" else tool)
        path.parent.mkdir(exist_ok=True)
        path.touch(0o755)


@pytest.mark.parametrize(
    ("tools", "gpu", "missing"),
    [
        pytest.param(["gcc", "Python.h"], True, None, id="gcc on a GPU"),
        pytest.param(["clang", "Python.h"], True, None, id="clang on a GPU"),
        pytest.param(["g++", "Python.h"], False, None, id="g++ on a CPU"),
        pytest.param(["gcc", "Python.h"], False, r"a C\+\+ .*install g\+\+", id="no g++"),
        pytest.param(["Python.h"], True, "a C compiler .*install gcc", id="no compiler"),
        pytest.param(["gcc"], True, "^Python's headers .*install python3-dev", id="no headers"),
        pytest.param([], True, "C compiler .* and Python's .*gcc python3-dev", id="no tools"),
        # Triton looks only for gcc and clang.
        pytest.param(["cc", "Python.h"], True, "a C compiler", id="only the compiler cc"),
    ],
)
def test_message_names_the_missing_build_tools(
    machine: Path, tools: list[str], gpu: bool, missing: str | None
) -> None:
    provide(machine, *tools)
    message = missing_build_tools(gpu)
    if missing is None:
        assert message is None
    else:
        assert message and re.search(missing, message)


@pytest.mark.parametrize(
    ("variable", "fits"), [("my-cc -O1", True), ("/no/such/compiler", False), ("gcc", False)]
)
def test_compiler_named_in_the_cc_variable_is_used_if_it_exists(
    machine: Path, monkeypatch: pytest.MonkeyPatch, variable: str, fits: bool
) -> None:
    provide(machine, "my-cc", "clang", "Python.h")
    monkeypatch.setenv("CC", variable)
    assert (missing_build_tools(gpu=True) is None) == fits


def test_loss_without_build_tools_does_not_use_triton(machine: Path) -> None:
    class OnGPU:
        is_cuda, dtype = True, torch.float32

    logits: Any = OnGPU()
    assert losses._implementation(logits) == (losses.forward_sums, losses.backward)
    provide(machine, "gcc", "Python.h")
    missing_build_tools.cache_clear()
    pytest.importorskip("triton")
    assert losses._implementation(logits) != (losses.forward_sums, losses.backward)
