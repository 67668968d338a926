"""Functions that handle lost processes, full shared memory, stop signals and shared CPU cores."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import re
import signal
import tempfile
import threading
import time
from multiprocessing.context import ForkContext, ForkProcess
from typing import TYPE_CHECKING, TextIO

import torch
from composer.core import Callback, State
from composer.devices import Device
from composer.loggers import Logger
from composer.utils import dist, get_device, reproducibility

from dataset.workers import available_cores, core_numbers, use_one_core
from errors import SIGNALS, Lost, RunError, one_line
from training.launcher import COLLECTIVE_TIMEOUT
from training.precision import Precision, check_build_tools, check_kernels, choose_precision
from training.schema import Config

if TYPE_CHECKING:
    from training.watch import Watch

log = logging.getLogger(__name__)

SHARED_MEMORY = "/dev/shm"  # Loader processes pass batches to the trainer through shared memory.


def set_up_process(config: Config) -> tuple[Device, Precision]:
    """Check the hardware, join the other ranks of the run, and seed this process.

    Raises:
        ConfigError: The GPU, the precision or the compiler cannot be used.
    """
    # If this torch build does not support the GPU, fail now rather than at the first training step.
    check_kernels()
    missing = check_build_tools(config)
    if missing and dist.get_local_rank() == 0:
        log.warning("%s", missing)
    precision = choose_precision(config.precision)
    device = get_device(None)
    if dist.get_world_size() > 1:
        dist.initialize_dist(device, timeout=COLLECTIVE_TIMEOUT)
    # Set the seed before the network is built, because its initial weights are random.
    reproducibility.seed_all(config.seed)
    # All training images have the same size, so cuDNN can try its kernels once and keep the
    # fastest. Deterministic runs skip this search, because it may choose different kernels each
    # time.
    torch.backends.cudnn.benchmark = not config.deterministic
    return device, precision


def join_processes() -> Watch | None:
    """Connect the processes of a run, and watch for processes that are lost.

    Returns:
        The watch, or None if the run has only one process.

    Raises:
        Lost: Some processes did not start in time.
    """
    if dist.get_world_size() == 1:
        return None
    from training.watch import join

    return join()


def explain(error: RuntimeError | OSError, watch: Watch | None = None) -> RunError | None:
    """Explain an error if its cause is known, such as a lost process.

    Args:
        error: Error that ended training.
        watch: Watch over the run's other processes, or None.

    Returns:
        An error with a one-line message, or None if the cause is unknown.
    """
    full = full_shared_memory(error)
    if full:
        return RunError(
            f"{full}, or set train_dataset.num_workers=0 and eval_dataset.num_workers=0"
        )
    text = one_line(error)
    if isinstance(error, OSError):  # For example, the disk is full.
        return RunError(text)
    # A loader process that raises an error leaves a traceback, but one that is killed does not.
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
        return cause or Lost(
            f"another process of the run has ended or does not respond ({text[:160]})"
        )
    return None


def full_shared_memory(error: Exception) -> str | None:
    """Return a one-line explanation if a full /dev/shm caused an error, otherwise None.

    In containers, /dev/shm often has only 64 MB. If /dev/shm is full, PyTorch and NCCL mention it
    in their errors. Two other symptoms may have other causes, so they count only if /dev/shm is
    small or full: a loader process killed by SIGBUS, and a disk-full error without a file name,
    which Python's semaphores raise.
    """
    text = one_line(error)
    try:
        disk = os.statvfs(SHARED_MEMORY)
    except OSError:  # /dev/shm does not exist on macOS.
        return None
    size, free = disk.f_frsize * disk.f_blocks, disk.f_frsize * disk.f_bavail
    is_named = "No space left" in text and re.search(r"shared memory|/dev/shm", text)
    is_killed = "Bus error" in text and size < 2**30
    no_room = isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename
    if not (is_named or is_killed or (no_room and free < 2**20)):
        return None
    shown = f"{size >> 10} KB" if size < 2**20 else f"{size >> 20} MB"
    return f"{SHARED_MEMORY} is full ({shown}); use docker run --shm-size 16g"


class LoaderContext(ForkContext):
    """A multiprocessing context that blocks the run's stop signals in forked loader processes.

    Slurm, for example, sends SIGTERM to every process of a job, but the run needs its loader
    processes until the current batch is done. Blocking the signals in the new process would be too
    late. Some libraries start threads during the fork, for example PyTorch after `set_num_threads`,
    and any thread that does not block a signal may receive it.
    """

    class Process(ForkProcess):
        """A loader process that starts with the stop signals blocked."""

        def start(self) -> None:
            """Fork this process while the stop signals are blocked."""
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(worker: int) -> None:
    """Prepare a loader process: use one core, and exit when the parent sends SIGTERM."""
    use_one_core(worker)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def core_turns() -> list[Callback]:
    """Return a `CoreTurns` callback if the run is one CPU process on most of the cores."""
    if torch.cuda.is_available() or dist.get_world_size() > 1:
        return []
    if torch.get_num_threads() <= available_cores() // 2:
        return []
    try:
        return [CoreTurns()]
    except OSError:  # The temporary folder is read-only.
        return []


def _open_lock(path: str) -> TextIO:
    # In a shared temporary folder, Linux may refuse O_CREAT for a file owned by another user.
    create = 0 if os.path.exists(path) else os.O_CREAT
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | create, 0o666))


class CoreTurns(Callback):
    """A callback that lets the training runs on one machine take turns on its CPU cores.

    Two runs that share the cores take more than twice as long as running them one after the other.
    Each parallel operation has to wait until the other run frees a core. Using fewer threads would
    avoid this, but would change the last bits of sums. A turn ends only at the end of a batch.

    If a run has waited for `patience` seconds without getting a turn, for example because a
    debugger has stopped the other run, it continues without turns.

    Args:
        folder: Folder of the lock files, the same for all runs.
        length: Minimum length of a turn, in seconds.
        patience: Longest time to wait for a turn, in seconds.
    """

    def __init__(
        self, folder: str | None = None, length: float = 2.0, patience: float = 60.0
    ) -> None:
        cores = sum(1 << number for number in core_numbers())
        path = os.path.join(folder or tempfile.gettempdir(), f"training-turns-{cores:x}")
        self.length, self.patience = length, patience
        self.began: float | None = None
        # The run that is next in line holds the `next` lock, so the run whose turn has just ended
        # cannot take another turn first.
        self.next, self.turn = (_open_lock(f"{path}.{name}") for name in ("next", "turn"))

    def batch_start(self, state: State, logger: Logger) -> None:
        """Wait for a turn, unless this run already has it."""
        if self.began is None and self.patience:
            if not (self._lock(self.next) and self._lock(self.turn)):
                log.warning("another run has kept the cores for %g s; continuing", self.patience)
                self.patience = 0.0
            fcntl.flock(self.next, fcntl.LOCK_UN)
            self.began = time.monotonic()

    def batch_end(self, state: State, logger: Logger) -> None:
        """End the turn if it has lasted for at least `length` seconds."""
        if self.began is not None and time.monotonic() - self.began >= self.length:
            self.fit_end(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """End the turn."""
        fcntl.flock(self.turn, fcntl.LOCK_UN)
        self.began = None

    eval_batch_start, eval_batch_end = batch_start, batch_end
    eval_end = eval_standalone_end = fit_end

    def close(self, state: State, logger: Logger) -> None:
        """Close the lock files, which also ends the turn."""
        self.next.close()
        self.turn.close()

    def _lock(self, file: TextIO) -> bool:
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.005)
            else:
                return True
        return False
