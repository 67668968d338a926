"""Two nodes whose link is cut for good; benchmarks/cut_link.py has the rest of it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.cut_link import Nodes, made_config, run

pytestmark = [pytest.mark.trains, pytest.mark.processes]

QUICK = {"INTERVAL": 1, "ATTEMPTS": 2}  # a machine is lost after 3 s
LOST = ("error: process 1 at 10.77.0.2 ", "error: process 0 at 10.77.0.1 ")


@pytest.fixture(scope="module")
def made() -> Iterator[tuple[str, dict[str, Any]]]:
    """A folder and a config, where this machine lets network namespaces be made."""
    try:
        with Nodes():
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    with made_config() as (folder, config):
        config["mild"]["max_duration"] = "12ba"
        config["model"]["sync_bn"] = False  # which is of a node, and the undisturbed run has one
        yield folder, config


def test_a_run_ends_when_it_is_for_good(
    made: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = made
    monkeypatch.setenv("RUN_REJOIN", "2")
    outcome = run(f"{folder}/good", None, config, **QUICK)
    assert outcome.statuses == [75, 75], outcome.outputs
    assert outcome.back is None
    for lines, lost in zip(outcome.lines("error: "), LOST, strict=True):
        assert len(lines) == 1 and lines[0].startswith(lost)
    for lines in outcome.lines("run.sh: "):
        assert lines[-1].startswith("run.sh: the nodes are not together within 2 s: ")
