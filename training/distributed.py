"""What ends a run before its time, and what it says then: signals, lost processes, a lost loss."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import signal
import threading
from multiprocessing.context import ForkContext, ForkProcess
from typing import TYPE_CHECKING

from composer.utils import dist

from dataset.workers import use_one_core
from errors import SIGNALS, Lost, RunError, one_line

if TYPE_CHECKING:
    from training.watch import Watch

SHARED_MEMORY = "/dev/shm"  # where loader processes leave batches for the run


def join_processes() -> Watch | None:
    """Have the processes of a run find each other and watch each other, if there are several.

    Raises:
        Lost: They are not all there in time.
    """
    if dist.get_world_size() == 1:
        return None
    from training.watch import join

    return join()


def explain(error: RuntimeError | OSError, watch: Watch | None = None) -> RunError | None:
    """Return a RunError, or what came of a lost process, in a line; None for other errors."""
    full = full_shared_memory(error)
    if full:
        return RunError(f"{full}, or train_dataset.num_workers=0 and eval_dataset.num_workers=0")
    if isinstance(error, OSError):
        return None
    text = one_line(error)
    # A loader process that raised an error, rather than ended, passes on its whole traceback.
    if "DataLoader worker" in text and "Traceback" not in text:
        return Lost(
            f"a loader process ended ({text}); if the kernel killed it, memory ran out: "
            "lower num_workers or batch_size"
        )
    if isinstance(error, RunError):
        return error
    lost = re.search(r"gloo|NCCL|onnection (closed|reset|refused)|[Tt]imed out", text)
    if lost and dist.get_world_size() > 1:
        cause = watch.cause() if watch else None
        return cause or Lost(f"another process of the run ended or does not answer ({text[:160]})")
    return None


def full_shared_memory(error: Exception) -> str | None:
    """Return a line that says so if an error came of a full /dev/shm, otherwise None.

    Containers often have 64 MB of it. PyTorch and NCCL name it where an allocation fails. A write
    to memory that is not there ends a loader with SIGBUS instead, and Python's own semaphores fail
    without naming a file: these two count only if /dev/shm is small, or has no room left.
    """
    text = one_line(error)
    try:
        disk = os.statvfs(SHARED_MEMORY)
    except OSError:  # macOS has none
        return None
    size, free = disk.f_frsize * disk.f_blocks, disk.f_frsize * disk.f_bavail
    is_full = "No space left" in text and re.search(r"shared memory|/dev/shm", text)
    no_room = isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename
    if not is_full:
        is_full = ("Bus error" in text and size < 2**30) or (no_room and free < 2**20)
    if not is_full:
        return None
    shown = f"{size >> 10} KB" if size < 2**20 else f"{size >> 20} MB"
    return f"{SHARED_MEMORY} is full ({shown}): docker run --shm-size 16g"


class LoaderContext(ForkContext):
    """Forks a loader's processes with the run's signals blocked, for them to outlive those.

    Slurm, for one, sends SIGTERM to every process of a job, and the run needs its loaders until
    its batch is done. Blocking them in the new process would be too late: as it forks, libraries
    start threads there (PyTorch does once `set_num_threads` was called), and a signal takes any
    thread that lets it through.
    """

    class Process(ForkProcess):
        """A process of a loader."""

        def start(self) -> None:
            """Fork with the signals blocked."""
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(worker: int) -> None:
    """In a process of `LoaderContext`: end when the parent says so."""
    use_one_core(worker)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)
