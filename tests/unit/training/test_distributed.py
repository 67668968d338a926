"""Tests of training/distributed.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from errors import Lost, RunError
from training.distributed import explain

pytestmark = pytest.mark.usefixtures("small_network")


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
            "/dev/shm is full (64 MB); use docker",
            id="PyTorch",
        ),
        pytest.param(RuntimeError(NCCL), 64, 60, "/dev/shm is full (64 MB); use docker", id="NCCL"),
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
