"""Measure how class weights and rare-class sampling change the IoU on CamVid.

    python -m benchmarks.studies.rare_classes --path camvid --minutes 3 --size 64 --batch 4
    python -m benchmarks.studies.rare_classes --path camvid --seeds 17 --minutes 1 --json out.json

For each seed, all variants train for the same number of minutes. The options of
`benchmarks.studies.camvid` also work here. The table shows the mean IoUs over the seeds. A class is
rare if the fraction of images that contain it is below `--rare`. CamVid's rarest class, fence,
occurs in 47% of the images.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from composer import Callback
from composer.core import State
from composer.loggers import Logger
from torch import Tensor
from torch.utils.data import DataLoader

import main as program
from benchmarks.harness import head, machine, quiet, release, row, write_json
from benchmarks.studies import camvid
from segmentation.classes import load_classes
from segmentation.metrics import MIoU, iou_per_class
from training.schema import Config

# Maps each variant to its `class_weights` value and to whether it uses rare-class sampling.
WAYS: dict[str, tuple[Any, bool]] = {
    "neither": (None, False),
    "class_weights: auto": ("auto", False),
    "rare_class_sampling": (None, True),
    "both": ("auto", True),
}
SHOWN = ("pole", "sign symbol", "pedestrian", "bicyclist")
NAMES = Path(__file__).parents[2] / "yamls" / "camvid_classes.txt"


class LastMatrix(Callback):
    """A callback that stores the confusion matrix of the last evaluation."""

    def __init__(self) -> None:
        self.matrix: Tensor | None = None
        self.minutes = 0.0

    def eval_end(self, state: State, logger: Logger) -> None:
        metric = state.eval_metrics["eval"]["MIoU"]
        assert isinstance(metric, MIoU)
        self.matrix = metric.total_matrix
        self.minutes = state.timestamp.total_wct.total_seconds() / 60


def config(args: argparse.Namespace, way: str, seed: int, batches: int) -> Config:
    """Return the config of a run with the given number of batches and a final evaluation."""
    weights, sampled = WAYS[way]
    made = camvid.config(args, args.recipes[0], batches)
    return replace(
        made,
        seed=seed,
        eval_interval=f"{batches}ba",
        model=replace(made.model, class_weights=weights),
        train_dataset=replace(
            made.train_dataset, rare_class_sampling=args.rare if sampled else None
        ),
    )


def train(args: argparse.Namespace, way: str, seed: int, batches: int) -> dict[str, Any]:
    """Train one variant with one seed, and return its training statistics and the IoU per class."""
    release()
    last = LastMatrix()
    trainer = program.build_trainer(config(args, way, seed, batches), callbacks=[last])
    trainer.fit()
    trainer.close()
    assert last.matrix is not None
    loader = cast(DataLoader, trainer.state.train_dataloader)
    return {
        "batches": batches,
        "photos": len(cast(Sized, loader.dataset)),
        "minutes": last.minutes,
        "iou": [100 * value for value in iou_per_class(last.matrix).tolist()],
    }


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Train every variant with every seed.

    For each seed, the variants are trained one after another, so that load on the machine affects
    all variants equally.
    """
    release()
    seconds = {
        way: camvid.seconds_per_step(config(args, way, args.seeds[0], 10**6), args.probe)
        for way in args.ways
    }
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
    for seed in args.seeds:
        for way in args.ways:
            batches = max(round(60 * args.minutes / seconds[way]), 1)
            found[way].append(train(args, way, seed, batches))
            print(f"seed {seed}, {way}: mIoU {mean(found[way][-1]['iou']):.2f}", file=sys.stderr)
    return found


def mean(values: list[float]) -> float:
    """Return the mean IoU, ignoring the NaN values of classes that do not occur."""
    # NaN is not equal to itself, so this comparison drops NaN values.
    return statistics.fmean(value for value in values if value == value)


def table(found: dict[str, list[dict[str, Any]]], names: list[str]) -> str:
    """Return a Markdown table with the mean IoUs over the seeds and the range of the mIoU."""
    shown = [name for name in SHOWN if name in names] or names[:4]
    lines = [head("", "mIoU", "of the seeds", *shown, "the other classes")]
    for way, runs in found.items():
        mious = [mean(run["iou"]) for run in runs]
        by_class = {
            name: statistics.fmean(run["iou"][place] for run in runs)
            for place, name in enumerate(names)
        }
        rest = mean([by_class[name] for name in names if name not in shown])
        cells = [f"{by_class[name]:.2f}" for name in shown]
        spread = f"{min(mious):.2f}-{max(mious):.2f}"
        lines.append(row(way, f"{statistics.fmean(mious):.2f}", spread, *cells, f"{rest:.2f}"))
    return "\n".join(lines)


@quiet()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the study and return the result in the format for `--json`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--rare", type=float, default=0.7, help="largest share of a rare class")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--names", default=str(NAMES), help="file with the class names")
    own, rest = parser.parse_known_args(argv)
    if "-h" in rest or "--help" in rest:
        print(parser.format_help())
    args = camvid.arguments(rest if "--recipes" in rest else [*rest, "--recipes", "none"])
    args = argparse.Namespace(**{**vars(args), **vars(own)})
    names = [info.name for info in load_classes(args.names, args.classes)]
    found = measure(args)
    keys = ("arch", "size", "batch", "lr", "minutes", "seeds", "rare")
    result = {**{name: getattr(args, name) for name in keys}, "machine": machine(), "runs": found}
    print(
        f"CamVid from scratch, {args.arch}, {args.size} px, batch {args.batch}, lr {args.lr}, "
        f"{args.minutes:g} minutes each, rare below {args.rare:g}: IoU in percent, mean of "
        f"{len(args.seeds)} seeds\n\n{table(found, names)}"
    )
    write_json(args, result)
    return result


if __name__ == "__main__":
    main()
