"""benchmarks/numerics.py on a CPU passes correct code and reports deliberate errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import harness, loss, numerics
from training.schema import OptimizerConfig

SMALL = ["--steps", "3", "--resumed-steps", "4", "--size", "32", "--batch", "4"]


@pytest.fixture(autouse=True)
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use 15 instead of 150 classes."""
    monkeypatch.setattr(numerics, "CLASSES", 15)


def test_numerics_check_passes_if_all_results_agree(
    small_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert numerics.main(SMALL) == 0
    harness.release()
    tables = capsys.readouterr().out.split("\n\n")
    losses, precisions, resumed = (table.splitlines()[2:] for table in tables[:3])
    assert len(losses) == 12 and losses[0].startswith("| float32 | index | no |")
    again, mixed = (row.split(" | ") for row in precisions[1:])
    assert again[0] == "| fp32, again" and again[-2:] == ["0.0e+00", "0.0e+00 |"]
    assert mixed[0] == "| amp_bf16" and 0 < float(mixed[-2]) < 1
    assert resumed == ["| not compiled | 4, from 2 on again | the same | 0.0 |"]


def test_numerics_check_reports_wrong_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    right = loss.Case._ours
    wrong = torch.tensor(1.0 + 1e-4)
    monkeypatch.setattr(loss.Case, "_ours", lambda case: right(case) * wrong)
    assert not any(holds for _, holds in numerics.loss_rows(32))


def test_numerics_check_reports_resumed_run_that_differs(
    small_network: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = numerics.train

    def other_rate(config: dict[str, Any], **changes: Any) -> list[float]:
        other = {"optimizer": OptimizerConfig(lr=0.5)} if "load_path" in changes else {}
        return train(config, **changes | other)

    monkeypatch.setattr(numerics, "train", other_rate)
    monkeypatch.setattr(numerics, "loss_rows", lambda size: ())
    monkeypatch.setattr(numerics, "precision_rows", lambda config, shown: ())
    assert numerics.main(SMALL) == 1
    harness.release()
    row = capsys.readouterr().out.splitlines()[-2]
    assert "| differ | " in row and row.endswith(" DIFFER |")


def test_numerics_check_compares_transforms_on_cpu_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate the GPU on the CPU, first with equal results and then with reordered ones."""
    shift = 0.0
    monkeypatch.setattr(
        torch.Tensor, "cuda", lambda t: torch.cat([t[1:], t[:1]]) if shift else t.clone()
    )
    assert list(numerics.transform_rows(32)) == [
        (["not compiled", "0.0e+00", "the same"], True),
        (["compiled", "0.0e+00", "the same"], True),
    ]
    shift = 1.0
    for cells, holds in numerics.transform_rows(32):
        assert not holds and cells[-1] == "differ"
