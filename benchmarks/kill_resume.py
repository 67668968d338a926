"""Kill runs with SIGKILL, resume them, and compare the results with undisturbed runs.

    python -m benchmarks.kill_resume                      # takes 5 minutes
    python -m benchmarks.kill_resume --recipes hot --sources folders --seed 3

Each row of the Markdown table is one run of DeepLabV3+ with a four-block ResNet, in fp32 on one
core. The network trains on generated 32-pixel images, for 2 epochs of 6 batches. The test kills
the run at a random batch, during a random evaluation or at a random point while it saves a
checkpoint. Then the test starts the run again with the same config and lets it finish.

At the end, the test compares the weights, the averaged weights and the optimizer state with those
of the undisturbed run. The test also compares all losses and mIoUs that were logged before and
after the run was killed.
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
BATCHES = 12  # Length of each run: two epochs of 6 batches.
KILLS = {
    "mid-epoch": ("forward", "batch"),
    "evaluation": ("eval",),
    "save": ("write", "rename", "pointer", "remove"),
}


def draw_kill(point: str, save_every: int, rng: random.Random) -> Death:
    """Choose a random moment, within the given part of a run, at which to kill the run."""
    moment = rng.choice(KILLS[point])
    if point == "mid-epoch":
        return Death(moment, rng.randrange(1, BATCHES))
    if point == "evaluation":
        # Each run has two evaluations of two batches each, so there are four moments to choose
        # from.
        return Death(moment, rng.randrange(4))
    saves = BATCHES // save_every
    # A run keeps two checkpoints, so the third save is the first to remove an old one.
    if moment == "remove":
        return Death(moment, rng.randrange(saves - 2))
    return Death(moment, rng.randrange(1, saves))


def cases(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the parameters for each row of the table."""
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
    """Kill and resume a run; return the largest tensor difference and whether the logs match."""
    name = f"{folder}/{case['recipe']}-{case['source']}"
    config = make_config(f"{folder}/data", case["recipe"], case["source"], case["workers"])
    if not os.path.exists(name):
        finished = run({**config, "save_folder": name}, f"{name}.log")
        assert finished == 0, f"the run that is not killed ended with {finished}"
    save = {"save_interval": f"{case['save_every']}ba", "save_num_checkpoints_to_keep": 2}
    with tempfile.TemporaryDirectory() as killed:
        config |= {"save_folder": killed, "autoresume": True, **save}
        status = run(config, f"{killed}/log", case["kill"])
        assert status == -signal.SIGKILL, f"the run exited before it was killed ({status})"
        status = run(config, f"{killed}/log")
        assert status == 0, f"the resumed run failed with status {status}"
        return largest_difference(killed, name), same_log(f"{killed}/log", f"{name}.log")


def main() -> int:
    """Print the table, and return 1 if a resumed run differs from the undisturbed run."""
    parser = make_parser(__doc__)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--seed", type=int, default=0, help="seed of the kills (default: 0)")
    arguments = parser.parse_args()
    columns = "recipe", "data", "killed", "at", "save interval", "workers", "largest difference"
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
