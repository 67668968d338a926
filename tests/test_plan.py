"""What a run is said to take, beside what it takes."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from layouts import lay_out
from test_streaming import write
from torch.utils.flop_counter import FlopCounterMode

import main as program
from benchmarks.train_step import release, standing_bytes
from data import build_data
from errors import ModelError
from extras.planning.estimate import GPUS, estimate
from extras.planning.length import lengths, passes
from extras.planning.measure import _store
from model import build_composer_deeplabv3, deeplabv3
from networks.deeplab import create_meta_network
from training.config import load, resolve
from training.microbatch import GIB, Footprint, choose_microbatch, count, fitting
from training.precision import Precision
from training.schema import Config, TrainDatasetConfig

pytestmark = pytest.mark.usefixtures("small_network")

SIZE = 64


@pytest.fixture(scope="module")
def network(small_network: None) -> torch.nn.Module:
    result = deeplabv3(12, "resnet50").to(memory_format=torch.channels_last)
    result.upsample = False
    return result


@pytest.fixture(scope="module")
def footprint(network: torch.nn.Module) -> Footprint:
    return count(network, SIZE, torch.bfloat16)


def test_what_is_counted_is_what_a_real_pass_keeps(
    network: torch.nn.Module, footprint: Footprint
) -> None:
    """The tensors that autograd keeps, over what it keeps for half as many images."""

    def kept(images: int) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        photo = torch.randn(images, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16),
        ):
            logits = network(photo)
        assert logits.requires_grad
        return sum(storages.values())

    image = (kept(8) - kept(4)) / 4
    assert footprint.saved == pytest.approx(image, rel=0.1)
    assert footprint.saved < footprint.image < 1.5 * footprint.saved
    weights = sum(p.numel() for p in network.parameters())
    assert footprint.weights == 4 * weights <= 2.2 * footprint.fixed  # in bf16


def test_operations_are_pytorch_s(network: torch.nn.Module, footprint: Footprint) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(2, 3, SIZE, SIZE, device="cpu"))
    assert 2 * footprint.operations == pytest.approx(3 * counter.get_total_flops(), rel=0.02)
    assert next(network.parameters()).grad is None  # the network itself was left alone


def test_memory_grows_with_the_area_and_a_smaller_type_takes_less(
    network: torch.nn.Module, footprint: Footprint
) -> None:
    assert count(network, 2 * SIZE, torch.bfloat16).image == pytest.approx(
        4 * footprint.image, rel=0.03
    )
    assert count(network, SIZE, None).image > 1.5 * footprint.image


def test_what_cannot_be_counted_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """And `auto` then begins as Composer's does."""

    class Thresholds(torch.nn.Conv2d):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            result = super().forward(image)
            return result if result.mean() > 0 else -result

    with pytest.raises(ModelError, match=r"cannot be counted without data: .*"):
        count(Thresholds(3, 5, 1), SIZE, None)
    monkeypatch.setattr("training.microbatch.free_memory", lambda device: pytest.fail("was asked"))
    device: Any = None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = Config(train_dataset=TrainDatasetConfig(batch_size=24), compile=False)
    assert choose_microbatch(config, Thresholds(3, 5, 1), Precision("fp32"), device) == ("auto", 24)
    monkeypatch.undo()
    frozen = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 5, 1))
    whole = count(frozen, SIZE, None)
    frozen[0].requires_grad_(False)
    assert count(frozen, SIZE, None).image <= whole.image


def settings(**changes: Any) -> Config:
    config = Config(**changes)
    config.train_dataset.batch_size = 128
    return config


FOOTPRINT = Footprint(100, 0, 50, 1000, 900, 1e9, 1e6, 1e5, 10)


@pytest.mark.parametrize(
    ("free", "changes", "ranks", "expected"),
    [
        (1e9, {}, 1, (128, True)),
        (130_000, {}, 1, (64, True)),
        (5_000, {}, 1, (4, True)),
        (1_000, {}, 1, (2, False)),
        (1_700, {}, 2, (1, True)),  # sync_bn shares the statistics of one image a process
        (5_000, {"device_train_microbatch_size": 8}, 1, (8, False)),
        (5_000, {"activation_memory_budget": 0.5}, 1, (8, True)),
    ],
)
def test_images_at_once(
    free: float, changes: dict[str, Any], ranks: int, expected: tuple[int, bool]
) -> None:
    config = settings(**changes)
    assert fitting(FOOTPRINT, config, 128, free, ranks) == expected
    at_once, fits = expected
    assert fits == (FOOTPRINT.step(at_once, config, ranks) <= free)


def test_a_cpu_does_not_adapt() -> None:
    assert fitting(FOOTPRINT, settings(), 128, 5_000, adapts=False) == (128, False)


def test_recipes_take_their_copies_of_the_weights() -> None:
    taken = [
        FOOTPRINT.step(1, settings(recipe_name=name)) for name in (None, "mild", "medium", "hot")
    ]
    steps = [round((after - before) / 1.05) for before, after in itertools.pairwise(taken)]
    assert steps == [FOOTPRINT.weights, FOOTPRINT.weights, 0]


def test_lengths() -> None:
    config = settings(max_duration="3ep", eval_interval="2ep", eval_first=True)
    assert lengths(config, 10) == (10, 30, 3, 0)
    config.save_folder, config.save_interval = "x", "7ba"
    assert lengths(config, 10).checkpoints == 5
    assert passes(settings(recipe_name="medium")) == 1.5
    assert passes(settings(recipe_name="hot")) == 2 and passes(settings()) == 1


def test_estimates_go_with_the_hardware() -> None:
    def speed(name: str, gpus: int, **changes: Any) -> float:
        config = settings(**changes)
        found = estimate(FULL, config, name, gpus, passes(config), "amp_bf16", True)
        assert found.fastest < found.step
        return 128 / found.step

    FULL = Footprint(*(int(0.22 * GIB), 0, 0), 1.2 * GIB, GIB, 1.5e12, 8e9, 6e8, 118)
    order = [speed(name, 8) for name in ("T4", "L4", "A100-40GB", "A100", "H100", "H200", "B200")]
    assert order == sorted(order)
    assert 4 < speed("H100", 8) / speed("H100", 1) < 8
    assert speed("H100", 16) / speed("H100", 8) < 2
    assert 1.8 < speed("A100", 8) / speed("A100", 8, recipe_name="hot") < 2
    assert all(gpu.single < gpu.half for gpu in GPUS.values())


@pytest.fixture
def config(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    tiny |= {"save_folder": "out", "loggers": {"progress_bar": {}}, "max_duration": "3ep"}
    file.write_text(json.dumps(tiny))  # which is YAML
    return file


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = program.run([*arguments, "--plan", "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.trains
def test_a_run_is_planned_here_and_nothing_is_left(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extras.planning.measure.LOADER_SECONDS", 0.2)
    for recipe in (None, "medium"):
        override = [f"recipe_name={recipe}", "max_duration=3ep"] if recipe else []
        status, found = plan(capsys, str(config), *override, "--price", "2")
        assert status == 0 and [*config.parent.iterdir()] == [config]
        assert found["batch"] == {"images": 4, "a_process": 4, "at_once": 4}
        assert found["length"] == dict(epoch=4, steps=12, evaluations=3, checkpoints=3)
        assert found["hours"] == pytest.approx(sum(found["hours_of"].values()))
        assert found["cost"] == 2 * found["hours"] > 0
        speed = found["speed"]
        assert 4 / speed["step"] == speed["images_per_second"] < speed["loader"]
        assert speed["limit"] in ("network", "loader")
        # A checkpoint is what a run of this recipe holds, but for its gradients.
        run = resolve(load(str(config), override))
        run.save_folder, run.loggers = None, {}  # the bar wants a real standard output
        trainer = program.build_trainer(run)
        trainer.fit(duration="1ba")
        trainer.state.model.zero_grad()
        held = standing_bytes(trainer)
        trainer.close()
        assert found["checkpoint"]["bytes"] == held
    release()


@pytest.mark.trains
def test_the_screen(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extras.planning.measure.LOADER_SECONDS", 0.2)
    assert program.run([str(config), "--plan"]) == 0
    screen = capsys.readouterr().out
    assert len(screen.splitlines()) < 24
    for name in ("memory", "loader", "limited by", "checkpoint", "time"):
        assert f"\n{name} " in screen


@pytest.mark.trains
def test_an_evaluation_is_planned_as_one(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It needs neither a checkpoint nor the training data."""
    overrides = ["is_train=false", "train_dataset.path=nowhere"]
    length = dict(images=6, epoch=0, steps=0, evaluations=1, checkpoints=0)
    for machine in ([], ["--gpu", "H100", "--gpus", "2"]):
        status, found = plan(capsys, str(config), *overrides, *machine, "--price", "2")
        assert status == 0 and [*config.parent.iterdir()] == [config]
        assert found["length"] == length and found["does_not_fit"] is None
        assert set(found["hours_of"]) - {"start"} == {"evaluation"}
        assert found["hours"] == pytest.approx(sum(found["hours_of"].values()))
        assert found["cost"] == 2 * found["hours"] > 0
    assert program.run([str(config), *overrides, "--plan", "--gpu", "H100"]) == 0
    screen = capsys.readouterr().out
    assert "length        1 evaluation of 6 images" in screen
    assert "step" not in screen.replace("host a step", "")


def test_another_machine(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = plan(capsys, str(config), "--gpu", "H100", "--gpus", "2", "--price", "10")
    assert status == 0 and found["length"]["epoch"] == 4 and found["batch"]["a_process"] == 2
    assert found["hours"] > 0 and len(found["assumed"]) > 3
    assert [*config.parent.iterdir()] == [config]
    missing = ["train_dataset.path=nowhere", "eval_dataset.path=nowhere"]
    images = ("--images", "800", "100")
    status, found = plan(capsys, str(config), *missing, "--gpu", "H100", *images)
    assert status == 0 and found["length"]["epoch"] == 200


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--gpu", "H100", "--gpus", "3"], "4 does not divide among 3 GPUs"),
        (["--gpus", "2"], "they need --gpu"),
        (["--fast"], "--fast: no such option"),
        (["train_dataset.path=nowhere", "--gpu", "H100"], "train_dataset.path: no folder nowhere"),
        (["--gpu", "H100", "--images", "3", "1"], "3 images do not fill one batch of 4"),
        (["activation_memory_budget=1.5"], "is not 0 to 1"),
        (["activation_memory_budget=0.5", "compile=false"], "needs compile"),
    ],
)
def test_a_wrong_command_is_a_line(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert program.run([str(config), "--plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_what_does_not_fit(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory, of another machine and of this one, before a step is tried; on the disk."""
    large = "train_dataset.final_size=8192"
    status, found = plan(capsys, str(config), large, "--gpu", "T4")
    assert status == 2 and "not even 2 images" in found["does_not_fit"] and "hours" not in found
    monkeypatch.setattr("extras.planning.plan.measure", lambda *a: pytest.fail("was tried"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 2**24}))
    status, found = plan(capsys, str(config))
    assert status == 2 and found["memory"]["step"] > found["memory"]["device"] == 2**24
    program.run([str(config), "--plan"])
    assert "DOES NOT FIT" in capsys.readouterr().out
    usage = type("U", (), {"free": 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    status, found = plan(capsys, str(config), "--gpu", "T4")
    assert status == 2 and "no room for the checkpoints" in found["does_not_fit"]


def test_the_store_is_timed(synthetic: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    remote = write(synthetic, tmp_path / "remote")
    for name in ("train_dataset", "eval_dataset"):
        tiny[name] |= {"is_streaming": True, "path": remote, "local": str(tmp_path / "local")}
    spec = build_data(resolve(tiny), "train")
    found = _store(spec.dataloader, str(tmp_path))  # pyright: ignore[reportArgumentType]
    assert found is not None and found[1] > 0
    files = (tmp_path / "remote/train").glob("*.mds")
    assert found[0] == sum(file.stat().st_size for file in files)


def test_the_network_of_a_plan_is_that_of_a_run(tiny: dict[str, Any]) -> None:
    config = resolve(tiny)
    planned = create_meta_network(**asdict(config.model))
    assert all(p.is_meta for p in planned.parameters())
    built = build_composer_deeplabv3(12, "resnet50").module
    shapes = {name: value.shape for name, value in built.state_dict().items()}
    assert {name: value.shape for name, value in planned.state_dict().items()} == shapes


def test_described_data_and_rare_classes_are_planned_for(
    synthetic: str, tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny["data"] = str(lay_out(synthetic, tmp_path / "set", "folders", 12))
    tiny["model"]["class_weights"] = "auto"
    for section in ("train_dataset", "eval_dataset"):
        del tiny[section]["path"]
    epochs = []
    for rare in (None, 0.5):
        tiny["train_dataset"]["rare_class_sampling"] = rare
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(tiny))
        status, found = plan(capsys, str(file), "--gpu", "H100")
        assert status == 0
        epochs.append(found["length"]["epoch"])
        # It is what the run's own loader has.
        assert epochs[-1] == len(build_data(resolve(tiny), "train").dataloader)
    assert epochs[0] == 4 < epochs[1]
