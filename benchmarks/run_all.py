"""Everything that is measured on a machine, in a given time; writes a dated file of results.

    python -m benchmarks.run_all --camvid camvid                   # within 9 minutes on an H100
    python -m benchmarks.run_all --minutes 60 --out benchmarks/results
    python -m benchmarks.run_all --only train_step

Each benchmark is a process of its own and one that fails or takes too long leaves the others
alone. CamVid comes last and takes the time that is left. The results are what each prints, in
`<date>-<device>.md`, and the numbers in `<date>-<device>.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
GPU_TESTS = ("test_losses.py", "test_transforms.py", "test_optimizer.py", "test_compile.py")


@dataclass
class Benchmark:
    """A module of this folder (or pytest), its arguments, and its share of the time in seconds."""

    name: str
    arguments: list[str]
    seconds: float


@dataclass
class Outcome:
    """What a benchmark printed, and wrote with --json."""

    name: str
    command: str
    seconds: float
    failure: str | None
    output: str
    result: Any


def plan(on_gpu: bool, camvid: str | None) -> list[Benchmark]:
    """What is run, the most important first, except for CamVid, which takes what is left."""
    benchmarks = [Benchmark("train_step", [], 270 if on_gpu else 1200)]
    if on_gpu:
        benchmarks += [
            Benchmark("loss", ["--batch", "16"], 45),
            Benchmark("auto_microbatch", [], 45),
            Benchmark("device_transform", ["--batch", "32"], 30),
        ]
    else:
        benchmarks += [
            Benchmark("loss", [], 300),
            Benchmark("device_transform", [], 300),
            Benchmark("dataloader", [], 300),
        ]
    if on_gpu:
        files = [f"tests/{name}" for name in GPU_TESTS]
        benchmarks.append(Benchmark("pytest", ["-q", "-k", "cuda or gpu or compile", *files], 60))
    if camvid:
        benchmarks.append(Benchmark("camvid", ["--path", camvid], 0))
    return benchmarks


def run(benchmark: Benchmark, limit: float, folder: Path) -> Outcome:
    """Run one for at most `limit` seconds."""
    json_path = folder / f"{benchmark.name}.json"
    module = benchmark.name if benchmark.name == "pytest" else f"benchmarks.{benchmark.name}"
    shown = ["python", "-m", module, *benchmark.arguments]
    command = [sys.executable, *shown[1:]]
    if benchmark.name != "pytest":
        command += ["--json", str(json_path)]
    failure = None
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(limit, 1)
        )
        output, errors = done.stdout, done.stderr
        if done.returncode:
            failure = f"failed with status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, errors = ((part or b"").decode() for part in (error.stdout, error.stderr))
        failure = f"took more than {limit:.0f} s"
    if failure:
        tail = "\n".join(errors.strip().splitlines()[-25:])
        output = f"{output}\n\n```\n{tail}\n```\n"
    result = json.loads(json_path.read_text()) if json_path.exists() else None
    seconds = time.perf_counter() - start
    return Outcome(benchmark.name, " ".join(shown), seconds, failure, output, result)


def run_all(benchmarks: list[Benchmark], minutes: float) -> list[Outcome]:
    """Run all within the time."""
    deadline = time.perf_counter() + 60 * minutes
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for benchmark in benchmarks:
            left = deadline - time.perf_counter()
            limit = min(left, benchmark.seconds) if benchmark.seconds else left
            if benchmark.name == "camvid":
                benchmark.arguments += ["--minutes", f"{camvid_minutes(left):.2f}"]
            print(f"{benchmark.name}: at most {limit:.0f} s", file=sys.stderr, flush=True)
            outcomes.append(run(benchmark, limit, Path(folder)))
    return outcomes


def camvid_minutes(left: float) -> float:
    """Of training for each of four recipes, in so many seconds, compilation set aside."""
    compilation, each = (90, 15) if torch.cuda.is_available() else (30, 30)
    return max(left - compilation - 4 * each, 40) / 60 / 4


def device_name() -> str:
    """The GPU's name, or the CPU's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    from benchmarks.dataloader import machine

    return machine()["cpu"]


def report(outcomes: list[Outcome], command: str) -> str:
    """The Markdown file."""
    gpu = f", {torch.cuda.device_count()} GPU" if torch.cuda.is_available() else ""
    lines = [
        f"# {device_name()}, {datetime.date.today()}",
        "",
        f"{os.cpu_count()} cores{gpu}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, {platform.platform()}. Made by `{command}` at "
        f"{commit()}; each table by the command above it.",
    ]
    for outcome in outcomes:
        took = outcome.failure or f"{outcome.seconds:.0f} s"
        lines += ["", f"## {outcome.name}", "", f"`{outcome.command}` ({took})", ""]
        lines.append(outcome.output.strip())
    return "\n".join(lines) + "\n"


def commit() -> str:
    """Git's name for this state of the code."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return "an unknown commit"
    return done.stdout.strip() or "an unknown commit"


def summary(outcomes: list[Outcome]) -> str:
    """A short table: what decides."""
    lines = []
    for outcome in outcomes:
        lines.append(f"{outcome.name}: {outcome.failure or f'{outcome.seconds:.0f} s'}")
        if outcome.name == "train_step" and outcome.result:
            for recipe, sides in outcome.result["recipes"].items():
                plain, ours = sides["plain"], sides["ours"]
                lines.append(
                    f"  {recipe:6} {ours['images_per_second']:7.1f} images/s, "
                    f"{ours['images_per_second'] / plain['images_per_second']:.2f} of plain, "
                    f"memory {ours['bytes'] / plain['bytes']:.2f} of plain"
                )
        if outcome.name == "camvid" and outcome.result:
            for recipe, found in outcome.result["recipes"].items():
                last = found["evaluations"][-1]
                lines.append(f"  {recipe:6} mIoU {last['miou']:.2f} in {last['minutes']:.2f} min")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="for all; default: 8.5 with a GPU, else 60")
    parser.add_argument("--camvid", help="CamVid in ADE20K's layout; default: leave it out")
    parser.add_argument("--only", nargs="+", help="run only these")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results"), help="a folder")
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    benchmarks = plan(on_gpu, args.camvid)
    unknown = set(args.only or ()) - {benchmark.name for benchmark in benchmarks}
    if unknown:
        parser.error(f"--only: not here: {', '.join(sorted(unknown))}")
    benchmarks = [b for b in benchmarks if not args.only or b.name in args.only]
    outcomes = run_all(benchmarks, args.minutes or (8.5 if on_gpu else 60))
    command = " ".join(["python -m benchmarks.run_all", *(argv or sys.argv[1:])])
    slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    path = Path(args.out) / f"{datetime.date.today()}-{slug}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report(outcomes, command))
    numbers = {outcome.name: outcome.result for outcome in outcomes}
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"{summary(outcomes)}{path}")
    return int(any(outcome.failure for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
