"""Any checkpoint's weights are read, whatever wraps their names; what would run code is refused."""

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
from checkpointing.weights import (
    check_checkpoint,
    guarded_unpickling,
    load_weights,
)
from errors import WeightsError
from networks.deeplab import infer_architecture
from tests.support.artifacts import finished_run, random_network
from tests.support.weights import same

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture(scope="module")
def checkpoint() -> str:
    """A checkpoint that Composer wrote at the end of a run with EMA."""
    _, folder = finished_run()
    return os.path.join(folder, "latest-rank0.pt")


@pytest.mark.parametrize(
    "prefix", ["", "module.", "module.module.", "module._orig_mod.module.", "model."]
)
def test_reads_state_dicts(tmp_path: Path, prefix: str):
    state = random_network().state_dict()
    named = {prefix + key: value for key, value in state.items()}
    named["metric.matrix"] = torch.zeros(2)
    path = tmp_path / "weights.pt"
    for content in (named, {"state_dict": named}, {"state": {"model": named}}):
        torch.save(content, path)
        assert same(load_weights(path).state, state)


def test_average_and_training_weights(checkpoint: str):
    """At a checkpoint Composer's EMA has its weights in the model, and the others in its state."""
    trainer, _ = finished_run()
    content = torch.load(checkpoint, weights_only=False)
    assert dict(content["state"]["algorithms"])["EMA"]["ema_weights_active"] is True
    ema = next(a for a in trainer.state.algorithms if type(a).__name__ == "EMA")
    kept = {**ema.ema_model.named_parameters_dict, **ema.ema_model.named_buffers_dict}
    kept = {key.removeprefix("module."): value for key, value in kept.items()}
    model = trainer.state.model.module.state_dict()
    training, average = (kept, model) if ema.ema_weights_active else (model, kept)
    for which, expected in (("ema", average), ("training", training)):
        found = load_weights(checkpoint, which)
        assert found.which == which
        assert same(found.state, dict(expected))
    assert not same(load_weights(checkpoint, "ema").state, dict(training))


def test_the_other_way_round(checkpoint: str, tmp_path: Path):
    """A checkpoint saved when the training weights were in the model gives the average as well."""
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


def test_a_checkpoint_says_what_it_is(checkpoint: str):
    check_checkpoint(checkpoint)
    found = load_weights(checkpoint)
    assert found.config["eval_dataset"]["final_size"] == 32
    assert [c.name for c in found.classes][:2] == ["plain", "rows"]


class Payload:
    """Unpickles to whatever `function(*arguments)` returns."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("function", [os.system, subprocess.call, eval, exec])
@pytest.mark.parametrize("legacy", [False, True])
def test_no_planted_code_runs(tmp_path: Path, function: Any, legacy: bool):
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
    # Composer, about to resume from it, asks first.
    with guarded_unpickling(), pytest.raises(WeightsError):
        safe_torch_load(path)
    assert not marker.exists()
    safe_torch_load(path)  # the payload is real: without the check it runs
    assert marker.exists()


def test_unusable_files(tmp_path: Path, checkpoint: str):
    whole = Path(checkpoint).read_bytes()
    files = {
        "empty.pt": b"",
        "text.pt": b"hello",
        "pickle.pt": pickle.dumps({"state": {}}),
        "cut.pt": whole[: len(whole) // 2],
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
