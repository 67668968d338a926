"""A test that kills runs with SIGKILL, resumes them, and compares them with undisturbed runs.

    python -m benchmarks.kill_resume                      # the table, as Markdown; 5 minutes
    python -m benchmarks.kill_resume --recipes hot --sources folders --seed 3

Each row is one run of DeepLabV3+ with a ResNet of four blocks, in fp32 on one core. It trains on
generated images of 32 pixels, for 2 epochs of 6 batches. The run is killed at a random batch, in a
random evaluation or at a random point of a save. Then it is started again with the same config
until it ends.

The benchmark compares the weights, the averaged weights and the optimizer state at the end. It also
compares every loss and mIoU that any process of the run logged.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks.harness import Table, make_parser, write_json
from tests.support.forked import Death, run
from tests.support.resumed_runs import (
    RECIPES,
    largest_difference,
    make_config,
    make_data,
    same_log,
)

SOURCES = ("folders", "shards")
BATCHES = 12  # Two epochs of 6 batches.
KILLS = {
    "mid-epoch": ("forward", "batch"),
    "evaluation": ("eval",),
    "save": ("write", "rename", "pointer", "remove"),
}


def draw_kill(point: str, save_every: int, rng: random.Random) -> Death:
    """Return a random moment of a type that occurs in a run with the given save interval."""
    moment = rng.choice(KILLS[point])
    if point == "mid-epoch":
        return Death(moment, rng.randrange(1, BATCHES))
    if point == "evaluation":
        return Death(moment, rng.randrange(4))  # The run has 2 evaluations of 2 batches.
    saves = BATCHES // save_every
    if moment == "remove":  # The third save is the first that removes a checkpoint.
        return Death(moment, rng.randrange(saves - 2))
    return Death(moment, rng.randrange(1, saves))


def cases(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the parameters of each row."""
    rng = random.Random(arguments.seed)
    for recipe in arguments.recipes:
        for source in arguments.sources:
            for point in KILLS:
                save_every = rng.choice((1, 2, 3, 4))
                yield {
                    "recipe": recipe,
                    "source": source,
                    "point": point,
                    "kill": draw_kill(point, save_every, rng),
                    "save_every": save_every,
                    "workers": rng.choice((0, 0, 1, 2)),
                }


def measure(case: dict[str, Any], folder: str) -> tuple[float, bool]:
    """Return the largest difference after a kill, and whether the logs are the same."""
    name = f"{folder}/{case['recipe']}-{case['source']}"
    config = make_config(f"{folder}/data", case["recipe"], case["source"], case["workers"])
    if not os.path.exists(name):
        finished = run({**config, "save_folder": name}, f"{name}.log")
        assert finished == 0, f"the run that is not killed ended with {finished}"
    save = {"save_interval": f"{case['save_every']}ba", "save_num_checkpoints_to_keep": 2}
    with tempfile.TemporaryDirectory() as killed:
        config |= {"save_folder": killed, "autoresume": True, **save}
        status = run(config, f"{killed}/log", case["kill"])
        assert status == -signal.SIGKILL, f"the run was not killed: it ended with {status}"
        status = run(config, f"{killed}/log")
        assert status == 0, f"the run that went on ended with {status}"
        return largest_difference(killed, name), same_log(f"{killed}/log", f"{name}.log")


def main() -> int:
    """Print the table; return 1 if a run differs."""
    parser = make_parser(__doc__)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when (0)")
    arguments = parser.parse_args()
    columns = "recipe", "data", "killed", "at", "saves every", "workers", "largest difference"
    table = Table(*columns, "losses")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        make_data(f"{folder}/data")
        for case in cases(arguments):
            difference, same = measure(case, folder)
            worst = max(worst, difference, 0 if same else float("inf"))
            kill = f"{case['kill'].moment} {case['kill'].number}"
            where = case["recipe"], case["source"], case["point"], kill
            losses = "match" if same else "DIFFER"
            table.add(*where, f"{case['save_every']}ba", case["workers"], difference, losses)
    write_json(arguments, table.result())
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main())
