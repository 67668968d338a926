"""Check this machine's GPU before a long run: correctness first, then speed.

    python -m benchmarks.gpu_check                 # takes five minutes, like `make gpu-check`
    python -m benchmarks.gpu_check --device cpu    # uses small sizes and takes two minutes

Each row of the first table compares a result with a reference:

- The loss and its gradient are compared with Composer's formula in fp64.
- The losses of a mixed-precision training run are compared with those of the same run in fp32.
- A run that resumes from its middle checkpoint is compared with an uninterrupted run.
- An evaluation of a checkpoint on the GPU is compared with the same evaluation on the CPU.
- An ONNX export on the GPU is compared with PyTorch on the CPU, if onnxruntime can use the GPU.

The second table shows the speed and memory of a compiled training step. If `main.py --plan`
supports the GPU, the table also shows the predicted speed and memory. The measured speed does not
affect the verdict.

The last line of the output is `verdict: passed`, or `verdict: failed` with the names of the failed
rows. The last line also lists the rows that were left out. The exit status is 1 if a row failed and
0 otherwise. `benchmarks.numerics` also tests compiled runs and more data types.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import export
from benchmarks import harness, loss, numerics, train_step
from command_lines import parse_evaluate
from data import open_dataset
from errors import one_line
from evaluate import data_source, evaluate_paper
from predict import segmenter_from
from training.precision import choose_precision


class Sizes(NamedTuple):
    """The sizes of images and batches in all measurements; command-line options can change them.

    Attributes:
        check_size: Image size in pixels for the correctness checks.
        check_batch: Number of images per step in the correctness checks.
        check_steps: Number of training steps for the comparison of mixed precision with fp32.
        resumed_steps: Number of training steps of the run that is resumed halfway.
        arch: Backbone for the speed measurement.
        size: Image size in pixels for the speed measurement.
        batch: Number of images per step for the speed measurement, halved if memory runs out.
        timed_steps: Number of training steps over which the time is averaged.
    """

    check_size: int = 256
    check_batch: int = 8
    check_steps: int = 30
    resumed_steps: int = 8
    arch: str = "resnet101"
    size: int = 512
    batch: int = 16
    timed_steps: int = 10


ON_CPU = Sizes(32, 4, 30, 4, "resnet50", 64, 4, 2)
# Maps the name of each table row to the recipe that `benchmarks.train_step` runs for it.
RECIPES = {"baseline": "none", "medium": "medium"}
GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")

# Maximum allowed difference between the losses in mixed precision and in fp32, relative to the fp32
# loss and averaged over all steps.
CURVE = 0.05

# Maximum allowed fraction of pixels that the GPU and the CPU classify differently. A small fraction
# is expected, because a GPU adds numbers in a different order.
PIXELS = 1e-3


class Outcome(NamedTuple):
    """The result of one check.

    Attributes:
        cells: Cells of the table row.
        holds: Whether the result is correct, or None if the row was left out.
    """

    cells: tuple[str, ...]
    holds: bool | None


# Rows of a table. Each row has a name and a function that measures its values.
Rows = Iterator[tuple[str, Callable[[], Outcome]]]


def loss_row(dtype: torch.dtype, side: str, size: int) -> Outcome:
    """Compare the loss for both target types with an fp64 reference; report the larger error."""
    errors = [numerics.loss_errors(dtype, target, side, size) for target in loss.TARGETS]
    worst = [max(pair) for pair in zip(*errors, strict=True)]
    limits = numerics.TOLERANCE[torch.float32], numerics.TOLERANCE[dtype]
    # If an error is NaN, the comparison is False, so the check fails.
    holds = all(error < limit for error, limit in zip(worst, limits, strict=True))
    return Outcome((_pair(worst), _pair(limits)), holds)


def _pair(errors: Sequence[float]) -> str:
    return f"loss {errors[0]:.0e}, gradient {errors[1]:.0e}"


def precision_row(config: dict[str, Any], precision: str) -> Outcome:
    """Compare the losses of a mixed-precision run with those of an fp32 run."""
    expected = numerics.train(config, save_folder=None, **numerics.EXACTLY)
    found = numerics.train(config, save_folder=None, precision=precision, compile=False)
    apart = [abs(a / b - 1) for a, b in zip(found, expected, strict=True)]
    mean = math.fsum(apart) / len(apart)
    cells = f"losses differ by {mean:.2%}", f"{CURVE:.0%} on average"
    return Outcome(cells, mean < CURVE)


def resume_row(config: dict[str, Any], steps: int, folder: str) -> Outcome:
    """Compare a resumed run with an uninterrupted run."""
    same, difference = numerics.resume(config, steps, folder)
    losses = f"losses {'the same' if same else 'differ'}, tensors differ by {difference:g}"
    return Outcome((losses, "the same, 0"), same and difference == 0)


def confusion(model: str, device: str) -> Tensor:
    """Return the confusion matrix that `evaluate.py` computes for a model on the given device."""
    options = parse_evaluate([model, "--device", device])
    segmenter = segmenter_from(options)
    source, _ = data_source(options, segmenter)
    index = torch.from_numpy(source.labels.index())
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with contextlib.redirect_stderr(io.StringIO()):  # Hide the progress bar.
        return evaluate_paper(segmenter, open_dataset(source), index, batch_size=4).cpu()


def evaluation_row(model: str, checkpoint: str, device: str) -> Outcome:
    """Compare a model's evaluation on the device with its checkpoint's evaluation on the CPU."""
    expected, found = confusion(checkpoint, "cpu"), confusion(model, device)
    share = float((found - expected).abs().sum()) / 2 / float(expected.sum())
    return Outcome((f"{share:.3%} of the pixels differ", f"{PIXELS:.1%}"), share < PIXELS)


def onnx_row(checkpoint: str, folder: str, device: str) -> Outcome:
    """Compare an ONNX export's evaluation with its checkpoint's evaluation on the CPU."""
    if not all(importlib.util.find_spec(name) for name in export.ONNX):
        return Outcome(("make install WITH=onnx", ""), None)
    import onnxruntime

    path = f"{folder}/model.onnx"
    status, line = harness.run_command(export.main, checkpoint, "--to", "onnx", "--out", path)
    if status:
        raise RuntimeError(line)
    # Check which execution providers the session actually uses, because `get_available_providers`
    # also lists providers whose libraries are missing.
    session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
    if device == "cuda" and not set(GPU_PROVIDERS) & set(session.get_providers()):
        return Outcome(("onnxruntime cannot use the GPU; pip install onnxruntime-gpu", ""), None)
    return evaluation_row(path, checkpoint, device)


def checks(sizes: Sizes, device: str, folder: str, config: Callable[..., dict[str, Any]]) -> Rows:
    """Yield the name of each row in the correctness table, and the function that measures the row.

    Args:
        sizes: Sizes of the measurements.
        device: Device to test, "cuda" or "cpu".
        folder: Folder for the checkpoints and exports of the checks.
        config: Function from `numerics.made_config` that returns the config of a run.
    """
    plain, weighted = loss.WEIGHTED
    for dtype in numerics.TOLERANCE:
        name = f"loss in {str(dtype).removeprefix('torch.')}, beside fp64"
        yield name, functools.partial(loss_row, dtype, plain, sizes.check_size)
    name = "loss with class weights, beside fp64"
    yield name, functools.partial(loss_row, torch.bfloat16, weighted, sizes.check_size)

    steps, resumed = sizes.check_steps, sizes.resumed_steps
    precision = choose_precision("auto")[0] if device == "cuda" else "amp_bf16"
    name = f"{steps} steps in {precision}, beside fp32"
    yield name, functools.partial(precision_row, config("baseline", steps), precision)
    name = f"{resumed} steps, resumed after {resumed // 2}"
    yield name, functools.partial(resume_row, config("hot", resumed), resumed, folder)

    checkpoint = f"{folder}/whole/latest-rank0.pt"
    name = "evaluation, beside the CPU's"
    yield name, functools.partial(evaluation_row, checkpoint, checkpoint, device)
    yield "ONNX, beside PyTorch", functools.partial(onnx_row, checkpoint, folder, device)


def measure_step(args: argparse.Namespace, recipe: str) -> tuple[float, int, bool]:
    """Return the seconds per step, the peak memory in bytes, and whether all losses are finite."""
    harness.release()
    with harness.PeakMemory(torch.cuda.is_available()) as peak:
        contender = train_step.Contender(args, "ours", recipe)
        contender.fit(args.warmup)
        seconds = contender.time()
    losses = contender.trainer.state.total_loss_dict.values()
    contender.trainer.close()
    return seconds, peak.bytes, all(math.isfinite(float(value)) for value in losses)


def step_row(args: argparse.Namespace, recipe: str, gpu: str | None) -> Outcome:
    """Measure a recipe's training step, and compare its speed and memory with the estimates.

    Args:
        args: Arguments of `benchmarks.train_step`; `batch` is halved if memory runs out.
        recipe: Name of a recipe in `benchmarks.train_step`.
        gpu: Name of the GPU in `extras.planning.estimate`, or None if it is not listed there.
    """
    measured = None
    while measured is None:
        try:
            measured = measure_step(args, recipe)
        except torch.OutOfMemoryError:
            if args.batch <= 2:  # In training, BatchNorm needs at least two images.
                raise
            args.batch //= 2
    seconds, most, finite = measured
    planned = train_step.estimates(args, gpu, choose_precision("auto")[0])[recipe]
    rate = planned.get("images_per_second")
    rates = f"{args.batch / seconds:.1f}", f"{rate:.1f}" if rate else "unknown"
    # Do not report memory on a CPU. A new trainer reuses memory that earlier trainers have freed,
    # so the measured peak would be too low.
    memory = f"{most / 2**30:.2f} GiB" if torch.cuda.is_available() else "not measured"
    estimate = f"{planned['bytes'] / 2**30:.2f} GiB"
    return Outcome((str(args.batch), *rates, memory, estimate), finite)


def steps(sizes: Sizes, gpu: str | None, folder: str) -> Rows:
    """Yield the name of each row in the speed table, and the function that measures the row.

    Args:
        sizes: Sizes of the measurements.
        gpu: Name of the GPU in `extras.planning.estimate`, or None if it is not listed there.
        folder: Folder for the generated images.
    """
    args = train_step.arguments(["--recipes", *RECIPES.values()])
    args.arch, args.size, args.batch = sizes.arch, sizes.size, sizes.batch
    args.path, args.steps, args.warmup = folder, sizes.timed_steps, train_step.CYCLE
    images = args.batch * (args.warmup + args.steps + 2)
    train_step.make_images(Path(folder), images, args.batch)
    for name, recipe in RECIPES.items():
        yield name, functools.partial(step_row, args, recipe, gpu)


def fill(table: harness.Table, rows: Rows, deadline: float) -> None:
    """Measure and print each table row; skip rows that would start after the deadline."""
    words = {True: "ok", False: "FAILED", None: "left out"}
    for name, measure in rows:
        try:
            in_time = time.monotonic() < deadline
            cells, holds = measure() if in_time else Outcome(("out of time; --minutes 15",), None)
        # If measuring a row fails, continue with the next row.
        except Exception as error:
            cells, holds = (one_line(error)[:300],), False
        empty = [""] * (len(table.names) - len(cells) - 2)
        table.add(name, *cells, *empty, words[holds])


def verdict(rows: Sequence[Sequence[str]]) -> str:
    """Return "passed" or "failed", and the names of rows that failed or were left out."""
    names = {word: [row[0] for row in rows if row[-1] == word] for word in ("FAILED", "left out")}
    text = f"failed: {'; '.join(names['FAILED'])}" if names["FAILED"] else "passed"
    return f"{text} (left out: {'; '.join(names['left out'])})" if names["left out"] else text


@harness.quiet()
def main(argv: list[str] | None = None) -> int:
    """Print the tables and the verdict, and return 1 if a row failed."""
    parser = harness.make_parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if available")
    parser.add_argument("--minutes", type=float, default=5, help="time limit for starting rows")
    for field, default in Sizes()._asdict().items():
        option = f"--{field.replace('_', '-')}"
        parser.add_argument(
            option, type=type(default), help=f"{default}; on a CPU {getattr(ON_CPU, field)}"
        )
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    # Restart in a new process, in which PyTorch cannot see the GPU.
    if args.device == "cpu" and on_gpu:
        command = [sys.executable, "-m", "benchmarks.gpu_check", *(argv or sys.argv[1:])]
        return subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}).returncode
    given = {name: value for name in Sizes._fields if (value := getattr(args, name)) is not None}
    sizes = (Sizes() if on_gpu else ON_CPU)._replace(**given)
    # Set CUBLAS_WORKSPACE_CONFIG before CUDA is initialised, because deterministic cuBLAS
    # operations need it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    deadline = time.monotonic() + 60 * args.minutes

    about = harness.machine()
    print(
        f"{about['gpu']}, torch {about['torch']}, CUDA {about['cuda']}\n"
        if on_gpu
        else f"No GPU is used: a stand-in at small sizes on {about['cpu']}\n"
    )

    # Run the correctness checks first, then measure the speed.
    correctness = harness.Table("check", "measured", "limit", "result")
    with numerics.made_config(sizes.check_size, sizes.check_batch) as (folder, config):
        fill(correctness, checks(sizes, "cuda" if on_gpu else "cpu", folder, config), deadline)
    compiled = ", compiled" if on_gpu else ""
    print(f"\n{sizes.arch}, {sizes.size} px{compiled}; planned as in main.py --plan\n")
    columns = "training step", "batch", "images/s", "planned", "peak memory", "planned"
    speed = harness.Table(*columns, "result")
    gpu = train_step.data_sheet(about["gpu"]) if on_gpu else None
    with tempfile.TemporaryDirectory() as folder:
        fill(speed, steps(sizes, gpu, folder), deadline)
    harness.release()

    result = verdict([*correctness.rows, *speed.rows])
    tables = {"correctness": correctness.result(), "speed": speed.result()}
    harness.write_json(args, {"verdict": result, **tables})
    print(f"\nverdict: {result}")
    return int(result.startswith("failed"))


if __name__ == "__main__":
    sys.exit(main())
