"""Pictures, class tables, curves and the run record of a finished run."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from composer.loggers import ConsoleLogger, FileLogger, LoggerDestination
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpointing.rebuild import build_network
from checkpointing.weights import load_weights
from segmentation.classes import load_classes
from segmentation.drawing import prediction_sheet
from tests.support.artifacts import CLASSES
from tests.support.callbacks import run  # noqa: F401
from training import callbacks
from training.callbacks import RunRecord
from training.pictures import Curves, Pictures, draw_curves

pytestmark = pytest.mark.usefixtures("small_network")


def test_pictures_show_predictions_of_ema_weights(run: tuple[Any, str]):
    """Draw the last picture again with the weights in the checkpoint, and compare the pixels."""
    trainer, folder = run
    assert sorted(os.listdir(os.path.join(folder, "pictures"))) == ["ep0-ba2.png", "ep1-ba4.png"]
    spec = trainer.state.evaluators[0].dataloader
    checkpoint = os.path.join(folder, "latest-rank0.pt")
    images, targets, predictions = [], [], []
    network = build_network(load_weights(checkpoint, "ema"))
    for index in (1, 3):  # the two of the five images that the callback draws
        image, labels = spec.dataloader.collate_fn([spec.dataloader.dataset[index]])
        images.append(image[0].permute(1, 2, 0).numpy())
        image, target = spec.microbatch_transforms((image, labels))
        targets.append(target[0].numpy())
        with torch.no_grad():
            network.upsample = True
            predictions.append(network(image)[0].argmax(0).numpy())
    classes = load_weights(checkpoint).classes
    expected = np.array(prediction_sheet(images, targets, predictions, classes))
    drawn = next(c for c in trainer.state.callbacks if isinstance(c, Pictures))
    assert drawn.latest == os.path.join(folder, "pictures", "ep1-ba4.png")
    assert np.array_equal(np.array(Image.open(drawn.latest)), expected)


def test_evaluation_pictures_are_sent_to_tensorboard(run: tuple[Any, str]):
    trainer, folder = run
    trainer.logger.destinations[0].writer.flush()
    steps = []
    for parent, _, names in os.walk(folder):
        for name in names:
            if "tfevents" in name:
                events = EventAccumulator(os.path.join(parent, name))
                events.Reload()
                if "pictures/eval" in events.Tags()["images"]:
                    steps += [event.step for event in events.Images("pictures/eval")]
    assert sorted(steps) == [2, 4]


def test_class_table_agrees_with_logged_metrics(run: tuple[Any, str]):
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


def test_class_table_is_logged_without_pandas(
    run: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
):
    """Without pandas, Composer's file logger cannot log tables, so only it is skipped."""
    trainer, _ = run

    class Table(LoggerDestination):
        rows: ClassVar[list[Any]] = []

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


def test_curves_continue_after_resume(run: tuple[Any, str], tmp_path: Path):
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


def test_checkpoint_contains_run_record(run: tuple[Any, str]):
    _, folder = run
    content = torch.load(os.path.join(folder, "latest-rank0.pt"), weights_only=False)
    record = content["state"]["callbacks"]["RunRecord"]
    assert json.loads(record["config"])["run_name"] == "finished"
    classes = load_classes(CLASSES, 12)
    assert record == RunRecord(json.loads(record["config"]), classes).state_dict()
