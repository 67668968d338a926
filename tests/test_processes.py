"""One clear line for each way in which a run ends early."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composer.core import Callback, State

from benchmarks.forked import Death, run
from checkpointing.resume import newest_checkpoint
from errors import DataError, Lost, RunError
from main import main
from training.distributed import explain

pytestmark = [pytest.mark.trains, pytest.mark.processes, pytest.mark.usefixtures("small_network")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run(
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
        f"loss/train/total is {value} in batch 3, at a learning rate of 0.01; the last good "
        f"checkpoint is {tmp_path}/ep0-ba2-rank0.pt; a lower optimizer.lr may help"
    )
    assert newest_checkpoint(str(tmp_path), "")[0] == f"{tmp_path}/ep0-ba2-rank0.pt"


def test_a_photo_that_vanishes_in_mid_run(tiny: dict[str, Any], tmp_path: Path) -> None:
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


def test_a_loader_process_killed_by_the_kernel(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["train_dataset"]["num_workers"] = 1
    tiny |= {"save_folder": f"{tmp_path}/saved", "save_interval": "1ba", "max_duration": "4ep"}
    death = Death("forward", 2, is_loaders=True)
    # In a process of its own: torch goes on raising the error in one that has lost a loader.
    assert run({**tiny, "eval_interval": "100ep"}, f"{tmp_path}/log", death) == 75
    error = Path(f"{tmp_path}/log.0.out").read_text().splitlines()[-1]
    assert error.startswith("error: a loader process ended (")
    assert "DataLoader worker (pid" in error
    assert "memory ran out: lower num_workers or batch_size" in error
    assert newest_checkpoint(f"{tmp_path}/saved", "") is not None


def test_a_loader_process_lost_during_a_save_is_explained_too() -> None:
    text = "cannot save ep0-ba2-rank0.pt: DataLoader worker (pid 5) is killed by signal: Killed."
    lost = explain(RunError(text))
    assert isinstance(lost, Lost) and lost.status == 75
    assert str(lost).startswith(f"a loader process ended ({text}); if the kernel")
    failed = RunError("cannot upload: timed out")
    assert explain(failed) is failed
    assert explain(RuntimeError("of our own making")) is None


TRACEBACK = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent"
SHM = "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
NCCL = "Error while creating shared memory segment /dev/shm/nccl-1, error: No space left on device"
BUS = "DataLoader worker (pid 5) is killed by signal: Bus error. Please try to raise your shared"
KILLED = "DataLoader worker (pid 5) is killed by signal: Killed."


@pytest.mark.parametrize(
    ("error", "megabytes", "free", "line"),
    [
        pytest.param(
            RuntimeError(f"{TRACEBACK} ...\nRuntimeError: {SHM}"),
            64,
            60,
            "/dev/shm is full (64 MB): docker",
            id="PyTorch",
        ),
        pytest.param(RuntimeError(NCCL), 64, 60, "/dev/shm is full (64 MB): docker", id="NCCL"),
        pytest.param(RuntimeError(BUS), 64, 60, "/dev/shm is full (64 MB)", id="SIGBUS"),
        pytest.param(RuntimeError(BUS), 9999, 60, "a loader process ended", id="SIGBUS, but large"),
        pytest.param(RuntimeError(KILLED), 64, 0, "a loader process ended", id="SIGKILL"),
        pytest.param(OSError(28, "No space left"), 64, 0, "/dev/shm is full", id="a semaphore"),
        pytest.param(OSError(28, "No space left"), 64, 9, None, id="a disk"),
        pytest.param(OSError(28, "No space left", "a.pt"), 64, 0, None, id="a file"),
        pytest.param(RuntimeError(f"{TRACEBACK}\nKeyError: 3"), 64, 9, None, id="a bug"),
    ],
)
def test_a_full_dev_shm_is_told_from_other_losses(
    monkeypatch: pytest.MonkeyPatch,
    error: RuntimeError | OSError,
    megabytes: int,
    free: int,
    line: str | None,
) -> None:
    disk = SimpleNamespace(f_frsize=2**20, f_blocks=megabytes, f_bavail=free)
    monkeypatch.setattr("training.distributed.os.statvfs", lambda path: disk)
    known = explain(error)
    assert (known is None) is (line is None)
    if line is not None:
        assert str(known).startswith(line)
        assert isinstance(known, Lost) is line.startswith("a loader")  # which is tried again


def start_thread() -> None:
    """In a new process, as libraries do; such a call cannot be unregistered."""
    if "thread" in after_fork:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()


after_fork: dict[str, bool] = {}
os.register_at_fork(after_in_child=start_thread)


def test_a_loader_process_outlives_signals_that_are_not_its_parents(
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
