"""Functions for worker processes that load or check samples.

Each process uses one core and exits when its parent exits.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from errors import DataError

Result = TypeVar("Result")
# File with a container's CPU quota and period, both in microseconds.
QUOTA = Path("/sys/fs/cgroup/cpu.max")
# Number of samples that a worker process handles per task.
CHUNK = 64


def core_numbers() -> set[int]:
    """Return the IDs of the cores that this process may use."""
    # macOS does not have sched_getaffinity.
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def available_cores(quota: Path = QUOTA) -> int:
    """Return the number of cores that this process may use.

    A container's CPU limit is rounded up to whole cores.

    Args:
        quota: File with the container's CPU limit.
    """
    cores = len(core_numbers())
    try:
        limit, period = quota.read_text().split()
        return min(cores, math.ceil(int(limit) / int(period)))
    # The quota file is missing or contains "max", so there is no CPU limit.
    except (OSError, ValueError):
        return cores


def use_one_core(worker: int) -> None:
    """Limit OpenCV and PyTorch to one core in a loader process.

    Args:
        worker: Index of the worker, which is unused but passed by PyTorch's DataLoader.
    """
    # Import OpenCV and PyTorch lazily, so that a command can call `available_cores` before these
    # slow imports.
    import cv2
    import torch

    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def chunked(samples: Sequence[Any]) -> Iterator[Any]:
    """Divide samples into chunks of at most `CHUNK` samples.

    Args:
        samples: The samples to divide.
    """
    return (samples[first : first + CHUNK] for first in range(0, len(samples), CHUNK))


def map_chunks(
    function: Callable[..., Result],
    chunks: Sequence[tuple],
    workers: int | None = None,
    desc: str = "",
    unit: str = " samples",
) -> list[Result]:
    """Apply a function to chunks of samples in several processes, with a progress bar on stderr.

    Args:
        function: Function to call with the values of each tuple as arguments.
        chunks: One tuple of arguments per chunk. The length of the first argument is the number of
            samples in the chunk.
        workers: Largest number of processes, or None for one process per core.
        desc: Text to show before the progress bar.
        unit: Unit to show after the numbers of the progress bar.

    Returns:
        The results, in the order of the chunks.

    Raises:
        DataError: A worker process died.
    """
    # The pool starts all processes at once, so do not ask for more than there are chunks.
    workers = max(1, min(workers or available_cores(), len(chunks)))
    total = sum(len(arguments[0]) for arguments in chunks)
    with (
        tqdm(total=total, unit=unit, desc=desc, disable=None) as bar,
        ProcessPoolExecutor(workers, initializer=_init_process) as pool,
    ):
        try:
            futures = {pool.submit(function, *arguments): arguments[0] for arguments in chunks}
            for future in as_completed(futures):
                future.result()  # Raise the worker's exception, if any.
                bar.update(len(futures[future]))
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died, possibly because memory ran out; try a lower --workers"
            ) from error
        finally:
            # After an error or an interruption, cancel the tasks that have not started yet, and
            # wait for the others.
            pool.shutdown(cancel_futures=True)


def _init_process() -> None:
    global _captures_stderr
    # Ignore Ctrl-C here, because the parent process stops its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # On Linux, end this process when its parent ends, even if the parent is killed.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    use_one_core(0)
    # libjpeg reports a damaged JPEG only on stderr and decodes it anyway, so redirect stderr to a
    # file and check it.
    descriptor, name = tempfile.mkstemp()
    os.unlink(name)
    os.dup2(descriptor, 2)
    _captures_stderr = True


# Whether this process redirects stderr to catch warnings from image decoders.
_captures_stderr = False


def decoder_complaint() -> str | None:
    """Return the first line that an image decoder has printed since the last call, or None."""
    if not _captures_stderr or os.fstat(2).st_size == 0:
        return None
    text = os.pread(2, 2000, 0).decode(errors="replace").strip()
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    return text.splitlines()[0] if text else None


def default_workers() -> int:
    """Return a rank's default number of loader processes: one per core of the rank, at most 8."""
    from composer.utils import dist  # predict.py starts faster without Composer.

    return min(8, max(1, available_cores() // dist.get_local_world_size()))
