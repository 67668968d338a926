"""Worker processes that load or check samples.

Each process uses one core and ends with its parent.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from errors import DataError

Tag = TypeVar("Tag", bound=Hashable)
Result = TypeVar("Result")
# Microseconds of CPU time that a container may use per period.
QUOTA = Path("/sys/fs/cgroup/cpu.max")
CHUNK = 64  # Number of samples that a process takes at a time.


def available_cores(quota: Path = QUOTA) -> int:
    """Return the number of cores that this process may use.

    The share of a container is rounded up to whole cores.

    Args:
        quota: File with the container's CPU limit.
    """
    # Only Linux restricts a process to some cores; macOS does not.
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        limit, period = quota.read_text().split()
        return min(cores, math.ceil(int(limit) / int(period)))
    # The file does not exist, or it says "max", which means no limit.
    except (OSError, ValueError):
        return cores


def use_one_core(worker: int) -> None:
    """Limit OpenCV and PyTorch to one core in a loader process.

    Args:
        worker: Number of the worker. It is unused; PyTorch's DataLoader passes it.
    """
    # Import OpenCV and PyTorch only here, so that a command can count the cores before it imports
    # them.
    import cv2
    import torch

    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def in_processes(tasks: Mapping[Tag, tuple], workers: int) -> Iterator[tuple[Tag, Any]]:
    """Run tasks in several processes, and cancel the remaining tasks when interrupted.

    Args:
        tasks: A function with its arguments for each tag. A tag is any hashable value.
        workers: Number of processes.

    Yields:
        The tag and the result of each task, as the tasks finish.

    Raises:
        DataError: A process died.
    """
    with ProcessPoolExecutor(workers, initializer=_init_process) as pool:
        try:
            futures = {pool.submit(*task): tag for tag, task in tasks.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died, possibly out of memory; try fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # The shutdown waits for the tasks that are running.


def chunked(samples: Sequence[Any]) -> Iterator[Any]:
    """Yield the samples in chunks of `CHUNK`.

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
        function: Function that takes the values of one tuple as its arguments.
        chunks: One tuple of arguments per chunk. The length of the first argument is the number of
            samples in the chunk.
        workers: Number of processes. If None, one process per core.
        desc: Text in front of the progress bar.
        unit: Unit of the numbers on the progress bar.

    Returns:
        The results of the function, in the order of the chunks.

    Raises:
        DataError: A process died.
    """
    results: dict[int, Result] = {}
    tasks = {number: (function, *arguments) for number, arguments in enumerate(chunks)}
    total = sum(len(arguments[0]) for arguments in chunks)
    with tqdm(total=total, unit=unit, desc=desc, disable=None) as bar:
        for number, result in in_processes(tasks, workers or available_cores()):
            results[number] = result
            bar.update(len(chunks[number][0]))
    return [results[number] for number in range(len(chunks))]


def _init_process() -> None:
    global _captures_stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # On Ctrl-C, the parent process ends the work.
    # On Linux, this process dies with its parent, even if the parent is killed.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    use_one_core(0)
    # A JPEG with damaged content still decodes. Only the line that libjpeg prints to stderr tells
    # of the damage, so send stderr to a file.
    descriptor, name = tempfile.mkstemp()
    os.unlink(name)
    os.dup2(descriptor, 2)
    _captures_stderr = True


_captures_stderr = False  # Whether this process keeps the lines that libjpeg and libpng print.


def decoder_complaint() -> str | None:
    """Return the first line that the decoders have printed since the last call, or None."""
    if not _captures_stderr or os.fstat(2).st_size == 0:
        return None
    text = os.pread(2, 2000, 0).decode(errors="replace").strip()
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    return text.splitlines()[0] if text else None


def default_workers() -> int:
    """Return the number of cores of this rank, at least 1 and at most 8."""
    from composer.utils import dist

    return min(8, max(1, available_cores() // dist.get_local_world_size()))
