"""Tests of training/launcher.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import main as main_module
from command_lines import name_node
from errors import ConfigError, Lost, UnevenBatch
from training import launcher


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets the environment of one process in a torchrun attempt."""

    def change(number: int, local_rank: int, rank: int | None = None) -> None:
        folder = tmp_path / f"attempt_{number}" / str(local_rank)
        settings = {"RESTART_COUNT": number, "RUN_ID": "x", "ERROR_FILE": folder / "error.json"}
        for name, value in settings.items():
            monkeypatch.setenv(f"TORCHELASTIC_{name}", str(value))
        monkeypatch.setenv("RANK", str(local_rank if rank is None else rank))

    return change


def test_node_rank_is_set_from_the_group_rank() -> None:
    for before, name in (({}, None), ({"GROUP_RANK": "1"}, "1"), ({"NODE_RANK": "2"}, "2")):
        environment = dict(before)
        name_node(environment)
        assert environment.get("NODE_RANK") == name


def test_config_error_is_printed_once_per_node(
    attempt: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        for local_rank in (1, 0):  # the first process to end prints the error, whatever its rank
            attempt(number, local_rank)
            assert main_module.run(["yamls/deeplabv3.yaml", "no_such_key=1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: unknown key no_such_key")


@pytest.mark.parametrize(
    ("number", "errors", "printed", "is_final"),
    [
        pytest.param(
            0, [ConfigError("disk 0"), ConfigError("disk 1")] * 2, 2, True, id="two config errors"
        ),
        # The config worked before, so a store may be unavailable.
        pytest.param(1, [ConfigError("cannot read")] * 2, 1, False, id="later attempt"),
        pytest.param(0, [Lost("process 1 ended")], 1, False, id="lost process"),
    ],
)
def test_config_error_stops_retries_only_on_the_first_attempt(
    attempt: Any,
    capsys: pytest.CaptureFixture[str],
    number: int,
    errors: list[ConfigError | Lost],
    printed: int,
    is_final: bool,
) -> None:
    for local_rank, error in enumerate(errors):
        attempt(number, local_rank)
        main_module._refuse(error)
    assert len(capsys.readouterr().err.splitlines()) == printed
    assert launcher.was_refused() is is_final


def test_restarted_run_with_an_uneven_batch_waits_for_another_node(
    attempt: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[str] = []
    monkeypatch.setattr(signal, "pause", lambda: waited.append(os.environ["RANK"]))
    error = UnevenBatch("train_dataset.batch_size: 6 images do not divide among 4 processes")
    for number, rank in ((0, 0), (1, 0), (1, 1), (2, 0)):
        attempt(number, 0, rank)
        launcher.wait_for_nodes(error)
        launcher.wait_for_nodes(ConfigError("unknown key"))
    assert waited == ["0", "1", "0"]  # the first attempt does not wait
    assert capsys.readouterr().out == f"waiting for another node: {error}\n" * 2
