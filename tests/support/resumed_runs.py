"""Configs and data of short runs, and comparisons of the logs and checkpoints of two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECIPES = ("baseline", "mild", "medium", "hot")


def make_config(data: str, recipe: str, source: str, workers: int) -> dict[str, Any]:
    """Return the config of a run of 12 steps on the data that `make_data` generates."""
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
    """Generate a data set as folders and as shards."""
    from convert_ade20k import main as convert
    from extras.preparation.synthetic import make

    make(f"{folder}/folders", training=24, validation=6, size=48)
    arguments = ["--path", f"{folder}/folders", "--out", f"{folder}/shards"]
    if convert([*arguments, "--size-limit", "20kb"]):
        raise RuntimeError("the shards could not be written")


def read_log(path: str) -> dict[tuple[int, str], list[float]]:
    """Return the logged values by step and name."""
    values: dict[tuple[int, str], list[float]] = {}
    for line in Path(path).read_text().splitlines():
        step, name, value = json.loads(line)
        values.setdefault((step, name), []).append(value)
    return values


def same_log(path: str, reference: str) -> bool:
    """Return whether two logs have the same values, with only one value per step and name."""
    values, expected = read_log(path), read_log(reference)
    return values.keys() == expected.keys() and all(
        set(logged) == set(expected[key]) and len(set(logged)) == 1
        for key, logged in values.items()
    )


def tensors(folder: str) -> dict[str, Any]:
    """Return the weights, EMA weights and optimizer state of the last checkpoint."""
    import torch

    state = torch.load(f"{folder}/latest-rank0.pt", "cpu", weights_only=False)["state"]
    named_tensors: dict[str, Any] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            named_tensors[name] = value
        elif isinstance(value, dict):
            for key, part in value.items():
                collect(f"{name}/{key}", part)
        elif isinstance(value, list | tuple):
            for i, part in enumerate(value):
                collect(f"{name}/{i}", part)

    for name in ("model", "optimizers", "algorithms"):
        collect(name, state[name])
    return named_tensors


def largest_difference(folder: str, reference: str) -> float:
    """Return the largest difference between the last checkpoints of two runs.

    The result is infinite if the tensors of the checkpoints do not correspond.
    """
    actual, expected = tensors(folder), tensors(reference)
    if actual.keys() != expected.keys():
        return float("inf")
    return max(float((actual[k].double() - expected[k].double()).abs().max()) for k in expected)
