"""What compiling needs of a machine, and what a run does and says without it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from errors import ConfigError
from segmentation import losses
from segmentation.build_tools import missing_build_tools
from training.config import resolve
from training.precision import check_build_tools, compiles


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine without compilers and headers: a folder that is its whole PATH."""
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path / "include"))
    missing_build_tools.cache_clear()
    yield tmp_path
    missing_build_tools.cache_clear()


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
        pytest.param([], True, "C compiler .* and Python's .*gcc python3-dev", id="neither"),
        # Triton looks for gcc and clang alone.
        pytest.param(["cc", "Python.h"], True, "a C compiler", id="only cc"),
    ],
)
def test_missing_build_tools(
    machine: Path, tools: list[str], gpu: bool, missing: str | None
) -> None:
    provide(machine, *tools)
    found = missing_build_tools(gpu)
    if missing is None:
        assert found is None
    else:
        assert found and re.search(missing, found)


@pytest.mark.parametrize(
    ("variable", "fits"), [("my-cc -O1", True), ("/no/such/compiler", False), ("gcc", False)]
)
def test_the_compiler_that_a_variable_names(
    machine: Path, monkeypatch: pytest.MonkeyPatch, variable: str, fits: bool
) -> None:
    provide(machine, "my-cc", "clang", "Python.h")
    monkeypatch.setenv("CC", variable)
    assert (missing_build_tools(gpu=True) is None) == fits


@pytest.mark.parametrize(
    ("setting", "gpu", "compiled", "line"),
    [
        pytest.param(
            "auto", True, False, "compile: auto runs uncompiled, and with its loss", id="auto"
        ),
        pytest.param(
            False, True, False, "compile: false runs with its loss in PyTorch", id="false"
        ),
        pytest.param("auto", False, False, None, id="auto on a CPU"),
        pytest.param(False, False, False, None, id="false on a CPU"),
    ],
)
def test_a_run_goes_on_without(
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
    said = check_build_tools(config)
    assert said is None if line is None else said and said.startswith(line)
    assert "\n" not in (said or "")


@pytest.mark.parametrize("gpu", [True, False])
def test_compile_true_is_refused(
    machine: Path, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, Any], gpu: bool
) -> None:
    """Before anything is built."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("training.precision.check_kernels", lambda: None)
    with pytest.raises(
        ConfigError, match=r"^compile: true needs a C.* compiler .*Python's headers"
    ):
        main.build_trainer(resolve(tiny | {"compile": True}))


def test_the_loss_does_without_triton(machine: Path) -> None:
    class OnGPU:
        is_cuda, dtype = True, torch.float32

    logits: Any = OnGPU()
    assert losses._implementation(logits) == (losses.forward_sums, losses.backward)
    provide(machine, "gcc", "Python.h")
    missing_build_tools.cache_clear()
    pytest.importorskip("triton")
    assert losses._implementation(logits) != (losses.forward_sums, losses.backward)
