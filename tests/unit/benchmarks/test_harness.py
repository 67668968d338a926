"""Tests of benchmarks/harness.py."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import pytest
import torch

from benchmarks import harness


def test_table_is_printed_as_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    table = harness.Table("name", "value")
    table.add("one", 1)
    assert capsys.readouterr().out == "| name | value |\n|---|---|\n| one | 1 |\n"
    result = table.result()
    assert result["rows"] == [("one", 1)] and result["machine"]["torch"] == torch.__version__


def test_result_is_written_as_json(tmp_path: Path) -> None:
    parser = harness.make_parser("A benchmark.\n\nDetails.")
    assert parser.description == "A benchmark."
    path = tmp_path / "result.json"
    harness.write_json(parser.parse_args([]), {"value": 1})
    harness.write_json(parser.parse_args(["--json", str(path)]), {"value": 1})
    assert json.loads(path.read_text()) == {"value": 1}


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("False", False), ("auto", "auto")])
def test_true_false_and_auto_options_are_parsed(text: str, expected: bool | str) -> None:
    assert harness.parse_switch(text) is expected or harness.parse_switch(text) == expected


@pytest.mark.parametrize(("warm_up", "expected"), [(False, [1, 2]), (True, [2, 3])])
def test_benchmark_alternates_between_the_compared_variants(
    warm_up: bool, expected: list[int]
) -> None:
    calls: list[str] = []

    def measure(name: str) -> float:
        calls.append(name)
        return calls.count(name)

    sides = {name: lambda name=name: measure(name) for name in "ab"}
    assert harness.in_turn(sides, 2, warm_up) == {"a": expected, "b": expected}
    assert calls[:4] == ["a", "b", "a", "b"]


def test_call_is_timed_once_after_one_warm_up_call() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(torch.get_num_threads())

    assert 0 < harness.seconds_of(call, threads=1) < 1
    assert calls == [1, 1]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_of_a_block_is_measured() -> None:
    # PyTorch may reuse freed memory, so this test maps new memory.
    with harness.PeakMemory(on_gpu=False) as peak, mmap.mmap(-1, 50_000_000) as memory:
        memory.write(bytes(1) * 50_000_000)
    assert 45e6 < peak.bytes < 150e6
