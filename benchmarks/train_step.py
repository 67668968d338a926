"""Measure each recipe's full training step, and compare it with plain Composer.

    python -m benchmarks.train_step                   # on a GPU, ResNet-101 at 512 px
    python -m benchmarks.train_step --path ./ade20k --json result.json
    python -m benchmarks.train_step --precision fp32  # compare both trainers in fp32

The "ours" rows show the trainer of main.py. The "plain" rows show the trainer of
benchmarks/plain.py, in fp16 on a GPU and in fp32 on a CPU. Both trainers use Composer's `Trainer`
and the same loader. The time of a run is the mean over its steps, because SAM and EMA make some
steps slower. Runs alternate between the two trainers, and the table shows the median over the runs.

Utilisation is the achieved operations per second, divided by those of a large matrix product with
the same data type in the same process. A step's operations are those of the network's forward and
backward passes, counted twice if SAM makes an additional pass. Memory is the peak during a step,
including the weights: allocated memory on a GPU, resident memory on a CPU. If `main.py --plan`
supports the GPU, the table also shows the planned speed and memory.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import multiprocessing
import os
import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from composer import Trainer
from composer.core import DataSpec, get_precision_context
from composer.models import ComposerModel
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities
from torch.utils.flop_counter import FlopCounterMode

import main as program
from benchmarks import harness, plain
from benchmarks.dataloader import make_data
from benchmarks.stopwatch import PARTS, Stopwatch
from data import build_data
from extras.planning.estimate import GPUS, estimate
from extras.planning.length import passes
from model import deeplabv3
from networks.deeplab import create_meta_network
from training.config import resolve
from training.microbatch import AUTOCAST, count
from training.precision import choose_precision, compiles
from training.schema import Config

# Size of the square matrices that are multiplied to measure a GPU's peak speed.
GPU_MATRIX = 8192
RECIPES = ("none", "mild", "medium", "hot")

# Number of steps after which the pattern of work repeats. In the medium recipe, SAM makes an
# additional pass in every second step.
CYCLE = 2

BUILDERS: dict[str, Callable[..., Trainer]] = {
    "plain": plain.build_trainer,
    "ours": program.build_trainer,
}


def config(args: argparse.Namespace, recipe: str, **changes: Any) -> Config:
    """Return the config of a run without pictures, checkpoints or evaluations.

    Args:
        args: Arguments of the command line.
        recipe: Name of the recipe, from `RECIPES`.
        **changes: Config keys to add or replace.
    """
    dataset = {
        "path": args.path,
        "base_size": vars(args).get("base_size", args.size),
        "final_size": args.size,
        "batch_size": args.batch,
    }
    if args.workers is not None:
        dataset["num_workers"] = args.workers
    return resolve(
        {
            "run_name": "benchmark",
            "recipe_name": None if recipe == "none" else recipe,
            "device_train_microbatch_size": args.batch,
            "precision": args.precision,
            "compile": args.compile,
            "model": {
                "num_classes": args.classes,
                "backbone_arch": args.arch,
                "backbone_weights": None,
            },
            "train_dataset": dataset,
            "eval_dataset": dict(dataset),
            "eval_interval": "1000000ba",
            "optimizer": {"lr": 0.001},
            "pictures": 0,
        }
        | changes
    )


class Contender:
    """A trainer for one recipe that can continue training at any time.

    Args:
        args: Arguments of the command line.
        side: Trainer to use, from `BUILDERS`.
        recipe: Name of the recipe, from `RECIPES`.
        data: Data specs for training and evaluation; by default built from the config.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        side: str,
        recipe: str,
        data: tuple[DataSpec, DataSpec] | None = None,
    ) -> None:
        self.args, self.side, self.recipe = args, side, recipe
        # Copy the data specs, because each trainer wraps the loader of its spec. All trainers
        # share the loaders and their workers.
        data = data and (copy.copy(data[0]), copy.copy(data[1]))
        self.steps = harness.Steps()
        self.trainer = BUILDERS[side](config(args, recipe), callbacks=[self.steps], data=data)
        harness.never_evaluate(self.trainer)
        self.bytes = 0  # Peak memory in bytes, measured only on a GPU.

    def fit(self, steps: int) -> None:
        """Train for the given number of additional steps."""
        torch.backends.cudnn.benchmark = self.side == "ours"
        if torch.cuda.is_available():
            # Free the GPU memory that PyTorch has cached for the other trainers.
            torch.cuda.empty_cache()
        self.trainer.fit(duration=f"{steps}ba")

    def time(self) -> float:
        """Train for one timed run, and return the mean time per step in seconds.

        On a GPU, the method also updates the recorded peak memory.
        """
        gc.collect()
        on_gpu = torch.cuda.is_available()
        with harness.PeakMemory(on_gpu) as peak:
            self.fit(1 + self.args.steps)  # The first step starts the loader and is not timed.
        if on_gpu:
            self.bytes = max(self.bytes, peak.bytes + standing_bytes(self.trainer))
        return self.steps.mean(self.args.steps)

    def profile(self) -> float:
        """Return how many times per step the host waits for a number from the device."""
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            self.fit(CYCLE)
        waits = sum(event.name == "aten::_local_scalar_dense" for event in profiler.events() or ())
        return waits / CYCLE

    def kernels(self) -> dict[str, float]:
        """Return the milliseconds per step for each GPU kernel or, on a CPU, for each operator."""
        on_gpu = ProfilerActivity.CUDA in supported_activities()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * on_gpu)]
        with profile(activities=activities) as profiler:
            self.fit(CYCLE)
        taken = {
            event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
            for event in profiler.key_averages()
            # On a GPU, keep only the kernels, because the times of operators and annotations
            # include the times of their kernels.
            if (event.device_type == DeviceType.CUDA) == on_gpu and not event.is_user_annotation
        }
        return {name: time / 1e3 / CYCLE for name, time in taken.items() if time}

    def parts(self) -> dict[str, float]:
        """Return the time of each part of a training step, in milliseconds.

        The trainer cannot be used for other measurements afterwards.
        """
        network: Any = self.trainer.state.model.module
        compiled = network._compiled_call_impl is not None
        network._compiled_call_impl = None
        watch = Stopwatch(self.trainer, compile_parts=compiled)
        # Warm up again, because the trainer was idle and its parts are now compiled separately.
        self.fit(self.args.warmup if compiled else CYCLE)
        watch.steps = 0
        self.fit(self.args.steps)
        return watch.milliseconds()

    def evaluation(self) -> dict[str, float]:
        """Return the throughput of an evaluation and of its forward pass, in images per second."""
        # The first evaluation is a warm-up, which starts the loader and compiles the network.
        self.trainer.eval()
        loader = self.trainer.state.evaluators[0].dataloader
        images = sum(len(target) for _, target in loader.dataloader)
        start = time.perf_counter()
        self.trainer.eval()
        taken = time.perf_counter() - start
        batch = self.trainer.state.device.batch_to_device(next(iter(loader.dataloader)))
        forward = forward_seconds(self.trainer, loader.microbatch_transforms(batch))
        return {"images_per_second": images / taken, "forward": len(batch[1]) / forward}


def resident_bytes(args: argparse.Namespace, side: str, recipe: str) -> int:
    """Return the peak memory of building a trainer and training the first steps, in bytes.

    The measurement runs in a process forked from a server that has done nothing but import modules.
    A fork of the current process could reuse memory that was freed earlier, which would hide
    allocations.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.train_step"])
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(_resident_bytes, args, side, recipe).result()


def _resident_bytes(args: argparse.Namespace, side: str, recipe: str) -> int:
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    args = argparse.Namespace(**vars(args) | {"workers": 0})
    Contender(args, side, recipe).fit(CYCLE)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def standing_bytes(trainer: Trainer) -> int:
    """Return the bytes that weights, buffers, gradients, momentum and averaged weights take up."""
    state = trainer.state
    tensors = [*state.model.parameters(), *state.model.buffers()]
    tensors += [weight.grad for weight in state.model.parameters()]
    for optimizer in state.optimizers:
        tensors += [value for entry in optimizer.state.values() for value in entry.values()]
    for algorithm in state.algorithms:
        average = getattr(algorithm, "ema_model", None)
        if average is not None:
            tensors += [*average.named_parameters_dict.values()]
            tensors += [*average.named_buffers_dict.values()]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


@torch.no_grad()
def forward_seconds(trainer: Trainer, batch: Any) -> float:
    """Return the median time of a forward pass in evaluation mode, in seconds."""
    model = cast(ComposerModel, trainer.state.model)
    model.eval()
    with get_precision_context(trainer.state.precision):
        return harness.seconds_of(lambda: model.eval_forward(batch), min_run_time=0.5)


def operations(args: argparse.Namespace) -> int:
    """Return the number of floating-point operations in the forward and backward pass of one image.

    The backward pass needs twice as many operations as the forward pass. PyTorch's FLOP counter
    counts a depthwise convolution as if it were dense.
    """
    with torch.device("meta"):
        network = deeplabv3(args.classes, args.arch)
        image = torch.empty(2, 3, args.size, args.size)
    with FlopCounterMode(display=False) as counter:
        network(image)
    return 3 * counter.get_total_flops() // 2


def data_sheet(name: str) -> str | None:
    """Convert CUDA's name for a GPU to the name in `extras.planning.estimate`, or to None."""
    short = re.sub("[ -]|SXM[0-9]|PCIE", "", name)
    known = [gpu for gpu in GPUS if gpu.replace("-", "") in short]
    return max(known, key=len, default=None)


def estimates(
    args: argparse.Namespace, gpu: str | None, precision: str
) -> dict[str, dict[str, float]]:
    """Return the estimates of `main.py --plan` for a training step of each recipe.

    Args:
        args: Arguments of the command line.
        gpu: Name of the GPU in `extras.planning.estimate`, or None to estimate only the memory.
        precision: Composer's name for the precision of the run.

    Returns:
        For each recipe, the images per second and the memory in bytes, without the CUDA context.
    """
    found = {}
    settings = config(args, "none")
    compiled = compiles(settings)
    network = create_meta_network(**asdict(settings.model))
    footprint = count(network, args.size, AUTOCAST.get(precision), compiled)
    for recipe in args.recipes:
        settings = config(args, recipe)
        found[recipe] = {"bytes": footprint.step(args.batch, settings, 1)}
        if gpu:
            step = estimate(footprint, settings, gpu, 1, passes(settings), precision, compiled)
            found[recipe] = {"images_per_second": args.batch / step.step, "bytes": step.memory}
    return found


def matrix_rate(dtype: torch.dtype) -> float:
    """Return the speed of a large matrix product, in operations per second."""
    on_gpu = torch.cuda.is_available()
    n, device = (GPU_MATRIX, "cuda") if on_gpu else (2048, "cpu")
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / harness.seconds_of(lambda: torch.matmul(a, b), min_run_time=1)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run all measurements, and yield the updated result for `--json` after each measurement."""
    sheet = data_sheet(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    counters.clear()
    shared = config(args, args.recipes[0])
    data = build_data(shared, "train"), build_data(shared, "val")
    flops = operations(args)
    types = {side: compute_type(args, side) for side in BUILDERS}
    rates = {name: matrix_rate(getattr(torch, name)) for name in set(types.values())}
    names = ("arch", "size", "batch", "classes", "steps", "warmup", "rounds")
    recipes: dict[str, dict[str, Any]] = {}
    result = {
        **{name: getattr(args, name) for name in names},
        "compile": compiles(shared),
        "types": types,
        "operations_per_image": flops,
        "matrix_rates": rates,
        "recipes": recipes,
        "machine": harness.machine(),
    }
    contenders: dict[str, dict[str, Contender]] = {}
    for recipe in args.recipes:
        sides = {side: Contender(args, side, recipe, data) for side in BUILDERS}
        for contender in sides.values():
            contender.fit(args.warmup)
        runs = harness.in_turn(
            {side: contender.time for side, contender in sides.items()}, args.rounds
        )
        recipes[recipe] = {}
        of_a_step = flops * passes(config(args, recipe)) * args.batch
        for side, contender in sides.items():
            seconds = statistics.median(runs[side])
            recipes[recipe][side] = {
                "milliseconds": 1e3 * seconds,
                "images_per_second": args.batch / seconds,
                "utilisation": of_a_step / seconds / rates[types[side]],
                "waits": contender.profile(),
                "bytes": contender.bytes or resident_bytes(args, side, recipe),
                "runs": runs[side],
            }
        contenders[recipe] = sides
        if sheet and recipe == args.recipes[-1]:
            result["estimates"] = estimates(args, sheet, choose_precision(args.precision)[0])
        yield result
    # Measure the evaluation only once, because it does not depend on the recipe.
    first = contenders[args.recipes[0]]
    result["evaluation"] = {side: contender.evaluation() for side, contender in first.items()}
    result["graphs"] = counters["stats"]["unique_graphs"]
    result["graph_breaks"] = sum(counters["graph_break"].values())
    yield result
    result["kernels"] = first["ours"].kernels()
    yield result
    for recipe, sides in contenders.items():
        for side, contender in sides.items():
            recipes[recipe][side]["parts"] = contender.parts()
    # Close the trainers only at the end, because closing any of them closes the shared loader.
    for sides in contenders.values():
        for contender in sides.values():
            contender.trainer.close()
    yield result


def compute_type(args: argparse.Namespace, side: str) -> str:
    """Return the name of the data type in which a trainer computes convolutions."""
    precision, autocast = choose_precision(args.precision)
    if side == "plain":
        precision, autocast = plain.precision(config(args, "none")), None
    if autocast is not None:
        return str(autocast).removeprefix("torch.")
    return {"amp_bf16": "bfloat16", "amp_fp16": "float16"}.get(precision, "float32")


def step_rows(recipe: str, result: dict[str, Any]) -> str:
    """Return the speed and memory of a recipe as Markdown table rows.

    For the first recipe, the table header comes before the rows. If there are estimates, they
    follow the last recipe's rows.
    """
    lines = []
    if recipe == next(iter(result["recipes"])):
        types = ", ".join(f"{side} in {dtype}" for side, dtype in result["types"].items())
        names = "recipe", "", "images/s", "ms/step", "ratio", "utilisation", "peak memory"
        lines = [
            f"{result['arch']}, {result['size']} px, batch {result['batch']}; {types}; "
            f"{'ours compiled; ' * result['compile']}{result['rounds']} runs of "
            f"{result['steps']} steps each, {result['machine']['threads']} threads",
            "",
            harness.head(*names, "waits per step"),
        ]
    entry = result["recipes"][recipe]
    for side, found in entry.items():
        rates = f"{found['images_per_second']:.1f}", f"{found['milliseconds']:.0f}"
        shown = f"{ratio(entry):.2f}" if side == "ours" else ""
        memory = f"{found['bytes'] / 2**30:.2f} GiB", f"{found['waits']:g}"
        lines.append(
            harness.row(recipe, side, *rates, shown, f"{found['utilisation']:.0%}", *memory)
        )
    if "estimates" in result:
        lines += ["", *estimate_lines(result)]
    return "\n".join(lines)


def estimate_lines(result: dict[str, Any]) -> list[str]:
    """Return a Markdown table that compares the estimates with this project's measurements."""
    lines = [harness.head("estimated / measured", "images/s", "", "", "peak memory, GiB", "", "")]
    for recipe, planned in result["estimates"].items():
        ours, cells = result["recipes"][recipe]["ours"], [recipe]
        for key, unit in (("images_per_second", 1), ("bytes", 2**30)):
            pair = planned[key] / unit, ours[key] / unit
            cells += [f"{value:.1f}" for value in pair] + [f"{pair[0] / pair[1]:.2f}"]
        lines.append(harness.row(*cells))
    return lines


def ratio(entry: dict[str, Any]) -> float:
    """Return this project's throughput divided by the plain baseline's throughput."""
    return entry["ours"]["images_per_second"] / entry["plain"]["images_per_second"]


def evaluation_table(result: dict[str, Any]) -> str:
    """Return a Markdown table of the evaluation throughput, and the number of compiled graphs."""
    lines = ["", harness.head("evaluation", "images/s", "forward pass alone")]
    for side, found in result["evaluation"].items():
        lines.append(
            harness.row(side, f"{found['images_per_second']:.1f}", f"{found['forward']:.1f}")
        )
    if result["compile"]:
        breaks = result["graph_breaks"]
        lines += ["", f"Graphs compiled: {result['graphs']}; graph breaks: {breaks}."]
    return "\n".join(lines)


def kernels_table(result: dict[str, Any]) -> str:
    """Return a Markdown table of the ten kernels that take the most time per step."""
    kernels = result["kernels"]
    longest = sorted(kernels, key=kernels.__getitem__, reverse=True)[:10]
    whole = sum(kernels.values())
    lines = ["", harness.head(f"the longest of {len(kernels)} kernels", "ms/step", "share")]
    for name in longest:
        shown = name.replace("|", "/")[:80]
        lines.append(
            harness.row(f"`{shown}`", f"{kernels[name]:.2f}", f"{kernels[name] / whole:.1%}")
        )
    return "\n".join(lines)


def parts_table(result: dict[str, Any]) -> str:
    """Return a Markdown table of the time that each part of a step takes."""
    recipes = result["recipes"]
    names = [(recipe, side) for recipe in recipes for side in BUILDERS]
    lines = ["", harness.head("ms/step", *(f"{recipe}, {side}" for recipe, side in names))]
    for part in PARTS:
        cells = [f"{recipes[recipe][side]['parts'][part]:.1f}" for recipe, side in names]
        lines.append(harness.row(part, *cells))
    return "\n".join(lines)


def make_parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser for the options that `config` reads, except `--path`.

    Args:
        doc: Docstring of the benchmark, whose first line describes the command.
        **defaults: Defaults that differ from those of this benchmark.
    """
    on_gpu = torch.cuda.is_available()
    parser = harness.make_parser(doc)
    parser.add_argument("--arch", default="resnet101" if on_gpu else "resnet50")
    parser.add_argument("--size", type=int, default=512 if on_gpu else 128, help="image size")
    parser.add_argument("--batch", type=int, default=16 if on_gpu else 4, help="images per step")
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--workers", type=int, help="loader processes; default: as in main.py")
    parser.add_argument("--precision", default="auto", help="as in main.py")
    parser.add_argument("--compile", type=harness.parse_switch, default="auto", help="see main.py")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.set_defaults(**defaults)
    return parser


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command-line arguments."""
    parser = make_parser(__doc__)
    parser.add_argument("--path", help="data set in ADE20K's layout; default: generated")
    parser.add_argument("--warmup", type=int, default=6, help="untimed steps per run")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per run")
    parser.add_argument("--rounds", type=int, default=3, help="runs per trainer and recipe")
    return parser.parse_args(argv)


def make_images(root: Path, count: int, batch: int) -> None:
    """Generate training images and masks, and two and a half batches of validation images.

    At most 64 of the images are distinct. The other files are hard links to these images.

    Args:
        root: Folder for the generated data set.
        count: Number of training images.
        batch: Number of images per batch.
    """
    root = root / "ADEChallengeData2016"
    different = min(count, 64)
    make_data(root, different)
    for kind in ("images", "annotations"):
        sources = sorted((root / kind / "training").iterdir())
        for number in range(different, count):
            source = sources[number % different]
            os.link(source, source.with_name(f"ADE_train_{number + 1:08d}{source.suffix}"))
        for number in range(2 * batch + batch // 2):
            source = sources[number % different]
            name = f"ADE_val_{number + 1:08d}{source.suffix}"
            os.link(source, root / kind / "validation" / name)


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Print each table row as soon as it is measured, so that an interruption loses nothing."""
    rows = (functools.partial(step_rows, recipe) for recipe in args.recipes)
    tables = [*rows, evaluation_table, kernels_table, parts_table]
    for table, result in zip(tables, measure(args), strict=True):
        print(table(result), flush=True)
        harness.write_json(args, result)
    return result


@harness.quiet()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Return the benchmark's result for `--json`; halve the batch size if memory runs out."""
    args = arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        if not args.path:
            args.path = folder
            make_images(Path(folder), args.batch * (args.warmup + args.steps + 2), args.batch)
        while True:
            try:
                return report(args)
            except torch.OutOfMemoryError:
                args.batch //= 2
                print(f"Out of memory; now with batch {args.batch}.\n", flush=True)
            harness.release()


if __name__ == "__main__":
    main()
