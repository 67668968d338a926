"""Pictures of evaluations in W&B, and curves.png for runs of any length."""

from __future__ import annotations

import gc
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb
from composer.core import Timestamp
from composer.loggers import Logger, WandBLogger
from matplotlib.figure import Figure
from PIL import Image

from segmentation.classes import load_classes
from tests.support.artifacts import CLASSES
from tests.support.callbacks import run  # noqa: F401
from training.pictures import Curves, Pictures, draw_curves

pytestmark = pytest.mark.usefixtures("small_network")


def test_evaluation_pictures_are_saved_in_wandb(
    run: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Log offline, because W&B then omits pictures in tables."""
    trainer, _ = run
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ALLOW_OFFLINE_ARTIFACTS", "false")  # WandBLogger sets this variable
    monkeypatch.setattr(
        wandb.Run, "get_url", lambda run: run.url, raising=False
    )  # build_loggers does the same
    destination = WandBLogger(project="tests", init_kwargs={"dir": str(tmp_path)})
    destination.init(trainer.state, trainer.logger)
    trainer.state.set_dataloader(trainer.state.evaluators[0].dataloader.dataloader, "eval")
    trainer.state.model.eval()
    pictures = Pictures(load_classes(CLASSES, 12), 2, str(tmp_path / "own"))
    pictures.eval_start(trainer.state, Logger(trainer.state, [destination]))
    wandb.finish()
    (saved_picture,) = (tmp_path / "wandb").rglob("*.png")
    assert np.array_equal(
        np.array(Image.open(saved_picture)), np.array(Image.open(pictures.latest))
    )


@pytest.mark.parametrize("batches, evaluations", [(0, 0), (1, 0), (1, 1), (500, 5)])
def test_curves_are_drawn_for_runs_of_any_length(batches: int, evaluations: int):
    train = [(i + 1, float("nan") if i == 7 else 1 / (i + 1), 0.1) for i in range(batches)]
    picture = draw_curves(train, [(i * 100, 10.0 * i) for i in range(evaluations)])
    assert Image.open(io.BytesIO(picture)).size == (900, 800)


def test_drawing_curves_leaks_no_figures(tmp_path: Path) -> None:
    """Figures contain reference cycles, so only the garbage collector would free them."""
    curves = Curves(str(tmp_path))
    curves.train, curves.eval = [(1, 0.5, 0.1)], [(1, 20.0)]
    state: Any = SimpleNamespace(run_name="name", timestamp=Timestamp())
    curves._draw(state)  # the first call imports modules, which stay in memory
    gc.collect()
    gc.disable()
    try:
        # Other tests in this process may have left figures.
        before = sum(type(thing) is Figure for thing in gc.get_objects())
        curves._draw(state)
        assert sum(type(thing) is Figure for thing in gc.get_objects()) == before
    finally:
        gc.enable()
    assert (tmp_path / "curves.png").exists()
