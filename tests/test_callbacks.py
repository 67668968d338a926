"""The callbacks draw and count what the run really did, from the weights that were evaluated."""

from __future__ import annotations

import csv
import gc
import io
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from artifacts import CLASSES, finished_run
from composer.core import Timestamp
from composer.loggers import ConsoleLogger, FileLogger, Logger, LoggerDestination, WandBLogger
from matplotlib.figure import Figure
from PIL import Image
from run_helpers import file_limit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpointing.rebuild import build_network
from checkpointing.weights import load_weights
from segmentation.classes import load_classes
from segmentation.drawing import prediction_sheet
from segmentation.losses import MixedTarget
from segmentation.metrics import confusion_matrix, mean_iou
from training import callbacks, pictures
from training.callbacks import RunRecord, TrainMIoU, main_target
from training.pictures import Curves, Pictures, draw_curves, save_file

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def run() -> tuple[Any, str]:
    return finished_run()


def test_pictures_are_of_the_evaluated_weights(run: tuple[Any, str]):
    """Drawn again by hand from the checkpoint, the last picture has the same pixels."""
    trainer, folder = run
    assert sorted(os.listdir(os.path.join(folder, "pictures"))) == ["ep0-ba2.png", "ep1-ba4.png"]
    spec = trainer.state.evaluators[0].dataloader
    checkpoint = os.path.join(folder, "latest-rank0.pt")
    photos, targets, predictions = [], [], []
    network = build_network(load_weights(checkpoint, "ema"))
    for index in (1, 3):  # evenly spread over five
        image, labels = spec.dataloader.collate_fn([spec.dataloader.dataset[index]])
        photos.append(image[0].permute(1, 2, 0).numpy())
        image, target = spec.microbatch_transforms((image, labels))
        targets.append(target[0].numpy())
        with torch.no_grad():
            network.upsample = True
            predictions.append(network(image)[0].argmax(0).numpy())
    classes = load_weights(checkpoint).classes
    expected = np.array(prediction_sheet(photos, targets, predictions, classes))
    drawn = next(c for c in trainer.state.callbacks if isinstance(c, Pictures))
    assert drawn.latest == os.path.join(folder, "pictures", "ep1-ba4.png")
    assert np.array_equal(np.array(Image.open(drawn.latest)), expected)


def test_pictures_and_tables_go_to_loggers(run: tuple[Any, str]):
    trainer, folder = run
    trainer.logger.destinations[0].writer.flush()
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            if "tfevents" in name:
                events = EventAccumulator(os.path.join(parent, name))
                events.Reload()
                if "pictures/eval" in events.Tags()["images"]:
                    found += [event.step for event in events.Images("pictures/eval")]
    assert sorted(found) == [2, 4]


def test_pictures_in_wandb(run: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Offline as well, where W&B leaves out the pictures in its tables."""
    trainer, _ = run
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ALLOW_OFFLINE_ARTIFACTS", "false")  # as build_loggers does
    monkeypatch.setattr(wandb.Run, "get_url", lambda run: run.url, raising=False)  # likewise
    destination = WandBLogger(project="tests", init_kwargs={"dir": str(tmp_path)})
    destination.init(trainer.state, trainer.logger)
    trainer.state.set_dataloader(trainer.state.evaluators[0].dataloader.dataloader, "eval")
    trainer.state.model.eval()
    pictures = Pictures(load_classes(CLASSES, 12), 2, str(tmp_path / "own"))
    pictures.eval_start(trainer.state, Logger(trainer.state, [destination]))
    wandb.finish()
    (found,) = (tmp_path / "wandb").rglob("*.png")
    assert np.array_equal(np.array(Image.open(found)), np.array(Image.open(pictures.latest)))


def test_table_of_classes(run: tuple[Any, str]):
    trainer, folder = run
    assert sorted(os.listdir(os.path.join(folder, "classes"))) == ["ep0-ba2.csv", "ep1-ba4.csv"]
    text = Path(folder, "classes", "ep1-ba4.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["class"] for row in rows] == CLASSES
    miou = trainer.state.eval_metric_values["MIoU"]
    present = [float(row["IoU"]) for row in rows if row["IoU"]]
    assert np.mean(present) == pytest.approx(float(miou), rel=1e-6)
    matrix = trainer.state.eval_metrics["eval"]["MIoU"].total_matrix
    assert [int(row["pixels"]) for row in rows] == matrix.sum(1).tolist()


def test_tables_without_pandas(run: tuple[Any, str], monkeypatch: pytest.MonkeyPatch):
    """Composer's file logger makes tables with pandas, which need not be there."""
    trainer, _ = run

    class Table(LoggerDestination):
        rows: list[Any] = []  # noqa: RUF012

        def log_table(self, columns: Any, rows: Any, name: str = "", step: Any = None) -> None:
            assert columns == ["class", "IoU", "accuracy", "pixels"] and step == 4
            self.rows = rows

    def refuse(*arguments: Any) -> None:
        raise AssertionError("no table can go here")

    monkeypatch.setattr(ConsoleLogger, "log_table", refuse)
    monkeypatch.setattr(FileLogger, "log_table", refuse)
    monkeypatch.setattr(callbacks.importlib.util, "find_spec", lambda name: None)
    table = Table()
    logger = SimpleNamespace(destinations=[ConsoleLogger(), FileLogger(), table])
    trainer.state.set_dataloader(trainer.state.evaluators[0].dataloader.dataloader, "eval")
    callbacks.ClassTable(load_classes(CLASSES, 12)).eval_end(trainer.state, logger)
    assert [row[0] for row in table.rows] == CLASSES


def test_drawn_curves_leave_nothing_behind(tmp_path: Path) -> None:
    """Their figures refer to themselves, and only a collection frees what does."""
    curves = Curves(str(tmp_path))
    curves.train, curves.eval = [(1, 0.5, 0.1)], [(1, 20.0)]
    state: Any = SimpleNamespace(run_name="name", timestamp=Timestamp())
    curves._draw(state)  # what the first imports stays
    gc.collect()
    gc.disable()
    try:
        curves._draw(state)
        assert not [thing for thing in gc.get_objects() if type(thing) is Figure]
    finally:
        gc.enable()
    assert (tmp_path / "curves.png").exists()


def test_curves_go_on_after_a_resume(run: tuple[Any, str], tmp_path: Path):
    trainer, folder = run
    curves = next(c for c in trainer.state.callbacks if isinstance(c, Curves))
    assert [batch for batch, _, _ in curves.train] == [1, 2, 3, 4]
    assert [rate for _, _, rate in curves.train] == [0.02] * 4
    assert all(np.isfinite(loss) for _, loss, _ in curves.train)
    assert [batch for batch, _ in curves.eval] == [2, 4]
    assert curves.eval[-1][1] == pytest.approx(float(trainer.state.eval_metric_values["MIoU"]))
    assert Image.open(os.path.join(folder, "curves.png")).size == (900, 800)

    content = torch.load(os.path.join(folder, "latest-rank0.pt"), weights_only=False)
    resumed = Curves(str(tmp_path))
    resumed.load_state_dict(content["state"]["callbacks"]["Curves"])
    np.testing.assert_allclose(resumed.train, curves.train, rtol=1e-6)
    assert draw_curves(resumed.train, curves.eval) == draw_curves(curves.train, curves.eval)


@pytest.mark.parametrize("batches, evaluations", [(0, 0), (1, 0), (1, 1), (500, 5)])
def test_curves_of_any_length(batches: int, evaluations: int):
    train = [(i + 1, float("nan") if i == 7 else 1 / (i + 1), 0.1) for i in range(batches)]
    picture = draw_curves(train, [(i * 100, 10.0 * i) for i in range(evaluations)])
    assert Image.open(io.BytesIO(picture)).size == (900, 800)


def test_record_is_in_the_checkpoint(run: tuple[Any, str]):
    _, folder = run
    content = torch.load(os.path.join(folder, "latest-rank0.pt"), weights_only=False)
    record = content["state"]["callbacks"]["RunRecord"]
    assert json.loads(record["config"])["run_name"] == "finished"
    classes = load_classes(CLASSES, 12)
    assert record == RunRecord(json.loads(record["config"]), classes).state_dict()


def test_one_client_writes_all_of_a_runs_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """One a file, each some MB that refer to themselves, would pile up."""
    made, written = [], []

    def make(uri: str) -> SimpleNamespace:
        made.append(uri)
        return SimpleNamespace(upload_object=lambda name, file: written.append(name))

    monkeypatch.setattr(pictures, "maybe_create_object_store_from_uri", make)
    for name in ("curves.png", "pictures/ep1-ba2.png"):
        assert save_file(b"data", "s3://one-client/run", name) == f"s3://one-client/run/{name}"
    assert made == ["s3://one-client/"]
    assert written == ["run/curves.png", "run/pictures/ep1-ba2.png"]


def test_files_appear_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = save_file(b"one", str(tmp_path), "a/b.png")
    assert Path(path).read_bytes() == b"one"
    save_file(b"two", str(tmp_path), "a/b.png")
    assert os.listdir(tmp_path / "a") == ["b.png"] and Path(path).read_bytes() == b"two"
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert save_file(b"", str(tmp_path / "file"), "c.png") is None
    assert "cannot write" in caplog.text
    before = sorted(tmp_path.rglob("*"))
    with file_limit(100):
        assert save_file(bytes(1000), str(tmp_path), "a/b.png") is None
    assert f"{tmp_path}/a/b.png: File too large" in caplog.text
    assert sorted(tmp_path.rglob("*")) == before


def test_files_go_to_object_stores(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    stored = {}

    class Store:
        def upload_object(self, name: str, file: str) -> None:
            stored[name] = Path(file).read_bytes()

    monkeypatch.setattr(pictures, "maybe_create_object_store_from_uri", lambda uri: Store())
    assert (
        save_file(b"png", "s3://bucket/run", "pictures/a.png") == "s3://bucket/run/pictures/a.png"
    )
    assert stored == {"run/pictures/a.png": b"png"}
    monkeypatch.setattr(Store, "upload_object", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    assert save_file(b"png", "s3://bucket/run", "a.png") is None
    assert "gone" in caplog.text


@pytest.mark.parametrize("mixing, expected", [(0.0, 1), (0.5, 1), (0.9, 2)])
def test_target_that_weighs_more(mixing: float, expected: int):
    first, second = torch.tensor([[[1]]]), torch.tensor([[[2]]])
    assert main_target(MixedTarget(first, second, mixing)).item() == expected
    assert main_target(first).item() == 1


def test_training_miou_every_other_batch():
    """Two micro-batches count, a second pass (SAM's) does not, every other batch is left out."""
    torch.manual_seed(0)
    logged: dict[int, float] = {}
    callback = TrainMIoU(2, 3)
    for batch in range(4):
        state = SimpleNamespace(timestamp=Timestamp(batch=batch))
        logger = SimpleNamespace(
            log_metrics=lambda metrics, batch=batch: logged.update(
                {batch: metrics["metrics/train/MIoU"]}
            )
        )
        parts = []
        callback.batch_start(state, logger)
        for _ in range(2):
            callback.before_train_batch(state, logger)
            for _ in range(2):
                target = torch.randint(-1, 3, (2, 8, 8))
                state.outputs, state.batch = torch.randn(2, 3, 4, 4), (None, target)
                parts.append(confusion_matrix(state.outputs, target, 3))
                callback.after_loss(state, logger)
        callback.batch_end(state, logger)
        if batch in (1, 3):
            expected = 100 * mean_iou(parts[0] + parts[1]).item()
            assert logged.pop(batch) == pytest.approx(expected)
    assert not logged
