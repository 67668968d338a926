"""A test of `device_train_microbatch_size: auto` with a batch that does not fit on a GPU.

    python -m benchmarks.studies.auto_microbatch --batch 128 --memory 40     # limit: 40 GiB

The benchmark trains for three steps with main.py's trainer. The search for the micro-batch size
starts with the full batch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger

import main as program
from benchmarks.harness import Steps, machine, make_parser, never_evaluate, quiet, write_json
from benchmarks.train_step import arguments as step_arguments
from benchmarks.train_step import config, make_images
from training.precision import compiles


class PeakOfLaterSteps(Callback):
    """A callback that excludes the first step, which tests several sizes, from the peak memory."""

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == 1:
            torch.cuda.reset_peak_memory_stats()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the chosen micro-batch size, the step times and the peak memory."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory * 2**30 / total))
    step = step_arguments(["--arch", args.arch, "--size", str(args.size)])
    step.batch, step.compile = args.batch, args.compile
    with tempfile.TemporaryDirectory() as folder:
        step.path = folder
        make_images(Path(folder), 4 * args.batch, args.batch)
        settings = config(step, "none")
        settings.device_train_microbatch_size = "auto"
        steps = Steps()
        trainer = program.build_trainer(settings, callbacks=[steps, PeakOfLaterSteps()])
        never_evaluate(trainer)
        start = time.perf_counter()
        trainer.fit(duration="3ba")
    result = {
        "batch": args.batch,
        "memory": args.memory,
        "compile": compiles(settings),
        "microbatch": trainer.state.device_train_microbatch_size,
        "first_step": steps.ends[0] - start,
        "step": steps.mean(1),
        "bytes": torch.cuda.max_memory_allocated(),
        "machine": machine(),
    }
    trainer.close()
    return result


@quiet()
def main(argv: list[str] | None = None) -> None:
    """Measure and print the result for the command-line arguments."""
    parser = make_parser(__doc__)
    parser.add_argument("--arch", default="resnet101")
    parser.add_argument("--size", type=int, default=512, help="image size in pixels")
    parser.add_argument("--batch", type=int, default=128, help="number of images per step")
    parser.add_argument("--memory", type=float, default=40, help="memory limit in GiB")
    parser.add_argument("--compile", action="store_true", help="compile the network for every size")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("error: this benchmark needs a GPU; on a CPU, auto is the complete batch")
    result = measure(args)
    print(
        f"batch {args.batch} in {args.memory:g} GiB: {result['microbatch']} images at a time, "
        f"{result['bytes'] / 2**30:.1f} GiB; first step {result['first_step']:.1f} s, "
        f"then {result['step']:.2f} s"
    )
    write_json(args, result)


if __name__ == "__main__":
    main()
