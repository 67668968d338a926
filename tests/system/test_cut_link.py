"""A run on two nodes of which one disappears; benchmarks/cut_link.py covers more failures."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cut_link
from benchmarks.cut_link import Nodes, made_config, recorder, run, samples
from main import main

pytestmark = pytest.mark.usefixtures("small_network")


QUICK = {"INTERVAL": 1, "ATTEMPTS": 2}  # a node counts as lost after 3 s


@pytest.fixture(scope="module")
def namespaces() -> Iterator[tuple[str, dict[str, Any]]]:
    """Return a folder and a config; skip if this machine does not allow network namespaces."""
    try:
        with Nodes():
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    with made_config() as (folder, config):
        config["mild"]["max_duration"] = "12ba"
        yield folder, config


def test_run_continues_on_one_node_after_the_other_disappears(
    namespaces: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = namespaces
    monkeypatch.setattr(cut_link, "HEARTBEAT", 2)
    outcome = run(f"{folder}/alone", None, config, alone=True, **QUICK)
    assert outcome.statuses[0] == 0, outcome.outputs
    assert outcome.back is not None and outcome.back < 90
    (line,) = [text for text in outcome.outputs[0].splitlines() if text.startswith("error: ")]
    assert line.startswith("error: process 1 at 10.77.0.2 has not responded for 3 s")
    # Each step trains on the same augmented images as a run on one rank.
    path = Path(folder, "one")
    path.mkdir()
    main(config, callbacks=[recorder(path / "samples")])
    assert outcome.samples == samples(str(path))
    assert [len(images) for images in outcome.samples.values()] == [4] * 12
