"""Checks that a device computes correctly: loss, colours, mixed precision, resuming.

    python -m benchmarks.numerics                  # on a GPU if there is one, otherwise on the CPU
    python -m benchmarks.numerics --steps 200 --size 512 --batch 16

The benchmark prints the rows of four tables as they are measured. The exit status is 1 if a row
says DIFFER.

- The first table compares the loss and its gradient from the kernels of this machine with
  Composer's formula in fp64, on the same numbers. The gradient is scaled as in fp16 training.
- On a GPU, the second table compares images from the device part of the data pipeline with images
  from a CPU.
- The third table compares the losses of the same training in fp32 and in mixed precision. A
  repeated fp32 run shows the effect of the summation order, which a GPU may choose freely.
- The fourth table compares a `hot` run with `deterministic` and a run that resumes from its middle
  checkpoint. All losses and tensors must be the same to the last bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import main as program
from benchmarks import loss
from benchmarks.numbers import make_config
from benchmarks.studies.device_transform import make_batch
from benchmarks.train_step import never_evaluate, release
from extras.preparation.synthetic import make
from tests.support.resumed_runs import largest_difference
from training.config import resolve
from training.pictures import Curves
from transforms import DeviceTransform

CLASSES, STRIDE = 150, 4
# Relative tolerances of the loss and of the gradient's norm. The sums are in fp32, and the gradient
# is rounded to bf16 or fp16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SCALE = 2.0**16
LEVEL = 1 / 255 / 0.225  # The smallest step of an image, normalised.


def loss_errors(dtype: torch.dtype, target: str, side: str, size: int) -> tuple[float, float]:
    """Return the relative errors of the loss and, by its norm, of its gradient.

    Args:
        dtype: Type of the logits.
        target: "index" or "mixed".
        side: Side of `benchmarks.loss`: without weights, or with equal weights.
        size: Side of the target in pixels.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes: dict[str, Any] = {"batch": 2, "classes": CLASSES, "size": size, "stride": STRIDE}
    args = argparse.Namespace(**sizes, device=device, dtype=dtype)
    ours = loss.Case(side, target, args)
    args.dtype = torch.float64
    exact = loss.Case("Composer", target, args)
    exact.logits = ours.logits.detach().double().requires_grad_()
    found, value = ours.loss(), exact.loss()
    gradient, wanted = (
        torch.autograd.grad(SCALE * total, case.logits)[0]
        for total, case in ((found, ours), (value, exact))
    )
    error = (gradient.double() - wanted).norm() / wanted.norm()
    return abs(found.item() / value.item() - 1), error.item()


def loss_rows(size: int) -> Iterator[tuple[str, bool]]:
    """Yield the rows of the first table, and whether each row is correct."""
    yield "| logits | target | class weights | error of the loss | of its gradient |", True
    yield "|---|---|---|---|---|", True
    for dtype, tolerance in TOLERANCE.items():
        for target in loss.TARGETS:
            for side in loss.WEIGHTED:
                errors = loss_errors(dtype, target, side, size)
                holds = errors[0] < TOLERANCE[torch.float32] and errors[1] < tolerance
                name = str(dtype).removeprefix("torch.")
                cells = [name, target, "no" if side == loss.WEIGHTED[0] else "yes"]
                cells += [f"{error:.1e}" for error in errors]
                yield f"| {' | '.join(cells)}{'' if holds else ' DIFFER'} |", holds


def transform_rows(size: int) -> Iterator[tuple[str, bool]]:
    """Yield the rows of the second table: with the device's own operations, and compiled."""
    yield "| photos on the GPU | greatest difference from a CPU's | labels |", True
    yield "|---|---|---|", True
    photos, labels = make_batch(8, size, "cpu")
    transform = DeviceTransform(distort=True, seed=5)
    expected, classes = transform((photos, labels))
    for compiled in (False, True):
        if compiled:
            transform.compile()
        found, target = transform((photos.cuda(), labels.cuda()))
        apart = (found.cpu() - expected).abs().max().item()
        same = torch.equal(target.cpu(), classes)
        holds = same and apart < LEVEL
        cells = ["compiled" if compiled else "not compiled", f"{apart:.1e}"]
        cells.append("the same" if same else "differ")
        yield f"| {' | '.join(cells)}{'' if holds else ' DIFFER'} |", holds


def train(config: dict[str, Any], tf32: bool = True, **changes: Any) -> list[float]:
    """Train with a config and return the loss of each step.

    Args:
        config: Content of a YAML config.
        tf32: Whether a GPU may compute fp32 in TF32, as Composer allows.
        **changes: Changes of the config.
    """
    release()
    trainer = program.build_trainer(dataclasses.replace(resolve(config), **changes))
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    never_evaluate(trainer)  # Without evaluations, the evaluation pass is not compiled either.
    trainer.fit()
    trainer.close()
    (curves,) = (c for c in trainer.state.callbacks if isinstance(c, Curves))
    return [value for _, value, _ in curves.train]


def precision_rows(config: dict[str, Any], steps: int) -> Iterator[tuple[str, bool]]:
    """Yield the rows of the third table, with training in each precision."""
    shown = sorted({1, max(steps // 4, 1), max(steps // 2, 1), steps})
    heads = ["precision", *(f"loss {step}" for step in shown), "mean difference", "greatest"]
    yield f"| {' | '.join(heads)} |", True
    yield "|---" * len(heads) + "|", True
    on_gpu = torch.cuda.is_available()
    exactly = {"precision": "fp32", "tf32": False, "compile": False}
    runs: dict[str, dict[str, Any]] = {"fp32": exactly, "fp32, again": exactly}
    if on_gpu:
        runs["TF32"] = exactly | {"tf32": True}
    for precision in ("amp_bf16", "amp_fp16")[: 1 + on_gpu]:
        runs[precision] = {"precision": precision, "compile": False}
        if on_gpu:
            runs[f"{precision}, compiled"] = {"precision": precision, "compile": True}
    reference: list[float] = []
    for name, changes in runs.items():
        losses = train(config, save_folder=None, **changes)
        apart = [abs(a - b) for a, b in zip(losses, reference or losses, strict=True)]
        cells = [name, *(f"{losses[step - 1]:.4f}" for step in shown)]
        cells += [f"{sum(apart) / steps:.1e}", f"{max(apart):.1e}"] if reference else ["", ""]
        reference = reference or losses
        yield f"| {' | '.join(cells)} |", True


def resume_rows(config: dict[str, Any], steps: int, folder: str) -> Iterator[tuple[str, bool]]:
    """Yield the rows of the fourth table: resumed runs, not compiled and, on a GPU, compiled."""
    yield "| hot, deterministic | steps | losses | greatest difference of a tensor |", True
    yield "|---|---|---|---|", True
    for compiled in (False, True)[: 1 + torch.cuda.is_available()]:
        whole, resumed = (f"{folder}/{name}-{compiled}" for name in ("whole", "resumed"))
        same = {"precision": "auto", "compile": compiled, "deterministic": True}
        half = steps // 2
        keep = {"save_interval": f"{half}ba", "save_num_checkpoints_to_keep": -1}
        losses = train(config, save_folder=whole, **same, **keep)
        (middle,) = Path(whole).glob(f"*-ba{half}-rank0.pt")
        again = train(config, save_folder=resumed, load_path=str(middle), **same)
        apart = largest_difference(resumed, whole)
        holds = losses == again and apart == 0
        cells = ["compiled" if compiled else "not compiled", f"{steps}, from {half} on again"]
        cells += ["the same" if losses == again else "differ", f"{apart}"]
        yield f"| {' | '.join(cells)}{'' if holds else ' DIFFER'} |", holds


def main(argv: list[str] | None = None) -> int:
    """Print the tables; return 1 if a row says DIFFER."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=50 if on_gpu else 20, help="of a loss curve")
    add("--resumed-steps", type=int, default=12, help="of the run that goes on")
    add("--size", type=int, default=256 if on_gpu else 64, help="pixels")
    add("--batch", type=int, default=8 if on_gpu else 4, help="images a step")
    args = parser.parse_args(argv)
    # The variable must be set before CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    warnings.simplefilter("ignore")
    logging.getLogger("composer").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        make(f"{folder}/data/folders", training=8 * args.batch, validation=2, size=args.size)

        def config(recipe: str, steps: int) -> dict[str, Any]:
            found = make_config(f"{folder}/data", folder, recipe, args.size, steps)
            for section in ("train_dataset", "eval_dataset"):
                found[section]["batch_size"] = args.batch
            return found | {"device_train_microbatch_size": args.batch}

        tables = (
            loss_rows(args.size),
            *([transform_rows(args.size)] * on_gpu),
            precision_rows(config("baseline", args.steps), args.steps),
            resume_rows(config("hot", args.resumed_steps), args.resumed_steps, folder),
        )
        whole = True
        for rows in tables:
            for row, holds in rows:
                # Print at once, so that an interrupted run keeps its first rows.
                print(row, flush=True)
                whole &= holds
            print()
    return int(not whole)


if __name__ == "__main__":
    sys.exit(main())
