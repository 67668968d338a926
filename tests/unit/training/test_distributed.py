"""Tests of training/distributed.py."""

from __future__ import annotations

import fcntl
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from errors import Lost, RunError
from training.distributed import CoreTurns, core_turns, explain

pytestmark = pytest.mark.usefixtures("small_network")


def test_error_explains_a_loader_process_killed_during_a_save() -> None:
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
        pytest.param(
            RuntimeError(BUS), 9999, 60, "a loader process ended", id="SIGBUS with a large /dev/shm"
        ),
        pytest.param(RuntimeError(KILLED), 64, 0, "a loader process ended", id="SIGKILL"),
        pytest.param(OSError(28, "No space left"), 64, 0, "/dev/shm is full", id="semaphore"),
        pytest.param(OSError(28, "No space left"), 64, 9, "[Errno 28] No space", id="full disk"),
        pytest.param(
            OSError(28, "No space left", "a.pt"), 64, 0, "[Errno 28] No", id="full disk, named file"
        ),
        pytest.param(RuntimeError(f"{TRACEBACK}\nKeyError: 3"), 64, 9, None, id="unrelated error"),
    ],
)
def test_full_dev_shm_is_distinguished_from_other_errors(
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
        assert isinstance(known, Lost) is line.startswith("a loader")  # a lost process is retried


def train(turns: CoreTurns, name: str, other: str, steps: list[str]) -> None:
    for _ in range(3):
        turns.batch_start(None, None)
        steps.append(name)
        # The batch lasts until the other run is next in line, or has ended.
        while steps.count(other) < 6 and not is_locked(turns):
            time.sleep(0.001)
        steps.append(name)
        turns.batch_end(None, None)
    turns.fit_end(None, None)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        pytest.param(0.0, ["a", "b", "a", "b", "a", "b"], id="one batch each"),
        pytest.param(60.0, ["a", "a", "a", "b", "b", "b"], id="until the first run has ended"),
    ],
)
def test_concurrent_runs_take_turns_on_the_cpu_cores(
    tmp_path: Path, length: float, expected: list[str]
) -> None:
    runs = [CoreTurns(str(tmp_path), length) for _ in range(2)]
    steps: list[str] = []
    runs[0].batch_start(None, None)  # The first run has the turn when the second run starts.
    second = threading.Thread(target=train, args=(runs[1], "b", "a", steps))
    second.start()
    while not steps and not is_locked(runs[1]):
        time.sleep(0.001)
    train(runs[0], "a", "b", steps)
    second.join()
    for run in runs:
        run.close(None, None)
    assert steps == [name for name in expected for _ in range(2)]


def is_locked(turns: CoreTurns) -> bool:
    """Return whether a run waits for its turn."""
    with open(f"/proc/self/fd/{turns.next.fileno()}") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_run_that_waits_too_long_for_its_turn_continues(tmp_path: Path, caplog) -> None:
    stopped, run = CoreTurns(str(tmp_path)), CoreTurns(str(tmp_path), patience=0.05)
    stopped.batch_start(None, None)
    for _ in range(2):
        run.batch_start(None, None)
        run.batch_end(None, None)
    assert [record.message for record in caplog.records] == [
        "another run has kept the cores for 0.05 s; continuing"
    ]
    for turns in (stopped, run):
        turns.close(None, None)


@pytest.mark.parametrize(
    ("gpu", "ranks", "threads", "cores", "folder", "takes_turns"),
    [
        pytest.param(False, 1, 2, 2, "", True, id="all cores"),
        pytest.param(False, 1, 1, 2, "", False, id="half of the cores"),
        pytest.param(False, 1, 1, 1, "", True, id="machine with one core"),
        pytest.param(False, 2, 2, 2, "", False, id="two ranks"),
        pytest.param(True, 1, 2, 2, "", False, id="GPU"),
        pytest.param(False, 1, 2, 2, "missing", False, id="no temporary folder"),
    ],
)
def test_only_single_rank_cpu_runs_on_all_cores_take_turns(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    gpu: bool,
    ranks: int,
    threads: int,
    cores: int,
    folder: str,
    takes_turns: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("training.distributed.dist.get_world_size", lambda: ranks)
    monkeypatch.setattr("training.distributed.available_cores", lambda: cores)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / folder))
    callbacks = core_turns()
    assert len(callbacks) == takes_turns
    for turns in callbacks:
        turns.close(None, None)
