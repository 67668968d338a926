"""Shared parts of the benchmarks: command line, tables, timing, memory and control of trainers."""

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
    """Return a parser with the option `--json`, described by the first line of a docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", help="also write the result to this file")
    return parser


def parse_switch(text: str) -> bool | str:
    """Return the value of an option that is true, false or another word, such as `--compile`."""
    return {"true": True, "false": False}.get(text.lower(), text)


def write_json(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Write a result to the file that `--json` names, if it names one."""
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


def row(*cells: object) -> str:
    """Return a row of a Markdown table."""
    texts = (f" {cell}".rstrip() for cell in cells)
    return f"|{''.join(f'{text} |' for text in texts)}"


def head(*names: object) -> str:
    """Return the first two lines of a Markdown table."""
    return f"{row(*names)}\n{'|---' * len(names)}|"


class Table:
    """A Markdown table that prints each row at once, so that an interrupted run keeps its rows.

    Args:
        *names: Names of the columns.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self.rows: list[tuple[Any, ...]] = []
        print(head(*names), flush=True)

    def add(self, *cells: Any) -> None:
        """Print a row."""
        self.rows.append(cells)
        print(row(*cells), flush=True)

    def result(self) -> dict[str, Any]:
        """Return the columns, the rows and the machine, for `write_json`."""
        return {"columns": self.names, "rows": self.rows, "machine": machine()}


def machine() -> dict[str, Any]:
    """Return the machine and the library versions that results depend on."""
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
    """Call the `main` of a command; return its status and the last line of its output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = main(list(arguments))
    lines = [line for line in output.getvalue().splitlines() if line.strip()]
    return status, lines[-1] if lines else ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings and logged warnings, so that only the tables are printed; also a decorator."""
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
    """Return the median seconds of a call, after a warm-up and with the GPU synchronized.

    Args:
        call: Function to time.
        threads: Number of CPU threads. If None, PyTorch's current number.
        min_run_time: Seconds for which the call is repeated. 0 measures one call.
    """
    timer = Timer("call()", globals={"call": call}, num_threads=threads or torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).median


def in_turn(
    measures: Mapping[str, Callable[[], float]], rounds: int, warm_up: bool = False
) -> dict[str, list[float]]:
    """Measure several sides in turn, so that disturbances of the machine affect all of them.

    Args:
        measures: Function of each side that measures it once.
        rounds: Number of values for each side.
        warm_up: Whether to discard the values of an additional first round.
    """
    found: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(warm_up + rounds):
        for name, measure in measures.items():
            value = measure()
            if number >= warm_up:
                found[name].append(value)
    return found


class PeakMemory:
    """A context that measures the peak memory of its block, beyond the memory in use before.

    Attributes:
        bytes: Allocated bytes on a GPU, resident bytes on a CPU. 0 where Linux's /proc is missing.
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
                file.write_text("5")  # Reset the peak to the resident memory.
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
    """A callback that records the end of each step, after Composer has waited for the device.

    Composer waits in order to log the loss.
    """

    def __init__(self) -> None:
        self.ends: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        self.ends.append(time.perf_counter())

    def mean(self, count: int) -> float:
        """Return the mean seconds of the last `count` steps."""
        return (self.ends[-1] - self.ends[-1 - count]) / count


def never_evaluate(trainer: Trainer) -> None:
    """Turn off the evaluation that Composer runs at the end of each `fit`."""
    for evaluator in trainer.state.evaluators:
        evaluator.eval_interval = lambda state, event: False


def release() -> None:
    """Free the memory of earlier trainers, which Composer keeps until the process ends."""
    atexit.unregister(Engine._close)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
