"""Tests of training/composer_internals.py."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
from composer import Trainer
from composer.trainer._scaler import ClosureGradScaler
from torch import nn

from tests.support.paths import ROOT
from training import composer_internals
from training.composer_internals import TRAINER_METHODS, EMAParameters

HERE = {Path(composer_internals.__file__), Path(__file__)}
FILES = [
    path
    for folder in (
        ".",
        "training",
        "checkpointing",
        "dataset",
        "segmentation",
        "benchmarks",
        "benchmarks/studies",
        "tests",
    )
    for path in sorted((ROOT / folder).glob("*.py"))
    if path not in HERE
]
# Names in these modules are private, because Composer documents them elsewhere.
PRIVATE_MODULES = ("composer.algorithms.ema.ema",)


def private_names(source: str) -> list[str]:
    """Return the private names of Composer, Streaming and the trainer in Python source."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            foreign = parts[0] in ("composer", "streaming")
            if foreign and (node.module in PRIVATE_MODULES or any(p[0] == "_" for p in parts)):
                names.append(".".join(parts))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            if private and node.value.id == "trainer":
                names.append(f"trainer.{node.attr}")
    return names


def test_private_composer_names_are_used_in_one_module_only() -> None:
    assert len(FILES) > 100
    names = {path.name: private_names(path.read_text()) for path in FILES}
    assert not {file: private for file, private in names.items() if private}
    assert private_names(Path(composer_internals.__file__).read_text())


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from composer.trainer._scaler import ClosureGradScaler", "composer.trainer._scaler"),
        ("def f():\n    from composer.utils import _x", "composer.utils._x"),
        ("from streaming.base._y import z", "streaming.base._y"),
        ("trainer._train_data_spec", "trainer._train_data_spec"),
    ],
)
def test_use_of_a_private_name_is_detected(source: str, name: str) -> None:
    (found,) = private_names(source)
    assert found.startswith(name)


def test_composer_trainer_has_the_methods_that_we_call() -> None:
    assert all(callable(getattr(Trainer, name)) for name in TRAINER_METHODS)


def test_ema_parameters_hold_and_swap_network_tensors() -> None:
    network = nn.BatchNorm1d(2)
    average = EMAParameters(network)
    assert average.named_parameters_dict.keys() == dict(network.named_parameters()).keys()
    assert average.named_buffers_dict.keys() == dict(network.named_buffers()).keys()
    with torch.no_grad():
        network.weight.fill_(7.0)
    average.swap_params(network)
    assert network.weight.tolist() == [1.0, 1.0]
    assert average.named_parameters_dict["weight"].tolist() == [7.0, 7.0]
    assert list(inspect.signature(average.move_params_to_device).parameters) == [
        "destination_model"
    ]


def test_closure_grad_scaler_step_has_the_expected_signature() -> None:
    signature = inspect.signature(ClosureGradScaler.step)
    assert list(signature.parameters) == ["self", "optimizer", "args", "kwargs"]
