"""Weights are read from checkpoints in many formats; malicious checkpoints are rejected."""

from __future__ import annotations

import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.utils.checkpoint import safe_torch_load

from checkpointing.rebuild import build_network
from checkpointing.weights import check_checkpoint, load_weights
from errors import WeightsError
from networks.deeplab import infer_architecture
from tests.support.artifacts import finished_run, random_network
from tests.support.weights import same
from training.start import guarded_loading

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture(scope="module")
def checkpoint() -> str:
    """The last checkpoint of a run with EMA."""
    _, folder = finished_run()
    return os.path.join(folder, "latest-rank0.pt")


@pytest.mark.parametrize(
    "prefix", ["", "module.", "module.module.", "module._orig_mod.module.", "model."]
)
def test_state_dicts_load_with_any_parameter_name_prefix(tmp_path: Path, prefix: str):
    state = random_network().state_dict()
    named = {prefix + key: value for key, value in state.items()}
    named["metric.matrix"] = torch.zeros(2)
    path = tmp_path / "weights.pt"
    for content in (named, {"state_dict": named}, {"state": {"model": named}}):
        torch.save(content, path)
        assert same(load_weights(path).state, state)


def test_ema_and_training_weights_are_distinguished(checkpoint: str):
    """In a checkpoint with active EMA, the training weights are in the state of EMA."""
    trainer, _ = finished_run()
    content = torch.load(checkpoint, weights_only=False)
    assert dict(content["state"]["algorithms"])["EMA"]["ema_weights_active"] is True
    ema = next(a for a in trainer.state.algorithms if type(a).__name__ == "EMA")
    ema_weights = {**ema.ema_model.named_parameters_dict, **ema.ema_model.named_buffers_dict}
    ema_weights = {key.removeprefix("module."): value for key, value in ema_weights.items()}
    model = trainer.state.model.module.state_dict()
    training, average = (ema_weights, model) if ema.ema_weights_active else (model, ema_weights)
    for which, expected in (("ema", average), ("training", training)):
        weights = load_weights(checkpoint, which)
        assert weights.which == which
        assert same(weights.state, dict(expected))
    assert not same(load_weights(checkpoint, "ema").state, dict(training))


def test_ema_and_training_weights_are_distinguished_if_swapped(checkpoint: str, tmp_path: Path):
    """Read a checkpoint in which the EMA weights are in the state of EMA, or do not exist yet."""
    content = torch.load(checkpoint, weights_only=False)
    ema = dict(content["state"]["algorithms"])["EMA"]
    ema["ema_weights_active"] = False
    torch.save(content, tmp_path / "swapped.pt")
    swapped = load_weights(tmp_path / "swapped.pt", "ema")
    assert same(swapped.state, load_weights(checkpoint, "training").state)
    ema["ema_started"] = False
    torch.save(content, tmp_path / "early.pt")
    early = load_weights(tmp_path / "early.pt", "ema")
    assert early.which == "training"
    assert same(early.state, load_weights(checkpoint, "ema").state)


def test_checkpoint_contains_config_and_class_names(checkpoint: str):
    check_checkpoint(checkpoint)
    weights = load_weights(checkpoint)
    assert weights.config["eval_dataset"]["final_size"] == 32
    assert [c.name for c in weights.classes][:2] == ["plain", "rows"]


class Payload:
    """An object that unpickles to whatever `function(*arguments)` returns."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("function", [os.system, subprocess.call, eval, exec])
@pytest.mark.parametrize("legacy", [False, True])
def test_malicious_code_in_weights_file_does_not_run(tmp_path: Path, function: Any, legacy: bool):
    marker, path = tmp_path / "ran", tmp_path / "planted.pt"
    command = f"touch {marker}"
    if function in (eval, exec):
        command = f"__import__('os').system({command!r})"
    elif function is subprocess.call:
        command = ["touch", str(marker)]
    state = {f"module.{key}": value for key, value in random_network().state_dict().items()}
    content = {"state": {"model": state, "extra": Payload(function, command)}}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    for read in (load_weights, check_checkpoint):
        with pytest.raises(
            WeightsError, match=r"planted\.pt: rejected, because it contains .*could run code"
        ) as error:
            read(path)
        assert "\n" not in str(error.value)
    # Composer's own loading function is guarded as well.
    with guarded_loading(), pytest.raises(WeightsError):
        safe_torch_load(path)
    assert not marker.exists()
    safe_torch_load(path)  # without the check, the code runs
    assert marker.exists()


def test_unusable_weights_files_are_rejected(tmp_path: Path, checkpoint: str):
    content_of_checkpoint = Path(checkpoint).read_bytes()
    files = {
        "empty.pt": b"",
        "text.pt": b"hello",
        "pickle.pt": pickle.dumps({"state": {}}),
        "cut.pt": content_of_checkpoint[: len(content_of_checkpoint) // 2],
        "cut.safetensors": b"\x10\x00\x00\x00\x00\x00\x00\x00{}",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"state": {"model": {"fc.weight": torch.zeros(2, 2)}}}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in [*files, "list.pt", "missing.pt", "missing.safetensors", "."]:
        with pytest.raises(WeightsError) as error:
            load_weights(tmp_path / name)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    for name in ("cut.pt", "list.pt", "missing.pt"):
        with pytest.raises(WeightsError):
            check_checkpoint(tmp_path / name)
    other = load_weights(tmp_path / "other.pt")
    assert list(other.state) == ["fc.weight"]
    with pytest.raises(
        WeightsError,
        match=r"^other\.pt: the weights do not belong to a DeepLabV3 from this project",
    ):
        build_network(other, "other.pt")
    resnet = {
        "backbone." + key: v
        for key, v in {"layer1.0.conv2.weight": torch.zeros(64, 64, 3, 3)}.items()
    }
    with pytest.raises(WeightsError, match="do not belong to a DeepLabV3 from this project"):
        infer_architecture(resnet)
