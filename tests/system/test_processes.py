"""Runs that end early report the cause in one line."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from composer.core import Callback, State

from checkpointing.resume import newest_checkpoint
from errors import DataError, RunError
from main import main
from tests.support.forked import Death, run

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_ends_run_with_one_line_error(
    tiny: dict[str, Any], tmp_path: Path, value: float
) -> None:
    class Break(Callback):
        def after_loss(self, state: State, logger: Any) -> None:
            if state.timestamp.batch == 2:
                state.loss["total"] = state.loss["total"] * value

    tiny |= {"save_folder": str(tmp_path), "save_interval": "1ba", "recipe_name": "mild"}
    with pytest.raises(RunError) as caught:
        main(tiny, callbacks=[Break()])
    assert str(caught.value) == (
        "the loss is not finite in batch 3, at a learning rate of 0.01 "
        f"(loss/train/total is {value}); the last good checkpoint is "
        f"{tmp_path}/ep0-ba2-rank0.pt; try a lower optimizer.lr"
    )
    assert newest_checkpoint(str(tmp_path), "")[0] == f"{tmp_path}/ep0-ba2-rank0.pt"


def test_error_names_image_deleted_during_the_run(tiny: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(tiny["train_dataset"]["path"], tmp_path / "data")

    class Vanish(Callback):
        def batch_checkpoint(self, state: State, logger: Any) -> None:
            if state.timestamp.batch == 2:
                shutil.rmtree(tmp_path / "data/ADEChallengeData2016/images/training")

    tiny["train_dataset"] |= {"path": str(tmp_path / "data"), "num_workers": 1}
    tiny |= {"save_folder": f"{tmp_path}/saved", "save_interval": "1ba", "max_duration": "4ep"}
    with pytest.raises(
        DataError, match=r"images/training/ADE_train_\d+.jpg: No such file"
    ) as error:
        main({**tiny, "eval_interval": "100ep"}, callbacks=[Vanish()])
    assert "\n" not in str(error.value)
    assert newest_checkpoint(f"{tmp_path}/saved", "") is not None


def test_killed_loader_process_ends_run_with_advice_on_memory(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny["train_dataset"]["num_workers"] = 1
    tiny |= {"save_folder": f"{tmp_path}/saved", "save_interval": "1ba", "max_duration": "4ep"}
    death = Death("forward", 2, is_loaders=True)
    # Use a separate process, because torch keeps raising the error after a loader has died.
    assert run({**tiny, "eval_interval": "100ep"}, f"{tmp_path}/log", death) == 75
    error = Path(f"{tmp_path}/log.0.out").read_text().splitlines()[-1]
    assert error.startswith("error: a loader process ended (")
    assert "DataLoader worker (pid" in error
    assert "memory ran out: lower num_workers or batch_size" in error
    assert newest_checkpoint(f"{tmp_path}/saved", "") is not None


def start_thread() -> None:
    """Start a thread in a forked process, as some libraries do, if a test has asked for it."""
    if "thread" in after_fork:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()


after_fork: dict[str, bool] = {}
os.register_at_fork(after_in_child=start_thread)


def test_loader_process_ignores_signals_not_from_its_parent(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(after_fork, "thread", True)
    others = set(multiprocessing.active_children())

    class Signal(Callback):
        def batch_start(self, state: State, logger: Any) -> None:
            (self.worker,) = set(multiprocessing.active_children()) - others
            for name in ("TERM", "INT", "USR1"):
                subprocess.run(["kill", f"-{name}", str(self.worker.pid)], check=True)

    sender = Signal()
    tiny["train_dataset"]["num_workers"] = 1
    trainer = main({**tiny, "eval_interval": "100ep"}, callbacks=[sender])
    assert trainer.state.timestamp.batch == 4
    assert sender.worker.is_alive()
    sender.worker.terminate()
    sender.worker.join(30)
    assert sender.worker.exitcode == 0
