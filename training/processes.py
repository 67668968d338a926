"""What ends a run before its time, and what it says then: signals, lost processes, a lost loss."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import sys
import threading
from multiprocessing.context import ForkContext, ForkProcess

from composer.utils import dist

from checkpointing.signals import SIGNALS
from dataset.workers import use_one_core
from errors import Lost, RunError, one_line
from training.watch import Watch


def explain(error: RuntimeError, watch: Watch | None = None) -> RunError | None:
    """Return a RunError, or what came of a lost process, in a line; None for other errors."""
    text = one_line(error)
    if "DataLoader worker" in text:
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


def report_start(batch: int) -> None:
    """Tell launch/run.sh, if it began this process, the batch, and how nodes find each other."""
    if "RUN_START_FILE" in os.environ and dist.get_local_rank() == 0:
        nodes = dist.get_world_size() // dist.get_local_world_size()
        place = [os.environ.get(name, "") for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")]
        with open(os.environ["RUN_START_FILE"], "w") as file:
            print(batch, nodes, *place, file=file)


def end_with_launcher() -> None:
    """Have the kernel send SIGUSR1 when composer's launcher, if one started this process, ends."""
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
        ctypes.CDLL(None).prctl(1, int(signal.SIGUSR1))  # PR_SET_PDEATHSIG


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
