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
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.forked import Death, run

RECIPES = ("baseline", "mild", "medium", "hot")
SOURCES = ("folders", "shards")
BATCHES = 12  # Two epochs of 6 batches.
KILLS = {
    "mid-epoch": ("forward", "batch"),
    "evaluation": ("eval",),
    "save": ("write", "rename", "pointer", "remove"),
}


def make_config(data: str, recipe: str, source: str, workers: int) -> dict[str, Any]:
    """Return the config of a run of 12 steps on the data from `make_data`."""
    dataset: dict[str, Any] = {"base_size": 32, "final_size": 32, "batch_size": 4}
    dataset |= {"num_workers": workers, "path": f"{data}/{source}"}
    if source == "shards":
        dataset |= {"is_streaming": True, "local": f"{data}/cache"}
    ema = {"half_life": "4ba", "update_interval": "1ba"}
    return {
        "run_name": "killed",
        "recipe_name": None if recipe == "baseline" else recipe,
        "max_duration": "2ep",
        **{name: {"max_duration": "2ep", "ema": ema} for name in RECIPES[1:]},
        "model": {"num_classes": 12, "backbone_arch": "resnet50", "backbone_weights": None},
        "train_dataset": dict(dataset),
        "eval_dataset": dict(dataset),
        "optimizer": {"lr": 0.01},
        "precision": "fp32",
        "pictures": 0,
        "python_log_level": "error",
    }


def make_data(folder: str) -> None:
    """Generate the images, as folders and as shards."""
    from convert_ade20k import main as convert
    from extras.preparation.synthetic import make

    make(f"{folder}/folders", training=24, validation=6, size=48)
    arguments = ["--path", f"{folder}/folders", "--out", f"{folder}/shards"]
    if convert([*arguments, "--size-limit", "20kb"]):
        raise RuntimeError("the shards could not be written")


def read_log(path: str) -> dict[tuple[int, str], list[float]]:
    """Return all logged values by step and name."""
    values: dict[tuple[int, str], list[float]] = {}
    for line in Path(path).read_text().splitlines():
        step, name, value = json.loads(line)
        values.setdefault((step, name), []).append(value)
    return values


def same_log(path: str, reference: str) -> bool:
    """Return whether two logs contain the same values, with only one value for each step."""
    values, expected = read_log(path), read_log(reference)
    return values.keys() == expected.keys() and all(
        set(found) == set(expected[key]) and len(set(found)) == 1 for key, found in values.items()
    )


def tensors(folder: str) -> dict[str, Any]:
    """Return all tensors of the last checkpoint: weights, averaged weights, optimizer state."""
    import torch

    state = torch.load(f"{folder}/latest-rank0.pt", "cpu", weights_only=False)["state"]
    found: dict[str, Any] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, part in value.items():
                collect(f"{name}/{key}", part)
        elif isinstance(value, list | tuple):
            for i, part in enumerate(value):
                collect(f"{name}/{i}", part)

    for name in ("model", "optimizers", "algorithms"):
        collect(name, state[name])
    return found


def largest_difference(folder: str, reference: str) -> float:
    """Return the largest difference between the last checkpoints of two runs.

    The result is infinite if the tensors of the checkpoints do not correspond.
    """
    found, expected = tensors(folder), tensors(reference)
    if found.keys() != expected.keys():
        return float("inf")
    return max(float((found[k].double() - expected[k].double()).abs().max()) for k in expected)


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
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when (0)")
    arguments = parser.parse_args()
    print("| recipe | data | killed | at | saves every | workers | largest difference | losses |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        make_data(f"{folder}/data")
        for case in cases(arguments):
            difference, same = measure(case, folder)
            worst = max(worst, difference, 0 if same else float("inf"))
            row = [
                case["recipe"],
                case["source"],
                case["point"],
                f"{case['kill'].moment} {case['kill'].number}",
            ]
            row += [f"{case['save_every']}ba", case["workers"], difference]
            row.append("match" if same else "DIFFER")
            print("|", " | ".join(map(str, row)), "|", flush=True)
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main())
