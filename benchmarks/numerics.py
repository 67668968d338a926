"""Check a device's results for the loss, colours, mixed precision and resuming.

    python -m benchmarks.numerics                  # uses a GPU if one is available
    python -m benchmarks.numerics --steps 200 --size 512 --batch 16

The benchmark prints four tables. The exit status is 1 if a row contains DIFFER.

- The first table compares the loss and its gradient with Composer's formula in fp64, applied to the
  same logits. The gradient is scaled as in fp16 training.
- On a GPU, the second table compares images from the GPU's data transform with images from the same
  transform on the CPU.
- The third table compares the losses of the same training in fp32 and in mixed precision. A
  repeated fp32 run shows the effect of the summation order, which can vary on a GPU.
- The fourth table compares an uninterrupted deterministic `hot` run with one that resumes from a
  checkpoint saved halfway. All losses and tensors must be identical, bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import main as program
from benchmarks import harness, loss
from benchmarks.numbers import make_config
from dataset.labels import PADDING
from extras.preparation.synthetic import make
from tests.support.resumed_runs import largest_difference
from training.config import resolve
from training.pictures import Curves
from transforms import DeviceTransform

CLASSES, STRIDE = 150, 4
# Maximum relative error of the gradient, for each data type of the logits. All sums are computed in
# fp32, and the gradient is then rounded to the type of the logits. The relative error of the loss
# must always stay below the fp32 value.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SCALE = 2.0**16
LEVEL = 1 / 255 / 0.225  # Size of one 8-bit step in pixel value after normalisation.

# Config changes for a run in fp32 without TF32 and without compilation.
EXACTLY = {"precision": "fp32", "tf32": False, "compile": False}

# Column headings of the tables.
LOSSES = "logits", "target", "class weights", "error of the loss", "of its gradient"
IMAGES = "images on the GPU", "greatest difference from a CPU's", "labels"
RESUMED = "hot, deterministic", "steps", "losses", "greatest difference of a tensor"
NAMES = {False: "not compiled", True: "compiled"}
# The cells of a table row, and whether the measured result is correct.
Row = tuple[list[str], bool]


def loss_errors(dtype: torch.dtype, target: str, side: str, size: int) -> tuple[float, float]:
    """Return the relative error of the loss and the relative error of its gradient.

    Args:
        dtype: Type of the logits.
        target: Type of the target, "index" or "mixed".
        side: Item of `benchmarks.loss.WEIGHTED`, which selects whether the loss has class weights.
        size: Height and width of the target in pixels.
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


def loss_rows(size: int) -> Iterator[Row]:
    """Yield a row of the loss table for each data type and target, with and without weights."""
    for dtype, tolerance in TOLERANCE.items():
        for target in loss.TARGETS:
            for side in loss.WEIGHTED:
                errors = loss_errors(dtype, target, side, size)
                holds = errors[0] < TOLERANCE[torch.float32] and errors[1] < tolerance
                name = str(dtype).removeprefix("torch.")
                weights = "no" if side == loss.WEIGHTED[0] else "yes"
                yield [name, target, weights, *(f"{error:.1e}" for error in errors)], holds


def make_batch(batch: int, size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images and labels, with a strip of padding at the top of the labels."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, size, size)
    images = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 151, shape, dtype=torch.uint8, generator=generator)
    labels[:, : size // 16] = PADDING
    return images.permute(0, 3, 1, 2).to(device), labels.to(device)


def transform_rows(size: int) -> Iterator[Row]:
    """Yield the rows of the image table, with the transform first uncompiled and then compiled."""
    images, labels = make_batch(8, size, "cpu")
    transform = DeviceTransform(distort=True, seed=5)
    expected, classes = transform((images, labels))
    for compiled in (False, True):
        if compiled:
            transform.compile()
        found, target = transform((images.cuda(), labels.cuda()))
        difference = (found.cpu() - expected).abs().max().item()
        same = torch.equal(target.cpu(), classes)
        cells = [NAMES[compiled], f"{difference:.1e}", "the same" if same else "differ"]
        yield cells, same and difference < LEVEL


def train(config: dict[str, Any], tf32: bool = True, **changes: Any) -> list[float]:
    """Train with a config and return the loss of each step.

    Args:
        config: Content of a YAML config.
        tf32: Whether a GPU may use TF32 for fp32 operations, as it may under Composer by default.
        **changes: Config attributes to replace.
    """
    harness.release()
    trainer = program.build_trainer(dataclasses.replace(resolve(config), **changes))
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    # Skip evaluations to save time, because the first evaluation would compile the network again.
    harness.never_evaluate(trainer)
    trainer.fit()
    trainer.close()
    (curves,) = (c for c in trainer.state.callbacks if isinstance(c, Curves))
    return [value for _, value, _ in curves.train]


def precision_rows(config: dict[str, Any], shown: Sequence[int]) -> Iterator[Row]:
    """Train in each precision, and yield the rows of the precision table.

    Args:
        config: Content of a YAML config.
        shown: Numbers of the training steps for which the table shows the loss.
    """
    on_gpu = torch.cuda.is_available()
    runs: dict[str, dict[str, Any]] = {"fp32": EXACTLY, "fp32, again": EXACTLY}
    if on_gpu:
        runs["TF32"] = EXACTLY | {"tf32": True}
    for precision in ("amp_bf16", "amp_fp16")[: 1 + on_gpu]:
        runs[precision] = {"precision": precision, "compile": False}
        if on_gpu:
            runs[f"{precision}, compiled"] = {"precision": precision, "compile": True}
    reference: list[float] = []
    for name, changes in runs.items():
        losses = train(config, save_folder=None, **changes)
        apart = [abs(a - b) for a, b in zip(losses, reference or losses, strict=True)]
        means = [f"{sum(apart) / len(apart):.1e}", f"{max(apart):.1e}"] if reference else ["", ""]
        reference = reference or losses
        yield [name, *(f"{losses[step - 1]:.4f}" for step in shown), *means], True


def resume(
    config: dict[str, Any], steps: int, folder: str, compiled: bool = False
) -> tuple[bool, float]:
    """Compare a run that resumes from a checkpoint saved halfway with an uninterrupted run.

    Args:
        config: Content of a YAML config.
        steps: Total number of training steps.
        folder: Folder for the checkpoints; the uninterrupted run saves to its subfolder `whole`.
        compiled: Whether to compile the network.

    Returns:
        Whether all losses are the same, and the largest difference between two tensors.
    """
    whole, resumed, half = f"{folder}/whole", f"{folder}/resumed", steps // 2
    same = {"precision": "auto", "compile": compiled, "deterministic": True}
    keep = {"save_interval": f"{half}ba", "save_num_checkpoints_to_keep": -1}
    losses = train(config, save_folder=whole, **same, **keep)
    (middle,) = Path(whole).glob(f"*-ba{half}-rank0.pt")
    again = train(config, save_folder=resumed, load_path=str(middle), **same)
    # Composer leaves deterministic algorithms enabled, so disable them after the runs.
    torch.use_deterministic_algorithms(False)
    return losses == again, largest_difference(resumed, whole)


def resume_rows(config: dict[str, Any], steps: int, folder: str) -> Iterator[Row]:
    """Yield the rows of the resume table: an uncompiled run and, on a GPU, a compiled run."""
    for compiled in (False, True)[: 1 + torch.cuda.is_available()]:
        same, difference = resume(config, steps, f"{folder}/{compiled}", compiled)
        cells = [NAMES[compiled], f"{steps}, from {steps // 2} on again"]
        yield [*cells, "the same" if same else "differ", f"{difference}"], same and difference == 0


@contextmanager
def made_config(size: int, batch: int) -> Iterator[tuple[str, Callable[..., dict[str, Any]]]]:
    """Generate images in a temporary folder.

    Args:
        size: Height and width of the images in pixels.
        batch: Number of images per batch.

    Yields:
        The folder, and a function that takes a recipe and a number of steps and returns a config.
    """
    with tempfile.TemporaryDirectory() as folder:
        make(f"{folder}/data/folders", training=8 * batch, validation=8, size=size)

        def config(recipe: str, steps: int) -> dict[str, Any]:
            found = make_config(f"{folder}/data", folder, recipe, size, steps)
            for section in ("train_dataset", "eval_dataset"):
                found[section]["batch_size"] = batch
            return found | {"device_train_microbatch_size": batch}

        yield folder, config


@harness.quiet()
def main(argv: list[str] | None = None) -> int:
    """Print the tables, and return 1 if a row contains DIFFER."""
    on_gpu = torch.cuda.is_available()
    parser = harness.make_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=50 if on_gpu else 20, help="steps per loss curve")
    add("--resumed-steps", type=int, default=12, help="steps of the resumed run")
    add("--size", type=int, default=256 if on_gpu else 64, help="image size in pixels")
    add("--batch", type=int, default=8 if on_gpu else 4, help="images per step")
    args = parser.parse_args(argv)
    # Set CUBLAS_WORKSPACE_CONFIG before CUDA is initialised, because deterministic cuBLAS
    # operations need it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    shown = sorted({1, max(args.steps // 4, 1), max(args.steps // 2, 1), args.steps})
    curves = "precision", *(f"loss {step}" for step in shown), "mean difference", "greatest"
    results, correct = [], True
    with made_config(args.size, args.batch) as (folder, config):
        tables: list[tuple[tuple[str, ...], Iterator[Row]]] = [(LOSSES, loss_rows(args.size))]
        if on_gpu:
            tables.append((IMAGES, transform_rows(args.size)))
        tables.append((curves, precision_rows(config("baseline", args.steps), shown)))
        hot = config("hot", args.resumed_steps)
        tables.append((RESUMED, resume_rows(hot, args.resumed_steps, folder)))
        for columns, rows in tables:
            table = harness.Table(*columns)
            for cells, holds in rows:
                table.add(*cells[:-1], cells[-1] if holds else f"{cells[-1]} DIFFER")
                correct &= holds
            results.append(table.result())
            print()
    harness.write_json(args, {"tables": results})
    return int(not correct)


if __name__ == "__main__":
    sys.exit(main())
