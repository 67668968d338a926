"""Tests of training/precision.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import main
from errors import ConfigError
from tests.support.build_tools import machine  # noqa: F401
from training import precision
from training.config import resolve
from training.precision import check_build_tools, compiles, stop_broadcasts


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


@pytest.mark.parametrize(
    ("ranks", "ranks_of_node", "sync_bn", "broadcasts"),
    [
        pytest.param(2, 2, True, False, id="one node"),
        pytest.param(4, 2, True, True, id="two nodes"),
        pytest.param(2, 2, False, True, id="statistics differ"),
        pytest.param(1, 1, True, True, id="one process"),
    ],
)
def test_broadcasts_stop_only_if_all_ranks_have_equal_statistics(
    tiny: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    ranks_of_node: int,
    sync_bn: bool,
    broadcasts: bool,
) -> None:
    tiny["model"]["sync_bn"] = sync_bn
    monkeypatch.setattr(precision.dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(precision.dist, "get_local_world_size", lambda: ranks_of_node)
    state = SimpleNamespace(model=SimpleNamespace(broadcast_buffers=True))
    stop_broadcasts(resolve(tiny), state)
    assert state.model.broadcast_buffers is broadcasts


def test_cpu_without_cpuinfo_is_assumed_to_lack_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(precision, "open", missing, raising=False)
    assert not precision._cpu_has_bf16()
