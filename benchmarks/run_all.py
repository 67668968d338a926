"""Run all benchmarks within a time limit, and save the results to a dated file.

    python -m benchmarks.run_all --camvid ./camvid    # takes 10 minutes on a GPU, 20 on a CPU
    python -m benchmarks.run_all --only train_step loss --minutes 60

Each benchmark runs in a separate process. If a benchmark fails or takes too long, its output so far
is kept and the other benchmarks still run. On a CPU, the benchmarks use smaller problem sizes. The
CamVid benchmark runs last and uses the remaining time.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import machine
from benchmarks.train_step import RECIPES
from training.precision import choose_precision

ROOT = Path(__file__).resolve().parent.parent


class Benchmark(NamedTuple):
    """A benchmark module and its settings.

    Attributes:
        module: Name of the module to run.
        arguments: Command-line arguments.
        seconds: Maximum run time in seconds under the default time limit, or None for no maximum.
    """

    module: str
    arguments: str = ""
    seconds: float | None = None


class Outcome(NamedTuple):
    """The result of a benchmark.

    Attributes:
        command: Command line of the benchmark.
        output: Captured stdout.
        seconds: Run time in seconds.
        failure: Reason why the benchmark failed or was stopped, or None if it finished.
    """

    command: str
    output: str
    seconds: float
    failure: str | None


GPU = [
    Benchmark("benchmarks.train_step", "--rounds 2 --warmup 3", 270),
    Benchmark("benchmarks.numerics", seconds=100),
    Benchmark("benchmarks.loss", "--batch 16", 80),
    Benchmark("benchmarks.studies.auto_microbatch", seconds=60),
    Benchmark("benchmarks.studies.device_transform", "--batch 32", 30),
]
SMALL = "--size 64 --steps 2 --warmup 1"
CPU = [
    Benchmark("benchmarks.train_step", SMALL, 270),
    Benchmark("benchmarks.train_step", f"{SMALL} --precision fp32", 270),
    Benchmark("benchmarks.numerics", "--steps 10 --resumed-steps 4", 270),
    Benchmark("benchmarks.loss", "--batch 1 --repeats 3 --threads 1", 100),
    Benchmark("benchmarks.studies.device_transform", seconds=60),
    Benchmark("benchmarks.dataloader", "--images 160 --repeats 3", 60),
]
# Run CamVid without torch.compile, because compiling would take half of the run time.
CAMVID = "--path {path} --minutes {minutes:.2f} --evaluations 3 --compile false"
CAMVID_SMALL = " --size 64 --batch 4 --probe 4"
# Start-up time of the CamVid benchmark on a GPU and on a CPU, in seconds. Each recipe adds the same
# amount of time again.
OVERHEAD, OVERHEAD_SMALL = 15, 40


def plan(on_gpu: bool) -> list[Benchmark]:
    """Return all benchmarks except CamVid, in order of importance."""
    if on_gpu:
        return GPU
    # Without bf16, `train_step` always runs in fp32, so skip its separate fp32 run.
    if choose_precision("auto")[1] is None:
        return [CPU[0]._replace(seconds=480), *CPU[2:]]
    return CPU


def usual_minutes() -> float:
    """Return the default time limit for all benchmarks, in minutes."""
    return 9.5 if torch.cuda.is_available() else 20


def camvid(path: str, seconds: float, on_gpu: bool) -> Benchmark:
    """Return the CamVid benchmark, set up to train all recipes within the given time."""
    overhead = OVERHEAD if on_gpu else OVERHEAD_SMALL
    minutes = max((seconds - overhead) / len(RECIPES) - overhead, 10) / 60
    arguments = CAMVID.format(path=shlex.quote(path), minutes=minutes)
    return Benchmark("benchmarks.studies.camvid", arguments + CAMVID_SMALL * (not on_gpu))


def run(benchmark: Benchmark, limit: float) -> Outcome:
    """Run a benchmark for at most `limit` seconds."""
    shown = ["python", "-m", benchmark.module, *shlex.split(benchmark.arguments)]
    start = time.perf_counter()
    # Start the benchmark in a new session, so that a timeout also kills its child processes.
    with subprocess.Popen(
        [sys.executable, *shown[1:]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit)
            last = errors.strip().splitlines()[-1:]
            failure = " ".join([f"failed with status {process.returncode}:", *last])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            failure = f"stopped after {limit:.0f} s"
    seconds = time.perf_counter() - start
    return Outcome(shlex.join(shown), output, seconds, failure if process.returncode else None)


def run_all(benchmarks: list[Benchmark], minutes: float, path: str | None) -> Iterator[Outcome]:
    """Run all benchmarks within a time limit in minutes; run CamVid last if `path` is set."""
    deadline = time.perf_counter() + 60 * minutes
    longer = max(minutes / usual_minutes(), 1)
    for benchmark in [*benchmarks, *([None] if path else [])]:
        left = max(deadline - time.perf_counter(), 1)
        if benchmark is None:
            assert path is not None
            benchmark = camvid(path, left, torch.cuda.is_available())
        print(f"{benchmark.module} {benchmark.arguments}", file=sys.stderr, flush=True)
        yield run(benchmark, min(left, longer * (benchmark.seconds or left)))


def report(outcomes: list[Outcome], about: dict[str, Any], load: float) -> str:
    """Return a Markdown report of the results and the machine."""
    gpu = f"{about['gpu']}, CUDA {about['cuda']}; " if "gpu" in about else ""
    lines = [
        f"# {about.get('gpu', about['cpu'])}, {datetime.date.today()}",
        "",
        f"{gpu}{about['cpu']}, {about['cores']} cores, {about['threads']} threads; Python "
        f"{about['python']}, torch {about['torch']}, {about['platform']}; load average {load:.1f} "
        f"before the first; commit {about['commit']}.",
    ]
    for outcome in outcomes:
        took = f"{outcome.seconds:.0f} s" + (f"; {outcome.failure}" if outcome.failure else "")
        lines += ["", f"## `{outcome.command}`", "", f"({took})", "", outcome.output.strip()]
    return "\n".join(lines) + "\n"


def commit() -> str:
    """Return the name that `git describe` gives the commit, or "unknown"."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def main(argv: list[str] | None = None) -> int:
    """Run the selected benchmarks; return 1 if any of them failed or was stopped."""
    on_gpu = torch.cuda.is_available()
    names = sorted({benchmark.module.removeprefix("benchmarks.") for benchmark in plan(on_gpu)})
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=usual_minutes(), help="limit for all")
    parser.add_argument("--camvid", help="CamVid in ADE20K's layout; default: leave it out")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="except CamVid")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder")
    args = parser.parse_args(argv)
    load = os.getloadavg()[0]
    path = args.camvid and str(Path(args.camvid).resolve())
    chosen = [b for b in plan(on_gpu) if b.module.removeprefix("benchmarks.") in args.only]
    # Determine the commit before writing the result file, because the file changes the working
    # tree.
    about = machine() | {"commit": commit()}
    device = re.sub(r"[^a-z0-9]+", "-", about.get("gpu", about["cpu"]).lower()).strip("-")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{datetime.date.today()}-{device}.md"
    outcomes = []
    for outcome in run_all(chosen, args.minutes, path):
        outcomes.append(outcome)
        text = report(outcomes, about, load)
        file.write_text(text.replace(path, "camvid") if path else text)
    print(f"{file.read_text()}\n{file}")
    return int(any(outcome.failure for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
