"""`save_best` keeps the best checkpoint across resumes; `stop_after` stops a run early."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

import checkpointing.best
from checkpointing.stores import batch_of
from errors import ConfigError
from main import main
from tests.support.best import Scores, files, record, saving, scores  # noqa: F401
from training.callbacks import summary

pytestmark = pytest.mark.usefixtures("small_network", "no_curves")


def test_save_best_keeps_checkpoint_of_best_evaluation(
    tiny: dict[str, Any], tmp_path: Path, scores: Scores
) -> None:
    scores([5, 10, 30, 20, 25])
    trainer = main(saving(tiny, tmp_path, eval_first=True))
    assert [*files(tmp_path).values()] == [2, 2, 4, 4]
    assert files(tmp_path)["best-rank0.pt"] == 2
    best = {"metric": "MIoU", "value": 30.0, "batch": 2, "unscored": 0}
    for name in ("best-rank0.pt", "latest-rank0.pt"):
        assert best.items() <= record(tmp_path / name)["best"].items()
    line = f"best MIoU: 30.00 after batch 2, {tmp_path}/ep0-ba2-rank0.pt"
    assert line in summary(trainer).splitlines()
    # Restarting the finished run evaluates it again, with a lower score.
    scores([25])
    main(saving(tiny, tmp_path))
    assert files(tmp_path)["best-rank0.pt"] == 2
    # The extended run reaches a better score. Then a new run overwrites the save folder.
    scores([29, 31])
    main(saving(tiny, tmp_path, max_duration="6ba"))
    assert [*files(tmp_path).values()] == [6, 6, 6]
    scores([1, 0])
    keys = {"autoresume": False, "save_overwrite": True, "max_duration": "2ba"}
    main(saving(tiny, tmp_path, **keys))
    assert (files(tmp_path)["best-rank0.pt"], files(tmp_path)["latest-rank0.pt"]) == (1, 2)


def test_evaluation_after_a_save_can_make_the_checkpoint_best(
    tiny: dict[str, Any], tmp_path: Path, scores: Scores
) -> None:
    # Evaluate only at the end of the run, or every epoch while checkpoints are saved every batch.
    for folder, keys in {
        "end": {"eval_interval": "3ba"},
        "epochs": {"eval_interval": "1ep", "save_interval": "1ba"},
    }.items():
        scores([10, 20])
        main(saving(tiny, tmp_path / folder, **keys))
        best = tmp_path / folder / "best-rank0.pt"
        state = record(best)
        assert batch_of(best.resolve().name) == state["best"]["batch"] == 4
        assert state["best_name"] == best.resolve().name
        assert not state["evaluation_due"]


def test_stop_after_stops_run_without_improvement(
    tiny: dict[str, Any],
    tmp_path: Path,
    scores: Scores,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores([10, 20, 20, 19, 18])
    keys: dict[str, Any] = {"max_duration": "3ep", "stop_after": "2ba", "save_best": False}
    trainer = main(saving(tiny, tmp_path, **keys))
    assert trainer.state.timestamp.batch == 4
    assert "ended early: MIoU did not improve for 2ba" in summary(trainer)
    assert files(tmp_path) == {"ep0-ba4-rank0.pt": 4, "latest-rank0.pt": 4}
    assert record(tmp_path / "latest-rank0.pt")["ended"] == "2ba"
    # The run counts as complete until a longer stop_after is set.
    scores([19])
    trainer = main(saving(tiny, tmp_path, **keys))
    assert trainer.state.timestamp.batch == 4
    assert "nothing is left to train: the run did not improve for stop_after=2ba" in caplog.text
    scores([19, 21, 20, 19, 18, 17])
    trainer = main(saving(tiny, tmp_path, **keys | {"stop_after": "1ep"}))
    assert (
        trainer.state.timestamp.batch == 10
    )  # one epoch of four batches after the best score in batch 6


def test_early_stop_at_epoch_end_keeps_one_checkpoint(
    tiny: dict[str, Any], tmp_path: Path, scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    listdir = os.listdir  # list names in sorted order, as an object store does
    monkeypatch.setattr(os, "listdir", lambda folder: sorted(listdir(folder)))
    scores([20, 10])
    keys = {"max_duration": "3ep", "eval_interval": "1ep", "save_interval": "4ba"}
    main(saving(tiny, tmp_path, **keys, stop_after="1ep", save_best=False))
    assert files(tmp_path) == {"ep2-ba8-rank0.pt": 8, "latest-rank0.pt": 8}
    assert record(tmp_path / "latest-rank0.pt")["ended"] == "1ep"


def test_summary_omits_best_score_whose_checkpoint_is_not_kept(
    tiny: dict[str, Any], tmp_path: Path, scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores([20])
    main(saving(tiny, tmp_path, max_duration="1ba"))
    scores([30])  # save_best is off, so this higher score is not recorded
    trainer = main(saving(tiny, tmp_path, max_duration="2ba", save_best=False))
    assert files(tmp_path)["best-rank0.pt"] == 1
    assert "best MIoU" not in summary(trainer)
    scores([40])
    monkeypatch.setattr(checkpointing.best, "iou_per_class", lambda matrix: [math.nan] * 12)
    trainer = main(saving(tiny, tmp_path, max_duration="3ba", best_metric="IoU/class 3"))
    assert files(tmp_path)["best-rank0.pt"] == 1
    assert "best IoU" not in summary(trainer)


@pytest.mark.parametrize("metric", ["IoU/sky", "mIoU"])
def test_error_names_unknown_best_metric(tiny: dict[str, Any], tmp_path: Path, metric: str) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"class{number}" for number in range(11)) + "\npole\n")
    tiny |= {"class_names": str(names), "best_metric": metric}
    with pytest.raises(
        ConfigError, match=f"best_metric: no metric is named {metric}; did you mean "
    ):
        main(saving(tiny, tmp_path / "saved"))


@pytest.mark.parametrize(
    ("values", "last"),
    [
        pytest.param([math.nan] * 8, 8, id="no score"),
        pytest.param([math.nan, math.nan, 10, 9, 8], 5, id="late first score"),
        pytest.param(
            [10, math.nan, math.nan, 9, math.nan, 8], 6, id="missing scores between scores"
        ),
    ],
)
def test_stop_after_ignores_evaluations_with_nan_scores(
    tiny: dict[str, Any], tmp_path: Path, scores: Scores, values: list[float], last: int
) -> None:
    scores(values)
    keys: dict[str, Any] = {"max_duration": "2ep", "stop_after": "2ba"}
    trainer = main(saving(tiny, tmp_path, **keys))
    assert trainer.state.timestamp.batch == last
    if all(math.isnan(value) for value in values):
        assert "mIoU: none, because no validation pixel has a class" in summary(trainer)
        assert "mIoU</dt><dd>-<" in (tmp_path / "report.html").read_text()
        assert not (tmp_path / "best-rank0.pt").exists()
