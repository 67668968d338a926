"""Build vision transformers from timm as DeepLabV3+ backbones, and train, rebuild and export them.

    python -m benchmarks.studies.vits                  # takes 6 minutes
    python -m benchmarks.studies.vits --names vit_tiny_patch16_224
    python -m benchmarks.studies.vits --speed          # takes 3 minutes
    python -m benchmarks.studies.vits --camvid camvid --minutes 20 --seeds 0 1 2   # takes 2.5 hours

Each network has 11 classes and no pretrained weights. The test trains each network for one SGD step
on two random images, and rebuilds the network from the arguments that a checkpoint stores. The
rebuilt network must return the same logits at a different image size, which resizes the position
embeddings. Then the test adds random numbers to all weights, because the initial layer scales and
position embeddings are near 0 and would hide differences. Finally, the test exports the network to
ONNX, TorchScript and .pt2, and compares each file with PyTorch at two more sizes. The Markdown
table shows the cause of each failure.

With `--camvid`, a small transformer and DeepLabV3+ with a ResNet-50 train from scratch for the same
number of minutes per seed, without a recipe. The study first times some steps to choose the length
of each run in batches, as the study `camvid` does. The table shows the training time of each run,
without evaluations, and its final mIoU. The transformer trains with AdamW and a warm-up, and the
ResNet with SGD.

With `--speed`, the test measures training steps of small transformers and of a ResNet-50 in turn,
in fp32 on two images per step. Peak memory includes the weights, and is measured in a process that
takes a single step.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch

from benchmarks.harness import (
    PeakMemory,
    Table,
    in_turn,
    make_parser,
    quiet,
    seconds_of,
    write_json,
)
from benchmarks.studies import camvid
from benchmarks.studies.families import CLASSES, print_rows, rebuild, step
from command_lines import EXPORT_SUFFIXES
from errors import one_line
from export import LIMITS
from extras.sharing.exporters import Deployed, compare, export
from model import ComposerDeepLabV3, build_composer_model
from networks.base import Network

# Small networks from each family of vision transformers in timm.
NAMES = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "deit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_small_plus_patch16_dinov3",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_siglip_gap_224",
    "vit_base_patch16_224.mae",
    "vit_base_patch16_clip_224",
    "vit_medium_patch16_reg4_gap_256",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "flexivit_small",
)

FAILS = "fails"
FORMATS = {"ONNX": "onnx", "TorchScript": "torchscript", ".pt2": "pt2"}
FAST = ("deeplabv3", "timm:vit_tiny_patch16_224", "timm:vit_small_patch16_dinov3")

# Networks that the CamVid comparison trains, with their settings.
CONTENDERS: dict[str, dict[str, Any]] = {
    "deeplabv3": {"optimizer": {"lr": 0.05}},
    "timm:vit_tiny_patch16_224": {
        "optimizer": {
            "name": "adamw",
            "lr": 5e-4,
            "weight_decay": 5e-4 * 0.05,
            "no_decay": ["norm", "bias"],
            "clip_norm": 1.0,
        },
        "schedule": {"name": "poly", "power": 1.0},
    },
}


def build(name: str) -> ComposerDeepLabV3:
    """Build a network with random weights; `deeplabv3` is DeepLabV3+ with a ResNet-50."""
    torch.manual_seed(0)
    return build_composer_model(
        name,
        None,
        num_classes=CLASSES,
        backbone_arch="resnet50",
        backbone_weights=None,
        sync_bn=False,
    )


def measure(name: str, size: int) -> dict[str, Any]:
    """Test one network, and return the values for the table."""
    model = build(f"timm:{name}")
    network = model.module
    assert isinstance(network, Network)
    network.check(CLASSES, [size])
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    row = {"parameters": parameters, "loss": step(model, size), "divisor": network.size_divisor}
    difference = rebuild(network, size * 3 // 2)
    if difference:
        raise ArithmeticError(
            f"the logits of the rebuilt network differ from the original by {difference:.1e}"
        )
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight) / 10)
    image = np.random.default_rng(0).integers(0, 256, (size, size * 4 // 3, 3), np.uint8)
    # The exporter's example image is 96 pixels high, so compare the networks at a larger and at a
    # smaller size.
    size = size * 3 // 2
    return row | {kind: compare_export(network, kind, image, size) for kind in FORMATS.values()}


def compare_export(network: Network, kind: str, image: np.ndarray, size: int) -> str:
    """Export a network, and return its differences from PyTorch or the error, as text."""
    deployed = Deployed(network).eval()
    with tempfile.NamedTemporaryFile(suffix=EXPORT_SUFFIXES[kind]) as file:
        try:
            agreement, difference = compare(
                deployed, export(deployed, kind, file.name, {}), image, size
            )
        except Exception as error:  # An exporter can raise any type of error.
            return f"{FAILS}: {one_line(error)[:150]}"
    least, most = LIMITS
    verdict = "" if agreement >= least and difference <= most else f"{FAILS}: "
    return f"{verdict}{agreement:.3%}, {difference:.0e}"


def peak_memory(name: str, size: int) -> int:
    """Return the memory, in bytes, needed to build a network and train it for one step."""
    with PeakMemory(on_gpu=False) as peak:
        step(build(name), size)
    return peak.bytes


def print_speeds(size: int) -> dict[str, Any]:
    """Print the speed and the peak memory of each network in FAST, and return the table."""
    table = Table("network", "million parameters", "images/s", "relative to the first", "peak GB")
    models = {name: build(name) for name in FAST}
    steps = {
        name: functools.partial(seconds_of, functools.partial(step, model, size))
        for name, model in models.items()
    }
    times = {name: statistics.median(found) for name, found in in_turn(steps, 5, True).items()}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        for name, seconds in times.items():
            parameters = sum(p.numel() for p in models[name].parameters()) / 1e6
            peak = pool.submit(peak_memory, name, size).result() / 1e9
            cells = f"{2 / seconds:.2f}", f"{times[FAST[0]] / seconds:.2f}x", f"{peak:.2f}"
            table.add(name, f"{parameters:.1f}", *cells)
    return table.result()


def print_scores(options: argparse.Namespace) -> dict[str, Any]:
    """Print the mIoU on CamVid of each contender and seed, and return the table."""
    table = Table("network", "seed", "minutes", "batches", "epochs", "mIoU")
    for seed in options.seeds:
        for name, settings in CONTENDERS.items():
            text = ["--path", options.camvid, "--minutes", str(options.minutes)]
            args = camvid.arguments([*text, "--evaluations", "1", "--probe", str(options.probe)])
            model = {"name": name, "num_classes": args.classes, "backbone_weights": None}
            model["backbone_arch"] = args.arch
            found = camvid.train(args, "none", model=model, seed=seed, **settings)
            last = found["evaluations"][-1]
            cells = f"{found['minutes']:.2f}", found["batches"], f"{found['epochs']:.1f}"
            table.add(name, seed, *cells, f"{last['miou']:.2f}")
    return table.result()


@quiet()
def main(argv: list[str] | None = None) -> int:
    """Print the table, and return the number of networks that fail."""
    parser = make_parser(__doc__)
    parser.add_argument("--names", nargs="+", default=NAMES, help="names of timm's networks")
    parser.add_argument("--size", type=int, default=96, help="image size in pixels")
    parser.add_argument("--speed", action="store_true", help="measure training steps instead")
    parser.add_argument("--camvid", help="CamVid in ADE20K's layout, to compare mIoU instead")
    parser.add_argument("--minutes", type=float, default=20, help="--camvid: minutes per run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="--camvid: seeds")
    parser.add_argument("--probe", type=int, default=20, help="--camvid: steps to time in advance")
    options = parser.parse_args(argv)
    if options.camvid:
        write_json(options, print_scores(options))
        return 0
    if options.speed:
        write_json(options, print_speeds(options.size))
        return 0
    columns = ["timm:", "million parameters", "size divisor", "loss", *FORMATS]
    table = Table(*columns, "training, rebuilding, another size")

    def test(name: str) -> list[Any]:
        row = measure(name, options.size)
        cells = [f"{row['parameters']:.1f}", row["divisor"], f"{row['loss']:.3f}"]
        return [*cells, *(row[kind] for kind in FORMATS.values())]

    failed = print_rows(table, {name: (name,) for name in options.names}, test)
    failed += sum(any(str(cell).startswith(FAILS) for cell in cells) for cells in table.rows)
    print(f"\n{len(options.names) - failed} of {len(options.names)} networks work")
    write_json(options, table.result())
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
