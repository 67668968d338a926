"""benchmarks/gpu_check.py on a CPU, at sizes too small for meaningful measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, harness, loss, numerics, train_step

SMALL = "--check-size 32 --check-batch 4 --check-steps 2 --resumed-steps 2 --size 32 --batch 2"
SMALL += " --timed-steps 2"
CORRECTNESS = 8  # rows of the correctness table
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="takes a CPU for the GPU")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, small_network: None) -> Iterator[None]:
    """Use 15 classes, no loader processes, and a wide tolerance for the loss after few steps."""
    monkeypatch.setattr(numerics, "CLASSES", 15)
    monkeypatch.setattr(gpu_check, "CURVE", 0.5)
    arguments = train_step.arguments
    monkeypatch.setattr(train_step, "arguments", lambda argv: arguments([*argv, "--workers", "0"]))
    yield
    harness.release()


def test_gpu_check_passes_if_all_results_are_correct(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    assert gpu_check.main([*SMALL.split(), "--json", str(path)]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("No GPU is used: a stand-in at small sizes on ")
    assert last.startswith("verdict: passed")
    result = json.loads(path.read_text())
    rows = result["correctness"]["rows"]
    assert len(rows) == CORRECTNESS and result["verdict"].startswith("passed")
    names = [row[0].partition(",")[0] for row in rows]
    assert names[4:7] == ["2 steps in amp_bf16", "2 steps", "evaluation"]
    assert {row[-1] for row in rows} <= {"ok", "left out"}
    assert [row[0] for row in result["speed"]["rows"]] == ["baseline", "medium"]
    for _, batch, rate, *_ in result["speed"]["rows"]:
        assert batch == "2" and float(rate) > 0


def test_gpu_check_fails_on_wrong_loss_and_on_exception(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = loss.Case._ours
    monkeypatch.setattr(loss.Case, "_ours", lambda case: right(case) * 1.0001)

    def raise_error(*_: object) -> None:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(numerics, "train", raise_error)
    monkeypatch.setattr(gpu_check, "steps", lambda *_: iter([("baseline", raise_error)]))
    assert gpu_check.main(SMALL.split()) == 1
    *rows, _, last = capsys.readouterr().out.splitlines()
    assert sum(row.startswith("| loss ") and row.endswith("| FAILED |") for row in rows) == 4
    assert rows[-1] == "| baseline | no kernel image is available | | | | | FAILED |"
    assert last.startswith("verdict: failed: loss in float32, beside fp64; ")
    assert "2 steps, resumed after 1; " in last and last.endswith("; baseline")


def test_gpu_check_halves_batch_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []

    class Contender:
        def __init__(self, args: object, side: str, recipe: str) -> None:
            batches.append(args.batch)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train_step, "Contender", Contender)
    args = train_step.arguments(["--batch", "8"])
    with pytest.raises(torch.OutOfMemoryError):
        gpu_check.step_row(args, "none", "H100")
    assert batches == [8, 4, 2]


def test_gpu_check_lists_checks_skipped_by_time_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "steps", lambda *_: iter(()))
    assert gpu_check.main([*SMALL.split(), "--minutes", "0"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("verdict: passed (left out: loss in float32, beside fp64; ")
