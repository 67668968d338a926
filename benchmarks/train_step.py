"""The complete training step for each recipe, compared with the step of plain Composer.

    python -m benchmarks.train_step                               # ResNet-101 at 512 px on a GPU
    python -m benchmarks.train_step --path ./ade20k --json result.json
    python -m benchmarks.train_step --precision fp32  # the same arithmetic on both sides

"ours" is the training of main.py. "plain" is benchmarks/plain.py, in fp16 on a GPU and in fp32 on a
CPU. Both use Composer's `Trainer` and the same loader. Times are means over the steps of a run,
because the steps of a recipe differ (SAM, EMA). The table shows medians over runs that alternate
between the sides.

Utilisation is relative to the rate of one large matrix product in the same type and process. The
operations of a step are those of the network's forward and backward pass, twice where SAM makes
two. Memory is the peak of a step, including the weights: allocated on a GPU, resident on a CPU. For
GPUs that `main.py --plan` knows, the table also shows the estimate.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import functools
import gc
import json
import logging
import multiprocessing
import os
import platform
import re
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.version
from composer import Callback, Trainer
from composer.core import DataSpec, Engine, State, get_precision_context
from composer.loggers import Logger
from composer.models import ComposerModel
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities
from torch.utils.flop_counter import FlopCounterMode

import main as program
from benchmarks import plain
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

GPU_MATRIX = 8192  # Side of the matrix that measures the rate of a GPU.
RECIPES = ("none", "mild", "medium", "hot")
CYCLE = 2  # Number of steps in a cycle: medium has SAM's additional pass in every second step.
BUILDERS: dict[str, Callable[..., Trainer]] = {
    "plain": plain.build_trainer,
    "ours": program.build_trainer,
}


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


def config(args: argparse.Namespace, recipe: str) -> Config:
    """Return the config of a run without pictures, checkpoints or evaluations."""
    dataset = {
        "path": args.path,
        "base_size": args.size,
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
    )


class Contender:
    """A trainer of one side and one recipe, whose training can be continued at any time."""

    def __init__(
        self,
        args: argparse.Namespace,
        side: str,
        recipe: str,
        data: tuple[DataSpec, DataSpec] | None = None,
    ) -> None:
        self.args, self.side, self.recipe = args, side, recipe
        # The contenders share loaders and workers, but not the trainer's wrappers around them.
        data = data and (copy.copy(data[0]), copy.copy(data[1]))
        self.steps = Steps()
        self.trainer = BUILDERS[side](config(args, recipe), callbacks=[self.steps], data=data)
        never_evaluate(self.trainer)
        self.seconds: list[float] = []
        self.bytes = 0  # Peak memory on a GPU.

    def fit(self, steps: int) -> None:
        """Train for more steps."""
        torch.backends.cudnn.benchmark = self.side == "ours"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # Free the cached memory of the other contenders.
        self.trainer.fit(duration=f"{steps}ba")

    def time(self) -> None:
        """Measure the mean step of another run and, on a GPU, its peak memory."""
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        self.fit(1 + self.args.steps)  # The first step waits for the start of the loader.
        self.seconds.append(self.steps.mean(self.args.steps))
        if torch.cuda.is_available():
            taken = torch.cuda.max_memory_allocated() - before + standing_bytes(self.trainer)
            self.bytes = max(self.bytes, taken)

    def profile(self) -> float:
        """Return the average number of host waits per step."""
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            self.fit(CYCLE)
        waits = sum(event.name == "aten::_local_scalar_dense" for event in profiler.events() or ())
        return waits / CYCLE

    def kernels(self) -> dict[str, float]:
        """Return the milliseconds per step of each GPU kernel or, on a CPU, of each operator."""
        on_gpu = ProfilerActivity.CUDA in supported_activities()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * on_gpu)]
        with profile(activities=activities) as profiler:
            self.fit(CYCLE)
        taken = {
            event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
            for event in profiler.key_averages()
            # On a GPU, skip operators and annotations, because their time includes the time of
            # their kernels.
            if (event.device_type == DeviceType.CUDA) == on_gpu and not event.is_user_annotation
        }
        return {name: time / 1e3 / CYCLE for name, time in taken.items() if time}

    def parts(self) -> dict[str, float]:
        """Return the milliseconds of each part of a step.

        The trainer cannot be used for other measurements afterwards.
        """
        network: Any = self.trainer.state.model.module
        compiled = network._compiled_call_impl is not None
        network._compiled_call_impl = None
        watch = Stopwatch(self.trainer, compile_parts=compiled)
        # The contender was idle, so it warms up again.
        self.fit(self.args.warmup if compiled else CYCLE)
        watch.steps = 0
        self.fit(self.args.steps)
        return watch.milliseconds()

    def evaluation(self) -> dict[str, float]:
        """Return the images per second of an evaluation and of the forward pass alone."""
        self.trainer.eval()  # The first call starts the loader and compiles the network.
        loader = self.trainer.state.evaluators[0].dataloader
        images = sum(len(target) for _, target in loader.dataloader)
        start = time.perf_counter()
        self.trainer.eval()
        taken = time.perf_counter() - start
        batch = self.trainer.state.device.batch_to_device(next(iter(loader.dataloader)))
        forward = forward_seconds(self.trainer, loader.microbatch_transforms(batch))
        return {"images_per_second": images / taken, "forward": len(batch[1]) / forward}


def never_evaluate(trainer: Trainer) -> None:
    """Turn off the evaluation that Composer runs at the end of each `fit`."""
    for evaluator in trainer.state.evaluators:
        evaluator.eval_interval = lambda state, event: False


def resident_bytes(args: argparse.Namespace, side: str, recipe: str) -> int:
    """Return the peak memory of building a trainer and of its first steps, in a new process.

    The process is forked from a process that has only imported modules. A fork of this process
    could reuse memory that this process has freed.
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
    """Return the bytes of weights, gradients, momentum and averages."""
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
    """Return the seconds of the fastest of four forward passes in evaluation."""
    model = cast(ComposerModel, trainer.state.model)
    model.eval()
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        with get_precision_context(trainer.state.precision):
            model.eval_forward(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


def operations(args: argparse.Namespace) -> int:
    """Return the floating-point operations of one image's forward and backward pass.

    The backward pass needs two products for each product of the forward pass. PyTorch's counter
    counts a depthwise convolution as a dense one.
    """
    with torch.device("meta"):
        network = deeplabv3(args.classes, args.arch)
        image = torch.empty(2, 3, args.size, args.size)
    with FlopCounterMode(display=False) as counter:
        network(image)
    return 3 * counter.get_total_flops() // 2


def data_sheet(name: str) -> str | None:
    """Return the name in `extras.planning.estimate` for a GPU, given CUDA's name."""
    short = re.sub("[ -]|SXM[0-9]|PCIE", "", name)
    known = [gpu for gpu in GPUS if gpu.replace("-", "") in short]
    return max(known, key=len, default=None)


def estimates(args: argparse.Namespace, name: str, precision: str) -> dict[str, dict[str, float]]:
    """Return the estimate of `main.py --plan --gpu` for the steps of each recipe.

    The memory excludes the CUDA context.
    """
    found = {}
    settings = config(args, "none")
    compiled = compiles(settings)
    network = create_meta_network(**asdict(settings.model))
    footprint = count(network, args.size, AUTOCAST.get(precision), compiled)
    for recipe in args.recipes:
        step = estimate(
            footprint,
            config(args, recipe),
            name,
            gpus=1,
            passes=passes(config(args, recipe)),
            precision=precision,
            compiled=compiled,
        )
        found[recipe] = {"images_per_second": args.batch / step.step, "bytes": step.memory}
    return found


def matrix_rate(dtype: torch.dtype) -> float:
    """Return the operations per second of a large matrix product, the best within a second."""
    on_gpu = torch.cuda.is_available()
    n, device = (GPU_MATRIX, "cuda") if on_gpu else (2048, "cpu")
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + 1
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(10 if on_gpu else 1):
            torch.matmul(a, b)
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / (10 if on_gpu else 1))
    return 2 * n**3 / best


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the result that --json writes, after each recipe and part, as far as it is known."""
    on_gpu = torch.cuda.is_available()
    sheet = data_sheet(torch.cuda.get_device_name()) if on_gpu else None
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
        "machine": machine(),
    }
    contenders: dict[str, dict[str, Contender]] = {}
    for recipe in args.recipes:
        resident = dict.fromkeys(BUILDERS, 0)
        if not on_gpu:
            resident = {side: resident_bytes(args, side, recipe) for side in BUILDERS}
        sides = {side: Contender(args, side, recipe, data) for side in BUILDERS}
        for contender in sides.values():
            contender.fit(args.warmup)
        for _ in range(args.rounds):
            for contender in sides.values():
                contender.time()
        recipes[recipe] = {}
        of_a_step = flops * passes(config(args, recipe)) * args.batch
        for side, contender in sides.items():
            seconds = statistics.median(contender.seconds)
            recipes[recipe][side] = {
                "milliseconds": 1e3 * seconds,
                "images_per_second": args.batch / seconds,
                "utilisation": of_a_step / seconds / rates[types[side]],
                "waits": contender.profile(),
                "bytes": contender.bytes or resident[side],
                "runs": contender.seconds,
            }
        contenders[recipe] = sides
        if sheet and recipe == args.recipes[-1]:
            result["estimates"] = estimates(args, sheet, choose_precision(args.precision)[0])
        yield result
    # Apart from the weights, the evaluation of all recipes is the same.
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
    # Close the trainers last, because the first one closes the shared loader.
    for sides in contenders.values():
        for contender in sides.values():
            contender.trainer.close()
    yield result


def compute_type(args: argparse.Namespace, side: str) -> str:
    """Return the type in which the convolutions of a side compute."""
    precision, autocast = choose_precision(args.precision)
    if side == "plain":
        precision, autocast = plain.precision(config(args, "none")), None
    if autocast is not None:
        return str(autocast).removeprefix("torch.")
    return {"amp_bf16": "bfloat16", "amp_fp16": "float16"}.get(precision, "float32")


def machine() -> dict[str, Any]:
    """Return the machine and library versions that the results depend on."""
    from benchmarks.dataloader import machine as host

    found: dict[str, Any] = host() | {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found | {"platform": platform.platform()}


def step_rows(recipe: str, result: dict[str, Any]) -> str:
    """Return the speed and memory of a recipe as Markdown.

    The first recipe comes with the head of the table, and the last with the estimates if there are
    any.
    """
    lines = []
    if recipe == next(iter(result["recipes"])):
        types = ", ".join(f"{side} in {dtype}" for side, dtype in result["types"].items())
        lines = [
            f"{result['arch']}, {result['size']} px, batch {result['batch']}; {types}; "
            f"{'ours compiled; ' * result['compile']}{result['rounds']} runs of "
            f"{result['steps']} steps each, {result['machine']['threads']} threads",
            "",
            "| recipe | | images/s | ms/step | ratio | utilisation | peak memory | waits a step |",
            "|---|---|---|---|---|---|---|---|",
        ]
    entry = result["recipes"][recipe]
    for side, found in entry.items():
        cells = [
            recipe,
            side,
            f"{found['images_per_second']:.1f}",
            f"{found['milliseconds']:.0f}",
            f"{ratio(entry):.2f}" if side == "ours" else "",
            f"{found['utilisation']:.0%}",
            f"{found['bytes'] / 2**30:.2f} GiB",
            f"{found['waits']:g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if "estimates" in result:
        lines += ["", *estimate_lines(result)]
    return "\n".join(lines)


def estimate_lines(result: dict[str, Any]) -> list[str]:
    """Return the estimates compared with the measurements of this project, as Markdown."""
    lines = [
        "| estimated / measured | images/s | | | peak memory, GiB | | |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe, planned in result["estimates"].items():
        ours, cells = result["recipes"][recipe]["ours"], [recipe]
        for key, unit in (("images_per_second", 1), ("bytes", 2**30)):
            pair = planned[key] / unit, ours[key] / unit
            cells += [f"{value:.1f}" for value in pair] + [f"{pair[0] / pair[1]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def ratio(entry: dict[str, Any]) -> float:
    """Return the images per second of this project divided by those of the plain side."""
    return entry["ours"]["images_per_second"] / entry["plain"]["images_per_second"]


def evaluation_table(result: dict[str, Any]) -> str:
    """Return the evaluation and the number of compiled graphs as Markdown."""
    lines = ["", "| evaluation | images/s | forward pass alone |", "|---|---|---|"]
    for side, found in result["evaluation"].items():
        lines.append(f"| {side} | {found['images_per_second']:.1f} | {found['forward']:.1f} |")
    if result["compile"]:
        breaks = result["graph_breaks"]
        lines += ["", f"Graphs compiled: {result['graphs']}; graph breaks: {breaks}."]
    return "\n".join(lines)


def kernels_table(result: dict[str, Any]) -> str:
    """Return the ten kernels that take the most time in a step, as Markdown."""
    kernels = result["kernels"]
    longest = sorted(kernels, key=kernels.__getitem__, reverse=True)[:10]
    whole = sum(kernels.values())
    lines = ["", f"| the longest of {len(kernels)} kernels | ms/step | share |", "|---|---|---|"]
    for name in longest:
        shown = name.replace("|", "/")[:80]
        lines.append(f"| `{shown}` | {kernels[name]:.2f} | {kernels[name] / whole:.1%} |")
    return "\n".join(lines)


def parts_table(result: dict[str, Any]) -> str:
    """Return the parts of the steps as Markdown."""
    recipes = result["recipes"]
    names = [(recipe, side) for recipe in recipes for side in BUILDERS]
    lines = [
        "",
        "| ms/step | " + " | ".join(f"{recipe}, {side}" for recipe, side in names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for part in PARTS:
        cells = [f"{recipes[recipe][side]['parts'][part]:.1f}" for recipe, side in names]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--path", help="data set in ADE20K's layout; default: one made for this")
    parser.add_argument("--arch", default="resnet101" if on_gpu else "resnet50")
    parser.add_argument("--size", type=int, default=512 if on_gpu else 128, help="pixels")
    parser.add_argument("--batch", type=int, default=16 if on_gpu else 4, help="images a step")
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--workers", type=int, help="of the loader; default: main.py's")
    parser.add_argument("--precision", default="auto", help="main.py's")
    parser.add_argument("--compile", default="auto", help="main.py's")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--warmup", type=int, default=6, help="steps before a run is timed")
    parser.add_argument("--steps", type=int, default=10, help="steps of a run that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side and recipe")
    parser.add_argument("--json", help="write the result there as well")
    args = parser.parse_args(argv)
    args.compile = {"true": True, "false": False}.get(str(args.compile).lower(), args.compile)
    return args


def make_photos(root: Path, count: int, batch: int) -> None:
    """Make `count` images, 64 of them different, and two and a half batches to evaluate."""
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
    """Measure and print each row and table at once, so that an interrupted run keeps its rows."""
    rows = (functools.partial(step_rows, recipe) for recipe in args.recipes)
    tables = [*rows, evaluation_table, kernels_table, parts_table]
    for table, result in zip(tables, measure(args), strict=True):
        print(table(result), flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    return result


def release() -> None:
    """Free the memory of earlier trainers, which Composer keeps until the process ends."""
    atexit.unregister(Engine._close)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the command line and return the result that --json writes."""
    args = arguments(argv)
    warnings.simplefilter("ignore")
    logging.getLogger("composer").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        if not args.path:
            args.path = folder
            make_photos(Path(folder), args.batch * (args.warmup + args.steps + 2), args.batch)
        while True:
            try:
                return report(args)
            except torch.OutOfMemoryError:
                args.batch //= 2
                print(f"Out of memory; now with batch {args.batch}.\n", flush=True)
            release()


if __name__ == "__main__":
    main()
