"""Compare the time and memory of this project's training loss with Composer's.

    python -m benchmarks.loss
    python -m benchmarks.loss --batch 16 --device cuda --json result.json
    python -m benchmarks.loss --class-weights          # this project with and without weights

The benchmark measures the forward and backward passes. By default, the logits have the shape (4,
150, 128, 128), and the targets are 512 x 512 pixels. To compute Composer's loss, the benchmark
resizes the logits to the target's size with `F.interpolate` and then applies `soft_cross_entropy`
and `DiceLoss`. In bf16 and fp16, both losses run under autocast. Composer's MixUp target is dense,
with one number per class and pixel. The benchmark computes this dense target before it starts the
timer. For MixUp, this project uses two index targets instead of a dense target.

The reported memory is the increase of the peak memory in a separate process. The benchmark measures
allocated memory on a GPU and resident memory on a CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
import torch.nn.functional as F
from composer.loss import DiceLoss, soft_cross_entropy
from composer.loss.utils import ensure_targets_one_hot
from torch import Tensor

from benchmarks import harness
from segmentation.losses import MixedTarget, segmentation_loss

SIDES = ("Composer", "this project")
# With `--class-weights`, the benchmark compares two variants of this project's loss.
WEIGHTED = ("without weights", "with class weights")
TARGETS = ("index", "mixed")
MIXING = 0.3


class Case:
    """A loss function with random logits and a random target.

    Args:
        side: Name of the loss, from `SIDES` or `WEIGHTED`.
        target: Type of the target, "index" or "mixed".
        args: Command-line arguments with the shapes, device and data type.
        size: Height and width of the target in pixels; by default `args.size`.
    """

    def __init__(self, side: str, target: str, args: argparse.Namespace, size: int | None = None):
        generator = torch.Generator().manual_seed(0)
        size = int(size or args.size)
        shape = (args.batch, args.classes, size // args.stride, size // args.stride)
        logits = 3 * torch.randn(shape, generator=generator)
        logits = logits.to(args.device, args.dtype, memory_format=torch.channels_last)
        self.logits = logits.requires_grad_()
        self.size = (size, size)
        # Build the target from random patches. Each patch has a single class index, and the loss
        # ignores patches with class index -1.
        patches = torch.randint(-1, args.classes, (args.batch, 1, 16, 16), generator=generator)
        first = F.interpolate(patches.double(), self.size)[:, 0].long().to(args.device)
        mixed = MixedTarget(first, first.roll(1, 0), MIXING)
        self.target = first if target == "index" else mixed
        self.loss = self._composer if side == "Composer" else self._ours
        # Give all classes the same weight, so that the loss is the same as without weights. The
        # speed does not depend on the weights.
        alike = torch.full((args.classes,), 2.0, device=args.device)
        self.weights = alike if side == WEIGHTED[1] else None
        if side == "Composer" and target == "mixed":
            self.target = self._dense(mixed)

    def _dense(self, mixed: MixedTarget) -> Tensor:
        like = self.logits.new_empty(1).expand(len(self.logits), self.logits.shape[1], *self.size)
        dense = ensure_targets_one_hot(like, mixed.target).mul_(1 - mixed.mixing)
        return dense.add_(ensure_targets_one_hot(like, mixed.permuted), alpha=mixed.mixing)

    def _composer(self) -> Tensor:
        z = F.interpolate(self.logits, self.size, mode="bilinear", align_corners=False)
        dice = DiceLoss(softmax=True, batch=True, ignore_absent_classes=True)
        assert isinstance(self.target, Tensor)
        cross_entropy = soft_cross_entropy(z, self.target, ignore_index=-1)
        return 0.375 * cross_entropy + 1.125 * dice(z, self.target)

    def _ours(self) -> Tensor:
        loss = segmentation_loss(self.logits, self.target, class_weights=self.weights)
        return loss["total"]

    def step(self) -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient with respect to the logits."""
        device, dtype = self.logits.device.type, self.logits.dtype
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = self.loss()
        (gradient,) = torch.autograd.grad(loss, self.logits)
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.detach(), gradient


def seconds(target: str, threads: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Check that both losses agree, then return the time of one step of each, in seconds."""
    cases = {side: Case(side, target, args) for side in args.sides}
    (loss, gradient), (other_loss, other_gradient) = (cases[side].step() for side in args.sides)
    tolerance = 1e-4 if args.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(other_loss, loss.to(other_loss), rtol=tolerance, atol=0)
    assert (other_gradient - gradient).norm() < tolerance * gradient.norm()
    del gradient, other_gradient
    steps = {side: partial(harness.seconds_of, case.step, threads) for side, case in cases.items()}
    return harness.in_turn(steps, args.repeats)


@harness.quiet()
def extra_bytes(side: str, target: str, args: argparse.Namespace) -> int:
    """Return the number of bytes by which one step raises the peak memory."""
    torch.set_num_threads(args.threads[-1])
    # Run a small step first, so that libraries are loaded and kernels are compiled before the
    # measurement.
    Case(side, target, args, size=64).step()
    case = Case(side, target, args)
    with harness.PeakMemory(args.device == "cuda") as peak:
        case.step()
    return peak.bytes


def measure(args: argparse.Namespace) -> Iterator[dict]:
    """Yield the time and memory of both losses for each type of target and number of threads."""
    for target in TARGETS:
        memory = {}
        for side in args.sides:
            # Measure each loss in its own process, because reusing previously freed memory would
            # hide new allocations.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                memory[side] = process.submit(extra_bytes, side, target, args).result()
        for threads in args.threads:
            found = {"target": target, "threads": threads, "bytes": memory}
            yield found | {"seconds": seconds(target, threads, args)}


HEAD = harness.head(
    "target", "CPU threads", "loss", "time (median)", "least", "most", "extra memory"
)


def lines(result: dict) -> str:
    """Return the rows of the Markdown table for one type of target."""
    start = result["target"], result["threads"]
    medians, memory, found = [], [], []
    for side, taken in result["seconds"].items():
        medians.append(statistics.median(taken))
        memory.append(result["bytes"][side])
        digits = 0 if medians[-1] > 0.1 else 2
        times = (f"{1e3 * t:.{digits}f} ms" for t in (medians[-1], min(taken), max(taken)))
        found.append(harness.row(*start, side, *times, f"{memory[-1] / 1e6:.0f} MB"))
    # Omit the memory ratio if the second loss did not measurably raise the peak memory.
    smaller = f"{memory[0] / memory[1]:.1f}" if memory[1] else ""
    ratio = f"{medians[0] / medians[1]:.{2 if WEIGHTED[0] in result['seconds'] else 1}f}"
    return "\n".join([*found, harness.row(*start, "ratio", ratio, "", "", smaller)])


@harness.quiet()
def main() -> None:
    """Run the measurements that the command line selects, and print them as a table."""
    parser = harness.make_parser(__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--size", type=int, default=512, help="size of the target in pixels")
    parser.add_argument("--stride", type=int, default=4, help="stride of the logits in pixels")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per median")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and PyTorch's choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--class-weights", action="store_true", help="compare ours without and with them instead"
    )
    args = parser.parse_args()
    args.sides = WEIGHTED if args.class_weights else SIDES
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.get_num_threads()
    args.threads = args.threads or ([chosen] if args.device == "cuda" else sorted({1, chosen}))
    default = "bfloat16" if args.device == "cuda" else "float32"
    args.dtype = getattr(torch, args.dtype or default)
    side = args.size // args.stride
    result = {
        "logits": [args.batch, args.classes, side, side],
        "size": args.size,
        "dtype": str(args.dtype).removeprefix("torch."),
        "rows": [],
        "machine": harness.machine(),
    }
    shape = ", ".join(map(str, result["logits"]))
    device = result["machine"]["gpu" if args.device == "cuda" else "cpu"]
    print(f"Logits ({shape}), {result['dtype']}, to {args.size} px; {device}")
    print(f"\n{HEAD}", flush=True)
    for found in measure(args):
        # Print each row immediately, so that an interrupted run still shows the rows it has
        # measured.
        print(lines(found), flush=True)
        result["rows"].append(found)
    harness.write_json(args, result)


if __name__ == "__main__":
    main()
