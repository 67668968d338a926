"""Compare the recipes' mIoU on CamVid after equal training times from scratch.

    python -m benchmarks.studies.camvid --path camvid --minutes 5
    python -m benchmarks.studies.camvid --path camvid --recipes none mild --json out.json

The schedule needs to know the length of a run in batches. For this reason, the benchmark first
times some training steps to find out how many batches fit in the given time. The training time
excludes evaluations. The EMA half-life is one twentieth of the run's length. All other settings are
the recipe's defaults. `--path` must be a folder in ADE20K's layout.
"""

from __future__ import annotations

import argparse
from collections.abc import Sized
from typing import Any, cast

import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from torch.utils.data import DataLoader

import main as program
from benchmarks import harness, train_step
from training.schema import Config


class Evaluations(Callback):
    """A callback that records the batch number, training time and mIoU at each evaluation."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def eval_end(self, state: State, logger: Logger) -> None:
        # Composer's `total_wct` is the training time without evaluations.
        self.found.append(
            {
                "batches": state.timestamp.batch.value,
                "minutes": state.timestamp.total_wct.total_seconds() / 60,
                "miou": float(state.eval_metric_values["MIoU"]),
            }
        )


def config(args: argparse.Namespace, recipe: str, batches: int) -> Config:
    """Return the config of a run that trains for the given number of batches."""
    changes: dict[str, Any] = {
        "run_name": f"camvid-{recipe}",
        "max_duration": f"{batches}ba",
        "eval_interval": f"{max(batches // args.evaluations, 1)}ba",
        "optimizer": {"lr": args.lr},
    }
    if recipe != "none":
        half_life = {"half_life": f"{max(batches // 20, 1)}ba", "update_interval": "1ba"}
        changes[recipe] = {"max_duration": f"{batches}ba", "ema": half_life}
    return train_step.config(args, recipe, **changes)


def seconds_per_step(settings: Config, probe: int) -> float:
    """Return the seconds per step, averaged over `probe` steps after `probe` warm-up steps."""
    steps = harness.Steps()
    trainer = program.build_trainer(settings, callbacks=[steps])
    harness.never_evaluate(trainer)
    trainer.fit(duration=f"{2 * probe}ba")
    trainer.close()
    return steps.mean(probe)


def train(args: argparse.Namespace, recipe: str) -> dict[str, Any]:
    """Train with one recipe for `args.minutes` and return its scores."""
    harness.release()
    seconds = seconds_per_step(config(args, recipe, 10**6), args.probe)
    harness.release()
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
    """Return the title and the header of the Markdown table, with one column per evaluation."""
    parts = [f"{part}/{args.evaluations}" for part in range(1, args.evaluations + 1)]
    return (
        f"CamVid from scratch, {args.arch}, {args.size} px, batch {args.batch}, lr {args.lr}: "
        "mIoU in percent after a part of the run\n\n"
        f"{harness.head('recipe', 'minutes', 'epochs', *parts)}"
    )


def score_row(recipe: str, found: dict[str, Any], evaluations: int) -> str:
    """Return the table row for a recipe."""
    scores = [f"{one['miou']:.2f}" for one in found["evaluations"]][:evaluations]
    scores[-1] = f"{found['evaluations'][-1]['miou']:.2f}"
    return harness.row(recipe, f"{found['minutes']:.2f}", f"{found['epochs']:.1f}", *scores)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command-line arguments."""
    batch = 16 if torch.cuda.is_available() else 8
    parser = train_step.make_parser(__doc__, arch="resnet50", batch=batch, classes=11)
    parser.add_argument("--path", required=True, help="CamVid in ADE20K's layout")
    parser.add_argument("--minutes", type=float, default=5, help="minutes of training per recipe")
    parser.add_argument("--base-size", type=int, help="size before the resize; default: SIZE")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--evaluations", type=int, default=4, help="evaluations per run")
    parser.add_argument("--probe", type=int, default=20, help="steps to time in advance")
    args = parser.parse_args(argv)
    args.base_size = args.base_size or args.size
    return args


@harness.quiet()
def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the study and return the result in the format for `--json`."""
    args = arguments(argv)
    names = ("arch", "size", "batch", "lr", "minutes", "evaluations")
    result: dict[str, Any] = {name: getattr(args, name) for name in names}
    result |= {"machine": harness.machine(), "recipes": {}}
    print(header(args))
    for recipe in args.recipes:
        result["recipes"][recipe] = train(args, recipe)
        print(score_row(recipe, result["recipes"][recipe], args.evaluations), flush=True)
    harness.write_json(args, result)
    return result


if __name__ == "__main__":
    main()
