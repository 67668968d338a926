"""A training run for the soak test that restarts torchrun if it exits too early."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.support.resumed_runs import RECIPES

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
EVERY = 50  # Number of batches between two checkpoints.

# The test considers a run hung after this many seconds without a new batch. All injected faults are
# shorter.
HANGS_AFTER = 300.0
BATCH = re.compile(rb"\[metric\]\[batch=(\d+)\]: loss/train/total")


def network(num_classes: int) -> Any:
    """Build a small network with BatchNorm and dropout, whose state must be restored on resume."""
    from torch import nn

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(3, 16), *block(16, 64), nn.Dropout2d(0.1), nn.Conv2d(64, num_classes, 1)]
    return nn.Sequential(*layers)


def make_config(data: str, local: str, recipe: str, name: str, steps: int) -> dict[str, Any]:
    """Return the config of a run on remote shards, with a cache for only four of the shards."""
    dataset = {"is_streaming": True, "path": data, "base_size": 64, "final_size": 64}
    dataset |= {"batch_size": 8, "num_workers": 1, "cache_limit": "170kb"}
    ema = {"half_life": "20ba", "update_interval": "1ba"}
    duration = f"{steps}ba"
    return {
        "run_name": name,
        "recipe_name": None if recipe == "baseline" else recipe,
        "max_duration": duration,
        **{other: {"max_duration": duration, "ema": ema} for other in RECIPES[1:]},
        "model": {"name": f"{__name__}:{network.__name__}", "num_classes": 12},
        "train_dataset": {**dataset, "local": f"{local}/cache"},
        "eval_dataset": {**dataset, "local": f"{local}/cache"},
        "eval_interval": f"{3 * EVERY}ba",
        "save_folder": f"s3://data/runs/{name}",
        "save_interval": f"{EVERY}ba",
        "save_num_checkpoints_to_keep": 2,
        "optimizer": {"lr": 0.01},
        "precision": "fp32",
        "pictures": 1,
    }


class Run:
    """A training run that is monitored through the log file of rank 0.

    Args:
        folder: Folder for the config and the logs.
        config: Content of the YAML config.
        environment: Environment variables to set for the run.
        ranks: Number of training processes, or None for one process without torchrun.

    Attributes:
        newest: Highest batch number reached in any attempt.
        endings: For each attempt that ended, torchrun's exit status ("again" if torchrun restarted
            the processes itself), followed by the attempt's last message.
        gap: Longest time in seconds without a new batch since the last call of `watch`.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        environment: Mapping[str, str],
        ranks: int | None = RANKS,
    ):
        self.folder, self.ranks = folder, ranks
        self.environment = {**os.environ, **environment}
        folder.mkdir(parents=True)
        self.config = folder / "config.yaml"
        self.config.write_text(json.dumps(config))  # JSON is valid YAML.
        self.attempt = 0
        self.newest = -1
        self.moved = time.monotonic()  # Time at which the last new batch was seen.
        self.gap = 0.0
        self.endings: list[str] = []
        self.is_done = False
        # Session IDs of torchrun and the training processes, used to find orphaned processes.
        self.sessions: set[int] = set()

        self.start()

    def start(self) -> None:
        """Run the training command shown in the README."""
        self.attempt += 1
        # Process IDs of the training processes since torchrun last restarted them.
        self._trained: set[int] = set()
        # Number of output bytes that were already read after earlier restarts.
        self._read = 0
        self._output = self.folder / f"{self.attempt}.out"
        self.log = self.folder / f"{self.attempt}-rank0.txt"
        launcher = [str(Path(sys.executable).with_name("torchrun")), "--max-restarts=100"]
        launcher += [f"--nproc-per-node={self.ranks}", "--standalone"]
        command = launcher if self.ranks else [sys.executable]
        command += ["main.py", str(self.config), "autoresume=true"]
        logger = {"filename": str(self.folder / f"{self.attempt}-rank{{rank}}.txt")}
        logger |= {"capture_stdout": False, "capture_stderr": False, "log_traces": False}
        command.append(f"loggers={json.dumps({'file': logger})}")
        with open(self._output, "wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=self.environment,
                start_new_session=True,
            )
        self.launcher = psutil.Process(self.process.pid)
        self.sessions.add(self.process.pid)

    def batch(self) -> int:
        """Return the last batch number logged in this attempt, or -1 before the first batch."""
        with suppress(FileNotFoundError), open(self.log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
            found = BATCH.findall(file.read())
            return int(found[-1]) if found else -1
        return -1

    def processes(self) -> tuple[list[psutil.Process], list[psutil.Process]]:
        """Return the training processes and their data loader processes."""
        with suppress(psutil.NoSuchProcess):
            ranks = self.launcher.children() if self.ranks else [self.launcher]
            ranks.sort(key=lambda rank: rank.pid)
            return ranks, [loader for rank in ranks for loader in rank.children(recursive=True)]
        return [], []

    def tick(self) -> None:
        """Update the progress, and restart the command if it exited before the run was complete."""
        batch, now = self.batch(), time.monotonic()
        if batch > self.newest:
            self.newest, self.moved = batch, now
        self.gap = max(self.gap, now - self.moved)
        ranks = {rank.pid for rank in self.processes()[0]}
        self.sessions |= ranks
        if self.ranks and len(ranks) == self.ranks and not ranks & self._trained:
            if self._trained:
                self.endings.append(f"again: {self._last_words()}")
            self._trained = ranks
        status = self.process.poll()
        if status is None or self.is_done:
            return
        self.is_done = status == 0
        if not self.is_done:
            self.endings.append(f"{status}: {self._last_words()}")
            self.start()

    def _last_words(self) -> str:
        """Return an attempt's last error message, marked TRACEBACK if main.py crashed."""
        output = self._output.read_bytes()
        text = output[self._read :].decode(errors="replace")
        self._read = len(output)
        said = [line for line in text.splitlines() if line.startswith(("error: ", "stopped after"))]
        words = re.split(r" \(|;", said[0])[0] if said else "nothing was said"
        in_main = 'main.py", line' in text  # Ignore torchrun's own traceback.
        return f"TRACEBACK, {words}" if in_main else words

    def watch(self) -> None:
        """Reset `gap`, and start to measure it again."""
        self.gap, self.moved = 0.0, time.monotonic()

    def until(self, condition: Callable[[], bool], seconds: float = HANGS_AFTER) -> bool:
        """Monitor the run until a condition is true or the run is done.

        Args:
            condition: Function that returns whether to stop waiting.
            seconds: Maximum time in seconds without a new batch.

        Returns:
            Whether the condition became true.

        Raises:
            RuntimeError: No batch was finished within the maximum time.
        """
        end = time.monotonic() + seconds
        while not condition():
            self.tick()
            if self.is_done:
                return condition()
            if time.monotonic() > max(end, self.moved + seconds):
                tail = self._output.read_text(errors="replace")[-2000:]
                raise RuntimeError(
                    f"{self.config.parent}: the run has not finished a batch in "
                    f"{seconds:.0f} s; the end of its output is:\n{tail}"
                )
            time.sleep(0.05)
        return True

    def reach(self, batch: int) -> bool:
        """Monitor the run until it reaches a batch number; return False if it ends earlier."""
        return self.until(lambda: self.newest >= batch)

    def finish(self) -> None:
        """Monitor the run until it is done."""
        self.until(lambda: self.is_done)

    def wait(self, seconds: float) -> None:
        """Monitor the run for the given number of seconds."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > end, seconds + HANGS_AFTER)

    def left_over(self) -> list[int]:
        """Return the IDs of processes that are still running a minute after the run has ended."""
        end = time.monotonic() + 60
        while left := [p.pid for p in psutil.process_iter() if _session(p.pid) in self.sessions]:
            if time.monotonic() > end:
                break
            time.sleep(0.5)
        return left

    def end(self) -> None:
        """Kill the run if it is still running."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _session(pid: int) -> int:
    with suppress(ProcessLookupError):
        return os.getsid(pid)
    return -1
