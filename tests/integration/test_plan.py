"""What a run is said to take, beside what it takes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

import main as program
from benchmarks.harness import release
from benchmarks.train_step import standing_bytes
from data import build_data
from model import build_composer_deeplabv3
from networks.deeplab import create_meta_network
from tests.support.layouts import lay_out
from tests.support.plan import config, network  # noqa: F401
from training.config import load, resolve

pytestmark = pytest.mark.usefixtures("small_network")


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = program.run([*arguments, "--plan", "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_run_is_planned_here_and_nothing_is_left(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extras.planning.measure.LOADER_SECONDS", 0.1)
    monkeypatch.setattr("extras.planning.measure.STEPS", 2)
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


def test_the_screen(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extras.planning.measure.LOADER_SECONDS", 0.1)
    monkeypatch.setattr("extras.planning.measure.STEPS", 2)
    assert program.run([str(config), "--plan"]) == 0
    screen = capsys.readouterr().out
    assert len(screen.splitlines()) < 24
    for name in ("memory", "loader", "limited by", "checkpoint", "time"):
        assert f"\n{name} " in screen


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
    assert "step" not in screen.replace("ms per step", "")


def test_another_machine(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = plan(capsys, str(config), "--gpu", "H100", "--gpus", "2", "--price", "10")
    assert status == 0 and found["length"]["epoch"] == 4 and found["batch"]["a_process"] == 2
    assert found["hours"] > 0 and len(found["assumed"]) > 3
    assert [*config.parent.iterdir()] == [config]
    missing = ["train_dataset.path=nowhere", "eval_dataset.path=nowhere"]
    images = ("--images", "800", "100")
    status, found = plan(capsys, str(config), *missing, "--gpu", "H100", *images)
    assert status == 0 and found["length"]["epoch"] == 200


def test_what_does_not_fit(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory, of another machine and of this one, before a step is tried; on the disk."""
    large = "train_dataset.final_size=8192"
    status, found = plan(capsys, str(config), large, "--gpu", "T4")
    assert (
        status == 2
        and "even a micro-batch of 2 is too large" in found["does_not_fit"]
        and "hours" not in found
    )
    monkeypatch.setattr("extras.planning.plan.measure", lambda *a: pytest.fail("was tried"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 2**20}))
    status, found = plan(capsys, str(config))
    assert status == 2 and found["memory"]["step"] > found["memory"]["device"] == 2**20
    program.run([str(config), "--plan"])
    assert "DOES NOT FIT" in capsys.readouterr().out
    usage = type("U", (), {"free": 2**16})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    status, found = plan(capsys, str(config), "--gpu", "T4")
    assert status == 2 and "too little disk space for the checkpoints" in found["does_not_fit"]


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
