"""Any checkpoint's weights are read, whatever wraps their names; what would run code is refused."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import CLASSES, finished_run, random_network, random_weights
from composer.metrics import MIoU
from composer.utils.checkpoint import safe_torch_load
from safetensors.torch import save_file

from checkpointing import weights as weights_module
from checkpointing.partial_load import load_fitting
from checkpointing.rebuild import build_network
from checkpointing.weights import (
    check_checkpoint,
    guarded_unpickling,
    load_weights,
    save_weights,
)
from errors import WeightsError
from model import deeplabv3
from networks.deeplab import infer_architecture
from segmentation.classes import load_classes

pytestmark = pytest.mark.trains


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key]) for key in expected
    )


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


def test_reads_a_compiled_part(tmp_path: Path):
    state = random_network().state_dict()
    named = {key.replace("backbone.", "backbone._orig_mod."): v for key, v in state.items()}
    torch.save(named, tmp_path / "weights.pt")
    assert same(load_weights(tmp_path / "weights.pt").state, state)


def test_safetensors_round_trip(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    state = copy.deepcopy(random_network()).to(memory_format=torch.channels_last).state_dict()
    classes = load_classes(None, 12)
    save_weights(
        path, {f"module.{key}": value for key, value in state.items()}, {"a": [1]}, classes, "ema"
    )
    found = load_weights(path)
    assert found.which == "ema"
    assert same(found.state, state)
    assert (found.config, found.classes, found.num_classes) == ({"a": [1]}, classes, 12)
    assert os.listdir(tmp_path) == ["weights.safetensors"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("use_plus", [True, False])
@pytest.mark.parametrize(
    "arch",
    [
        "resnet50",
        "resnet101",
        "resnet152",
        "resnext50_32x4d",
        "resnext101_32x8d",
        "resnext101_64x4d",
        "wide_resnet50_2",
        "wide_resnet101_2",
    ],
)
def test_infers_every_architecture(arch: str, use_plus: bool):
    with torch.device("meta"):
        network = deeplabv3(7, arch, sync_bn=False, use_plus=use_plus)
    found = infer_architecture(network.state_dict())
    assert found == {"num_classes": 7, "backbone_arch": arch, "use_plus": use_plus}


def test_builds_the_network():
    network = random_network()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    photo = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        rebuilt = build_network(weights_module.Weights(state))(photo)
        expected = network.classifier(tuple(network.backbone(photo).values()))
    torch.testing.assert_close(rebuilt, expected)
    del state["classifier.bottleneck.bn.weight"]
    with pytest.raises(
        WeightsError, match=r"Missing key.*classifier\.bottleneck\.bn\.weight"
    ) as error:
        build_network(weights_module.Weights(state))
    assert "\n" not in str(error.value)


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
            WeightsError, match=r"planted\.pt: refused: it holds .*could run code"
        ) as error:
            read(path)
        assert "\n" not in str(error.value)
    # Composer, about to resume from it, asks first.
    with guarded_unpickling(), pytest.raises(WeightsError):
        safe_torch_load(path)
    assert not marker.exists()
    safe_torch_load(path)  # the payload is real: without the check it runs
    assert marker.exists()


def test_metrics_in_old_checkpoints(tmp_path: Path):
    """Composer before 0.13 pickled its metrics: harmless for the weights, refused for a resume."""
    state = random_network().state_dict()
    named = {f"module.{key}": value for key, value in state.items()}
    content = {"state": {"model": named, "train_metrics": {"MIoU": MIoU(12)}}}
    torch.save(content, tmp_path / "old.pt")
    assert same(load_weights(tmp_path / "old.pt").state, state)
    with pytest.raises(WeightsError, match=r"holds composer\.metrics\.metrics\.MIoU"):
        check_checkpoint(tmp_path / "old.pt")


def test_algorithms_in_old_checkpoints(tmp_path: Path):
    """Composer kept them by name before it kept their order, and still reads that."""
    state = random_network().state_dict()
    algorithms = {"LabelSmoothing": {"smoothing": 0.1}}
    torch.save({"state": {"model": state, "algorithms": algorithms}}, tmp_path / "old.pt")
    assert same(load_weights(tmp_path / "old.pt").state, state)


@pytest.mark.parametrize(
    "trained",
    [
        {"algorithms": None},
        {"algorithms": [("EMA", {"ema_started": True})]},
        {"callbacks": None},
        {"callbacks": {"RunRecord": {"classes": "road, sky"}}},
        {"callbacks": {"RunRecord": {"config": "[1]"}}},
    ],
)
def test_a_state_that_is_not_composers(tmp_path: Path, trained: dict[str, Any]):
    path = tmp_path / "other.pt"
    torch.save({"state": {"model": {"fc.weight": torch.zeros(2, 2)}, **trained}}, path)
    with pytest.raises(WeightsError, match=r"other\.pt: its weights cannot be read: "):
        load_weights(path)


@pytest.mark.parametrize("config", ["unet", "[1]", '{"model": "unet"}'])
def test_a_config_of_another_project(tmp_path: Path, config: str):
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors", {"config": config})
    with pytest.raises(WeightsError, match="the config in the file's metadata"):
        load_weights(tmp_path / "other.safetensors")


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
    with pytest.raises(WeightsError, match=r"^other\.pt: not a DeepLabV3 of this project"):
        build_network(other, "other.pt")
    resnet = {
        "backbone." + key: v
        for key, v in {"layer1.0.conv2.weight": torch.zeros(64, 64, 3, 3)}.items()
    }
    with pytest.raises(WeightsError, match="not a DeepLabV3 of this project"):
        infer_architecture(resnet)


def test_what_fits_is_loaded_and_the_rest_named():
    weights = load_weights(random_weights())
    torch.manual_seed(1)
    network = deeplabv3(7, "resnet101", sync_bn=False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    line = load_fitting(network, weights, "file.pt")
    left = [
        n for n, t in before.items() if n not in weights.state or t.shape != weights.state[n].shape
    ]
    assert line == (
        "file.pt: classifier.conv_seg: 12 -> 7 classes, left new; "
        f"{len(left) - 2} tensors left new, first {left[0]}"
    )
    assert 100 < len(left) < len(before) / 2
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name] if name in left else weights.state[name])
    with pytest.raises(WeightsError, match=r"^file.pt: \d+ of the network's \d+ .*load_least=0.9"):
        load_fitting(network, weights, "file.pt", least=0.9)


def test_classes_of_the_same_name_keep_their_scores():
    weights = load_weights(random_weights())
    network = deeplabv3(3, "resnet50", sync_bn=False)
    before = network.classifier.conv_seg.weight[1].clone()
    classes = load_classes(["waves", "new", "plain"], 3)
    line = load_fitting(network, weights, "f", classes=classes)
    assert (
        line == "f: classifier.conv_seg: 12 -> 3 classes, 2 taken over by name, the others left new"
    )
    rows, names = network.classifier.conv_seg.weight, [c.name for c in weights.classes]
    for new, name in ((0, "waves"), (2, "plain")):
        expected = weights.state["classifier.conv_seg.weight"][names.index(name)]
        assert torch.equal(rows[new], expected)
    assert torch.equal(rows[1], before)
    assert load_fitting(random_network(), weights, "f") is None


@pytest.mark.parametrize(
    ("names", "note"),
    [
        pytest.param(
            CLASSES[::-1], "classes in another order, matched by name", id="another order"
        ),
        pytest.param(
            [*CLASSES[:0:-1], "new"],
            "classes of other names, 11 taken over by name, the others left new",
            id="one other name",
        ),
        pytest.param(
            [f"kind {letter}" for letter in "abcdefghijkl"],
            "classes of other names, none has the same name, all left new",
            id="all other names",
        ),
        pytest.param(None, "classes of other names, left new", id="not to be matched"),
    ],
)
def test_as_many_classes_that_are_not_the_same(names: list[str] | None, note: str):
    weights = load_weights(random_weights())
    network = deeplabv3(12, "resnet50", sync_bn=False)
    before = network.classifier.conv_seg.weight.detach().clone()
    classes = load_classes(names, 12) if names else None
    tensors = [f"classifier.conv_seg.{name}" for name in ("weight", "bias")]
    line = load_fitting(network, weights, "f", 1.0, classes, 12, tensors)
    assert line == f"f: classifier.conv_seg: {note}"
    for place, row in enumerate(network.classifier.conv_seg.weight):
        name = names[place] if names else None
        theirs = weights.state["classifier.conv_seg.weight"]
        expected = theirs[CLASSES.index(name)] if name in CLASSES else before[place]
        assert torch.equal(row, expected)
