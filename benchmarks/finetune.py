"""What a checkpoint of other classes gives: the loss of runs that begin with it, and without.

    python -m benchmarks.finetune --path camvid      # the table, as Markdown; 10 minutes on a CPU

A network of 150 classes, of which the data have CamVid's eleven, is trained for some steps. Then
networks of eleven classes train for 50: from scratch; with that checkpoint's weights and a new last
layer; and with the scores of the classes that have the same name taken over too. All see the same
photos in the same order. The losses are means over ten steps.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import main as program
from training.config import resolve
from training.pictures import Curves

NAMES = Path(__file__).resolve().parent.parent / "yamls" / "camvid_classes.txt"
CLASSES = 150


def train(args: argparse.Namespace, batches: int, **keys: Any) -> np.ndarray:
    """Train for some batches; return their losses."""
    dataset: dict[str, Any] = {"path": args.path, "base_size": args.size, "final_size": args.size}
    dataset |= {"batch_size": args.batch, "num_workers": 0}
    model = {"num_classes": keys.pop("num_classes", 11), "backbone_arch": args.arch}
    config = {
        "run_name": "finetune",
        "max_duration": f"{batches}ba",
        "model": model | {"backbone_weights": None},
        "train_dataset": dataset,
        "eval_dataset": dict(dataset),
        "eval_interval": f"{2 * batches}ba",  # at the end alone
        "optimizer": {"lr": args.lr},
        "pictures": 0,
        "python_log_level": "error",
        "class_names": str(NAMES),
    }
    trainer = program.main(resolve(config | keys))
    (curves,) = (c for c in trainer.state.callbacks if isinstance(c, Curves))
    trainer.close()
    return np.array([loss for _, loss, _ in curves.train])


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--path", required=True, help="CamVid in ADE20K's layout")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--before", type=int, default=200, help="steps of the checkpoint's run")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.getLogger("composer").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder, "names.txt")
        known = NAMES.read_text().split("\n")
        others = [f"class {i}" for i in range(CLASSES)]
        names.write_text("\n".join(([n for n in known if n] + others)[:CLASSES]))
        many: dict[str, Any] = {"num_classes": CLASSES, "class_names": str(names), "seed": 1}
        losses = train(args, args.before, save_folder=folder, save_interval="1ep", **many)
        print(f"The checkpoint's loss: {losses[:10].mean():.3f} to {losses[-10:].mean():.3f}\n")
        load = {"load_path": f"{folder}/latest-rank0.pt", "load_weights_only": True}
        print(
            "| begins with | loss of steps 1 to 10 | of the last ten |\n|---|---|---|", flush=True
        )
        for what, keys in {
            "nothing": {},
            "the checkpoint, a new last layer": load,
            "the checkpoint, classes by their names": load | {"load_classes_by_name": True},
        }.items():
            losses = train(args, args.steps, **keys)
            first, last = losses[:10].mean(), losses[-10:].mean()
            print(f"| {what} | {first:.3f} | {last:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
