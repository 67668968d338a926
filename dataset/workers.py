"""Processes that load or check samples: one core each, and ended with their parent."""

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
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's microseconds of CPU time per period
CHUNK = 64  # samples that a process takes at a time


def available_cores(quota: Path = QUOTA) -> int:
    """Return the number of cores that this process may use; a container's share is rounded up."""
    if hasattr(os, "sched_getaffinity"):  # Linux; macOS has no such limit
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        limit, period = quota.read_text().split()
        return min(cores, math.ceil(int(limit) / int(period)))
    except (OSError, ValueError):  # no such file, or "max" for no limit
        return cores


def use_one_core(worker: int) -> None:
    """In a loader process: leave the other cores to the other processes."""
    # Imported here, so that a command can ask for the cores before it imports them.
    import cv2
    import torch

    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def in_processes(tasks: Mapping[Tag, tuple], workers: int) -> Iterator[tuple[Tag, Any]]:
    """Run tasks in processes; give up the rest when interrupted.

    Args:
        tasks: A function and its arguments, by whatever tells the tasks apart.
        workers: How many processes.

    Yields:
        Each task's tag and what its function returned, as they come.

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
                "a process died, of want of memory perhaps: try fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)  # waits for what is being done


def chunked(samples: Sequence[Any]) -> Iterator[Any]:
    """Yield the samples in parts of `CHUNK`."""
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
        function: Takes a chunk and what else its tuple holds.
        chunks: Tuples of arguments, of which the first is as long as it has samples.
        workers: Number of processes; None: one for each core.
        desc: What the progress bar says.
        unit: What it counts.

    Returns:
        What the function returned, in the order of the chunks.

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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the work
    if sys.platform == "linux":  # not to outlive a parent that is killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    use_one_core(0)
    # A JPEG with damage inside decodes: all there is to know of it is libjpeg's line on stderr.
    descriptor, name = tempfile.mkstemp()
    os.unlink(name)
    os.dup2(descriptor, 2)
    _captures_stderr = True


_captures_stderr = False  # whether this process keeps what libjpeg and libpng print


def decoder_complaint() -> str | None:
    """Return the first line that the decoders printed since the last call."""
    if not _captures_stderr or os.fstat(2).st_size == 0:
        return None
    text = os.pread(2, 2000, 0).decode(errors="replace").strip()
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    return text.splitlines()[0] if text else None
