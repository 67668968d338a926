"""The best checkpoint stays, through kills and resumes, and a run ends when none is better."""

from __future__ import annotations

import math
import os
import signal
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Timestamp

import checkpointing.best
from benchmarks.forked import Death, run
from benchmarks.kill_resume import largest_difference, make_config, make_data
from benchmarks.s3_server import s3_server
from checkpointing.best import Best
from checkpointing.remote_store import RemoteFolder
from checkpointing.stores import batch_of
from errors import ConfigError
from main import main
from segmentation.classes import load_classes
from segmentation.metrics import MIoU
from training.callbacks import summary

pytestmark = [pytest.mark.trains, pytest.mark.usefixtures("small_network")]

Scores = Callable[[Iterable[float]], None]


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Scores:
    """Have the evaluations of runs come to given mIoUs, one after the other."""

    def give(values: Iterable[float]) -> None:
        left = iter(values)

        def compute(metric: MIoU) -> torch.Tensor:  # whose result torchmetrics keeps
            metric.total_matrix = metric.matrix.clone()
            return torch.tensor(next(left))

        monkeypatch.setattr(MIoU, "compute", compute)

    return give


def files(folder: Path) -> dict[str, int]:
    """The batches of the checkpoints in a folder, by the names of files and pointers."""
    return {path.name: batch_of(path.resolve().name) for path in sorted(folder.glob("*.pt*"))}


def record(path: Path) -> dict[str, Any]:
    state = torch.load(path, weights_only=False)["state"]
    return state["callbacks"]["Checkpoints"]


def saving(tiny: dict[str, Any], folder: Path, **keys: Any) -> dict[str, Any]:
    tiny |= {"save_folder": str(folder), "save_interval": "100ep", "eval_interval": "1ba"}
    return {**tiny, "save_best": True, "autoresume": True, **keys}


def test_the_best_evaluations_checkpoint_stays(
    tiny: dict[str, Any], tmp_path: Path, scores: Scores
) -> None:
    scores([5, 10, 30, 20, 25])
    trainer = main(saving(tiny, tmp_path, eval_first=True))
    assert [*files(tmp_path).values()] == [2, 2, 4, 4]
    assert files(tmp_path)["best-rank0.pt"] == 2
    best = {"metric": "MIoU", "value": 30.0, "batch": 2}
    for name in ("best-rank0.pt", "latest-rank0.pt"):
        assert record(tmp_path / name)["best"] == best
    line = f"best MIoU: 30.00 after batch 2, {tmp_path}/ep0-ba2-rank0.pt"
    assert line in summary(trainer).splitlines()
    # The same command evaluates the complete run, which is no better.
    scores([25])
    main(saving(tiny, tmp_path))
    assert files(tmp_path)["best-rank0.pt"] == 2
    # It goes on, first with no better one, then with one; and another run begins anew.
    scores([29, 31])
    main(saving(tiny, tmp_path, max_duration="6ba"))
    assert [*files(tmp_path).values()] == [6, 6, 6]
    scores([1, 0])
    keys = {"autoresume": False, "save_overwrite": True, "max_duration": "2ba"}
    main(saving(tiny, tmp_path, **keys))
    assert (files(tmp_path)["best-rank0.pt"], files(tmp_path)["latest-rank0.pt"]) == (1, 2)


def test_an_evaluation_at_the_very_end_and_one_after_its_checkpoint(
    tiny: dict[str, Any], tmp_path: Path, scores: Scores
) -> None:
    # Evaluated when the run has ended, and by epochs where checkpoints go by batches.
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


def test_a_run_ends_when_it_gets_no_better(
    tiny: dict[str, Any],
    tmp_path: Path,
    scores: Scores,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores([10, 20, 20, 19, 18])
    keys: dict[str, Any] = {"max_duration": "3ep", "stop_after": "2ba", "save_best": False}
    trainer = main(saving(tiny, tmp_path, **keys))
    assert trainer.state.timestamp.batch == 4
    assert "ended early: MIoU was no better for 2ba" in summary(trainer)
    assert files(tmp_path) == {"ep0-ba4-rank0.pt": 4, "latest-rank0.pt": 4}
    assert record(tmp_path / "latest-rank0.pt")["ended"] == "2ba"
    # It is complete, unless more patience is asked for.
    scores([19])
    trainer = main(saving(tiny, tmp_path, **keys))
    assert trainer.state.timestamp.batch == 4
    assert "nothing is left to train: stop_after=2ba is reached" in caplog.text
    scores([19, 21, 20, 19, 18, 17])
    trainer = main(saving(tiny, tmp_path, **keys | {"stop_after": "1ep"}))
    assert trainer.state.timestamp.batch == 10  # an epoch has four


def test_an_end_at_an_epochs_end_of_which_there_was_a_checkpoint(
    tiny: dict[str, Any], tmp_path: Path, scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    listdir = os.listdir  # in the order of an object store
    monkeypatch.setattr(os, "listdir", lambda folder: sorted(listdir(folder)))
    scores([20, 10])
    keys = {"max_duration": "3ep", "eval_interval": "1ep", "save_interval": "4ba"}
    main(saving(tiny, tmp_path, **keys, stop_after="1ep", save_best=False))
    assert files(tmp_path) == {"ep2-ba8-rank0.pt": 8, "latest-rank0.pt": 8}
    assert record(tmp_path / "latest-rank0.pt")["ended"] == "1ep"


def test_a_best_that_is_not_the_kept_one_is_not_told_as_that(
    tiny: dict[str, Any], tmp_path: Path, scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores([20])
    main(saving(tiny, tmp_path, max_duration="1ba"))
    scores([30])  # no longer kept
    trainer = main(saving(tiny, tmp_path, max_duration="2ba", save_best=False))
    assert files(tmp_path)["best-rank0.pt"] == 1
    assert "best MIoU" not in summary(trainer)
    scores([40])
    monkeypatch.setattr(checkpointing.best, "iou_per_class", lambda matrix: [math.nan] * 12)
    trainer = main(saving(tiny, tmp_path, max_duration="3ba", best_metric="IoU/class 3"))
    assert files(tmp_path)["best-rank0.pt"] == 1
    assert "best IoU" not in summary(trainer)


@pytest.mark.parametrize("metric", ["IoU/sky", "mIoU"])
def test_a_metric_that_is_not_there_is_named(
    tiny: dict[str, Any], tmp_path: Path, metric: str
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"class{number}" for number in range(11)) + "\npole\n")
    tiny |= {"class_names": str(names), "best_metric": metric}
    with pytest.raises(ConfigError, match=f"best_metric: there is no {metric}; did you mean "):
        main(saving(tiny, tmp_path / "saved"))


def test_the_best_of_a_class(tmp_path: Path) -> None:
    best = Best("IoU/b", load_classes(["a", "b", "c"], 3), "2ep")
    best.batches_per_epoch = 10
    metric = MIoU(3)

    def evaluated(matrix: list[list[int]], batch: int) -> tuple[bool, bool]:
        metric.reset()
        metric.matrix += torch.tensor(matrix)
        state: Any = types.SimpleNamespace(
            eval_metrics={"eval": {"MIoU": metric}},
            dataloader_label="eval",
            timestamp=Timestamp(batch=batch),
        )
        return best.improved(state), best.is_long_ago(state)

    assert evaluated([[1, 0, 0], [0, 0, 0], [0, 0, 1]], 10) == (False, False)  # no b at all
    assert best.value is None
    assert evaluated([[5, 0, 0], [1, 1, 0], [0, 0, 5]], 10) == (True, False)
    assert best.value == 50
    assert evaluated([[9, 0, 0], [1, 1, 0], [0, 0, 9]], 20) == (False, False)
    assert evaluated([[0, 9, 0], [0, 9, 0], [0, 0, 0]], 30) == (False, True)
    other = Best("MIoU", [])
    other.load_state_dict(best.state_dict())
    assert other.value is None


@pytest.mark.parametrize(
    ("values", "last"),
    [
        pytest.param([math.nan] * 8, 8, id="never a score"),
        pytest.param([math.nan, math.nan, 10, 9, 8], 5, id="a late first score"),
        pytest.param([10, math.nan, math.nan, 9, math.nan, 8], 6, id="between scores"),
    ],
)
def test_an_evaluation_without_a_score_does_not_count(
    tiny: dict[str, Any], tmp_path: Path, scores: Scores, values: list[float], last: int
) -> None:
    scores(values)
    keys: dict[str, Any] = {"max_duration": "2ep", "stop_after": "2ba"}
    trainer = main(saving(tiny, tmp_path, **keys))
    assert trainer.state.timestamp.batch == last
    if all(math.isnan(value) for value in values):
        assert "mIoU: none: no validation pixel has a class" in summary(trainer)
        assert "mIoU</dt><dd>-<" in (tmp_path / "report.html").read_text()
        assert not (tmp_path / "best-rank0.pt").exists()


def test_patience_is_the_same_after_a_resume() -> None:
    def state(value: float, batch: int) -> Any:
        metric = MIoU(2)
        if not math.isnan(value):
            metric.matrix += torch.tensor([[int(value), 100 - int(value)], [0, 0]])
        return types.SimpleNamespace(
            eval_metrics={"eval": {"MIoU": metric}},
            dataloader_label="eval",
            timestamp=Timestamp(batch=batch),
        )

    best = Best("MIoU", [], "3ba")
    ended = []
    for batch, value in enumerate([50, math.nan, math.nan, 40, 30, 20], 1):
        best.improved(state(value, batch))
        ended.append(best.is_long_ago(state(value, batch)))
        resumed = Best("MIoU", [], "3ba")
        resumed.load_state_dict(best.state_dict())
        best = resumed
    assert ended == [False] * 5 + [True]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The config of a hot run that keeps its best, and the folder of one that nobody disturbed."""
    data = str(tmp_path_factory.mktemp("data"))
    make_data(data)
    folder = tmp_path_factory.mktemp("reference")
    config = make_config(data, "hot", "folders", workers=0)
    config |= {"save_best": True, "eval_interval": "2ba", "save_interval": "3ba"}
    assert run({**config, "save_folder": str(folder)}, f"{folder}/log") == 0
    return {**config, "autoresume": True}, folder


@pytest.mark.processes
def test_kills_around_an_improvement_change_nothing(
    killed: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    config, reference = killed
    config = {**config, "save_folder": str(tmp_path)}
    for moment in ("eval", "best", "pointer", "write", "remove", "best"):
        assert run(config, f"{tmp_path}/log", Death(moment, 1)) == -signal.SIGKILL, moment
    assert run(config, f"{tmp_path}/log") == 0
    assert files(tmp_path) == files(reference)
    for name in ("best-rank0.pt", "latest-rank0.pt"):
        assert record(tmp_path / name) == record(reference / name)
    assert largest_difference(str(tmp_path), str(reference)) == 0


@pytest.mark.s3
def test_the_best_in_an_object_store(tiny: dict[str, Any], tmp_path: Path, scores: Scores) -> None:
    with s3_server():
        keys: dict[str, Any] = {"save_folder": "s3://data/run", "stop_after": "2ba"}
        scores([10, 30])
        main(saving(tiny, tmp_path) | keys | {"max_duration": "2ba"})
        scores([20, 25, 27])
        trainer = main(saving(tiny, tmp_path) | keys)
        assert trainer.state.timestamp.batch == 4
        store = RemoteFolder("s3://data/run")
        assert [batch_of(name) for name in store.names()] == [4, 2]
        # What points at it can be named as a checkpoint.
        begun = {**tiny, "save_folder": None, "max_duration": "3ba"}
        trainer = main({**begun, "load_path": "s3://data/run/best-rank0.pt"})
        assert trainer.state.timestamp.batch == 3
