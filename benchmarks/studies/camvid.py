"""Training of each recipe on CamVid from scratch for the same number of minutes: mIoU over time.

    python -m benchmarks.studies.camvid --path camvid --minutes 5
    python -m benchmarks.studies.camvid --path camvid --recipes none mild --json out.json

A schedule needs the length of the run. So each run's steps are timed first, and its length is set
in batches. Evaluations are not counted. The half-life of EMA is a twentieth of the run; all other
numbers are the recipe's. `--path` is a folder in ADE20K's layout.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Sized
from pathlib import Path
from typing import Any, cast

import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from torch.utils.data import DataLoader

import main as program
from benchmarks.train_step import RECIPES, Steps, machine, never_evaluate, release
from training.config import resolve
from training.schema import Config


class Evaluations(Callback):
    """A callback that records batches, training minutes and mIoU (percent) at each evaluation."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def eval_end(self, state: State, logger: Logger) -> None:
        # Composer counts only training in total_wct.
        self.found.append(
            {
                "batches": state.timestamp.batch.value,
                "minutes": state.timestamp.total_wct.total_seconds() / 60,
                "miou": float(state.eval_metric_values["MIoU"]),
            }
        )


def config(args: argparse.Namespace, recipe: str, batches: int) -> Config:
    """Return the config of a run with `args.evaluations` evaluations."""
    dataset: dict[str, Any] = {
        "path": args.path,
        "base_size": args.base_size,
        "final_size": args.size,
        "batch_size": args.batch,
    }
    if args.workers is not None:
        dataset["num_workers"] = args.workers
    raw: dict[str, Any] = {
        "run_name": f"camvid-{recipe}",
        "recipe_name": None if recipe == "none" else recipe,
        "max_duration": f"{batches}ba",
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
        "eval_interval": f"{max(batches // args.evaluations, 1)}ba",
        "optimizer": {"lr": args.lr},
        "pictures": 0,
    }
    if recipe != "none":
        half_life = {"half_life": f"{max(batches // 20, 1)}ba", "update_interval": "1ba"}
        raw[recipe] = {"max_duration": f"{batches}ba", "ema": half_life}
    return resolve(raw)


def seconds_per_step(args: argparse.Namespace, recipe: str) -> float:
    """Return the seconds per step, measured in a short run whose first half is a warm-up."""
    steps = Steps()
    trainer = program.build_trainer(config(args, recipe, 10**6), callbacks=[steps])
    never_evaluate(trainer)
    trainer.fit(duration=f"{2 * args.probe}ba")
    trainer.close()
    return steps.mean(args.probe)


def train(args: argparse.Namespace, recipe: str) -> dict[str, Any]:
    """Train one recipe for `args.minutes`."""
    release()
    seconds = seconds_per_step(args, recipe)
    release()
    batches = max(round(60 * args.minutes / seconds), args.evaluations)
    evaluations = Evaluations()
    trainer = program.build_trainer(config(args, recipe, batches), callbacks=[evaluations])
    trainer.fit()
    trainer.close()
    images = batches * args.batch
    loader = cast(DataLoader, trainer.state.train_dataloader)
    return {
        "batches": batches,
        "epochs": images / len(cast(Sized, loader.dataset)),
        "minutes": evaluations.found[-1]["minutes"],
        "evaluations": evaluations.found,
    }


def header(args: argparse.Namespace) -> str:
    """Return the head of the Markdown table, with one column per evaluation."""
    parts = [f"{part}/{args.evaluations}" for part in range(1, args.evaluations + 1)]
    return (
        f"CamVid from scratch, {args.arch}, {args.size} px, batch {args.batch}, lr {args.lr}: "
        "mIoU in percent after a part of the run\n\n"
        f"| recipe | minutes | epochs | {' | '.join(parts)} |\n" + "|---" * (3 + len(parts)) + "|"
    )


def row(recipe: str, found: dict[str, Any], evaluations: int) -> str:
    """Return the row of a recipe."""
    scores = [f"{one['miou']:.2f}" for one in found["evaluations"]][:evaluations]
    scores[-1] = f"{found['evaluations'][-1]['miou']:.2f}"
    cells = [recipe, f"{found['minutes']:.2f}", f"{found['epochs']:.1f}", *scores]
    return f"| {' | '.join(cells)} |"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--path", required=True, help="CamVid in ADE20K's layout")
    parser.add_argument("--minutes", type=float, default=5, help="of training, for each recipe")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--classes", type=int, default=11)
    parser.add_argument("--size", type=int, default=512 if on_gpu else 128, help="pixels")
    parser.add_argument("--base-size", type=int, help="before the random resize; default: SIZE")
    parser.add_argument("--batch", type=int, default=16 if on_gpu else 8, help="images a step")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--evaluations", type=int, default=4, help="spread over the run")
    parser.add_argument("--probe", type=int, default=20, help="steps to take a step's time from")
    parser.add_argument("--workers", type=int, help="of the loader; default: main.py's")
    parser.add_argument("--precision", default="auto", help="main.py's")
    parser.add_argument("--compile", default="auto", help="main.py's")
    parser.add_argument("--json", help="write the result there as well")
    args = parser.parse_args(argv)
    args.base_size = args.base_size or args.size
    args.compile = {"true": True, "false": False}.get(str(args.compile).lower(), args.compile)
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the command line and return the result that --json writes."""
    args = arguments(argv)
    warnings.simplefilter("ignore")
    logging.getLogger("composer").setLevel(logging.ERROR)
    names = ("arch", "size", "batch", "lr", "minutes", "evaluations")
    result: dict[str, Any] = {name: getattr(args, name) for name in names}
    result |= {"machine": machine(), "recipes": {}}
    print(header(args))
    for recipe in args.recipes:
        result["recipes"][recipe] = train(args, recipe)
        print(row(recipe, result["recipes"][recipe], args.evaluations), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
