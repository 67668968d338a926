"""Benchmark utilities: command line, tables, timing, memory measurement and trainer control."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import io
import json
import logging
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import PIL
import torch
import torch.version
from composer import Callback, Trainer
from composer.core import Engine, State
from composer.loggers import Logger
from torch.utils.benchmark import Timer


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option `--json`, described by the first line of `doc`."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", help="also write the result to this file")
    return parser


def parse_switch(text: str) -> bool | str:
    """Convert "true" and "false" to Booleans, and return any other text unchanged."""
    return {"true": True, "false": False}.get(text.lower(), text)


def write_json(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Write the result as JSON if the user passed `--json FILE`."""
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


def row(*cells: object) -> str:
    """Return the cells as a row of a Markdown table."""
    texts = (f" {cell}".rstrip() for cell in cells)
    return f"|{''.join(f'{text} |' for text in texts)}"


def head(*names: object) -> str:
    """Return the header row and the separator row of a Markdown table."""
    return f"{row(*names)}\n{'|---' * len(names)}|"


class Table:
    """A Markdown table that prints each row immediately, so that an interruption loses nothing.

    Args:
        *names: Column headings.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self.rows: list[tuple[Any, ...]] = []
        print(head(*names), flush=True)

    def add(self, *cells: Any) -> None:
        """Store a row and print it."""
        self.rows.append(cells)
        print(row(*cells), flush=True)

    def result(self) -> dict[str, Any]:
        """Return the table and a description of the machine, as `write_json` expects them."""
        return {"columns": self.names, "rows": self.rows, "machine": machine()}


def machine() -> dict[str, Any]:
    """Return a description of the hardware and the versions of the relevant libraries."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (line := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        cpu = line[1]
    found: dict[str, Any] = {"cpu": cpu, "cores": os.cpu_count()}
    found |= {"threads": torch.get_num_threads(), "python": platform.python_version()}
    found |= {"torch": torch.__version__, "platform": platform.platform()}
    found |= {"opencv": cv2.__version__, "pillow": PIL.__version__}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def run_command(main: Callable[[list[str]], int], *arguments: str) -> tuple[int, str]:
    """Call a command's `main`; return its exit status and the last line of its output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = main(list(arguments))
    lines = [line for line in output.getvalue().splitlines() if line.strip()]
    return status, lines[-1] if lines else ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide Python warnings and logged warnings, in a `with` block or a decorated function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def seconds_of(
    call: Callable[[], Any], threads: int | None = None, min_run_time: float = 0.0
) -> float:
    """Return the median time of a function call in seconds, after a warm-up.

    The timer waits until the GPU has finished its work before it reads the clock.

    Args:
        call: Function to time.
        threads: Number of CPU threads; by default PyTorch's current number of threads.
        min_run_time: Minimum total time of the repeated calls, in seconds, or 0 for a single call.
    """
    timer = Timer("call()", globals={"call": call}, num_threads=threads or torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).median


def in_turn(
    measures: Mapping[str, Callable[[], float]], rounds: int, warm_up: bool = False
) -> dict[str, list[float]]:
    """Measure several contenders in turn, so that load on the machine affects them equally.

    Args:
        measures: For each contender, a function that takes one measurement.
        rounds: Number of measurements per contender.
        warm_up: Whether to run one more round at the start and discard its measurements.

    Returns:
        The measurements of each contender.
    """
    found: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(warm_up + rounds):
        for name, measure in measures.items():
            value = measure()
            if number >= warm_up:
                found[name].append(value)
    return found


class PeakMemory:
    """A context manager that measures how much its block raises the peak memory.

    Args:
        on_gpu: Whether to measure memory allocated on the GPU instead of the resident memory of the
            process.

    Attributes:
        bytes: Increase of the peak memory in bytes, or 0 on a CPU if Linux's /proc is missing.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            file = Path("/proc/self/clear_refs")
            if file.exists():
                # Writing 5 to `clear_refs` resets the recorded peak to the current resident memory.
                file.write_text("5")
            self._before = self._peak()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = self._peak() - self._before

    def _peak(self) -> int:
        if self.on_gpu:
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status")
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
        return 1024 * int(found[1]) if found else 0


class Steps(Callback):
    """A callback that records the time at which each training step ends.

    The recorded times include the work on the GPU, because Composer waits for the GPU to log the
    loss.
    """

    def __init__(self) -> None:
        self.ends: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        self.ends.append(time.perf_counter())

    def mean(self, count: int) -> float:
        """Return the mean time per step, in seconds, over the last `count` steps."""
        return (self.ends[-1] - self.ends[-1 - count]) / count


def never_evaluate(trainer: Trainer) -> None:
    """Disable the evaluation that Composer runs at the end of each `fit`."""
    for evaluator in trainer.state.evaluators:
        evaluator.eval_interval = lambda state, event: False


def release() -> None:
    """Free the memory of previous trainers, which Composer would keep until the process exits."""
    atexit.unregister(Engine._close)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
