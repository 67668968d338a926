"""`main.py --plan` predicts the memory, time and cost of a run and writes nothing."""

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


def test_run_plan_measures_this_machine_and_writes_no_file(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extras.planning.measure.LOADER_SECONDS", 0.1)
    monkeypatch.setattr("extras.planning.measure.STEPS", 2)
    for recipe in (None, "medium"):
        override = [f"recipe_name={recipe}", "max_duration=3ep"] if recipe else []
        status, planned_run = plan(capsys, str(config), *override, "--price", "2")
        assert status == 0 and [*config.parent.iterdir()] == [config]
        assert planned_run["batch"] == {"images": 4, "a_process": 4, "at_once": 4}
        assert planned_run["length"] == dict(epoch=4, steps=12, evaluations=3, checkpoints=3)
        assert planned_run["hours"] == pytest.approx(sum(planned_run["hours_of"].values()))
        assert planned_run["cost"] == 2 * planned_run["hours"] > 0
        speed = planned_run["speed"]
        assert 4 / speed["step"] == speed["images_per_second"] < speed["loader"]
        assert speed["limit"] in ("network", "loader")
        # A checkpoint contains all that a run keeps in memory between steps, except the gradients.
        run = resolve(load(str(config), override))
        run.save_folder, run.loggers = None, {}  # the progress bar needs a real standard output
        trainer = program.build_trainer(run)
        trainer.fit(duration="1ba")
        trainer.state.model.zero_grad()
        standing = standing_bytes(trainer)
        trainer.close()
        assert planned_run["checkpoint"]["bytes"] == standing
    release()


def test_run_plan_prints_memory_speed_and_time(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extras.planning.measure.LOADER_SECONDS", 0.1)
    monkeypatch.setattr("extras.planning.measure.STEPS", 2)
    assert program.run([str(config), "--plan"]) == 0
    screen = capsys.readouterr().out
    assert len(screen.splitlines()) < 24
    for name in ("memory", "loader", "limited by", "checkpoint", "time"):
        assert f"\n{name} " in screen


def test_plan_of_an_evaluation_has_no_training_steps(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planning an evaluation needs neither a checkpoint nor the training data."""
    overrides = ["is_train=false", "train_dataset.path=nowhere"]
    length = dict(images=6, epoch=0, steps=0, evaluations=1, checkpoints=0)
    for machine in ([], ["--gpu", "H100", "--gpus", "2"]):
        status, planned_run = plan(capsys, str(config), *overrides, *machine, "--price", "2")
        assert status == 0 and [*config.parent.iterdir()] == [config]
        assert planned_run["length"] == length and planned_run["does_not_fit"] is None
        assert set(planned_run["hours_of"]) - {"start"} == {"evaluation"}
        assert planned_run["hours"] == pytest.approx(sum(planned_run["hours_of"].values()))
        assert planned_run["cost"] == 2 * planned_run["hours"] > 0
    assert program.run([str(config), *overrides, "--plan", "--gpu", "H100"]) == 0
    screen = capsys.readouterr().out
    assert "length        1 evaluation of 6 images" in screen
    assert "step" not in screen.replace("ms per step", "")


def test_run_plan_works_for_other_gpus_and_without_data(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, planned_run = plan(capsys, str(config), "--gpu", "H100", "--gpus", "2", "--price", "10")
    assert (
        status == 0
        and planned_run["length"]["epoch"] == 4
        and planned_run["batch"]["a_process"] == 2
    )
    assert planned_run["hours"] > 0 and len(planned_run["assumed"]) > 3
    assert [*config.parent.iterdir()] == [config]
    missing = ["train_dataset.path=nowhere", "eval_dataset.path=nowhere"]
    images = ("--images", "800", "100")
    status, planned_run = plan(capsys, str(config), *missing, "--gpu", "H100", *images)
    assert status == 0 and planned_run["length"]["epoch"] == 200


def test_run_plan_reports_too_little_memory_or_disk_space(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of a given GPU or of this machine is checked first, then the disk space."""
    large = "train_dataset.final_size=8192"
    status, planned_run = plan(capsys, str(config), large, "--gpu", "T4")
    assert (
        status == 2
        and "even a micro-batch of 2 is too large" in planned_run["does_not_fit"]
        and "hours" not in planned_run
    )
    monkeypatch.setattr("extras.planning.plan.measure", lambda *a: pytest.fail("was tried"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 2**20}))
    status, planned_run = plan(capsys, str(config))
    assert status == 2 and planned_run["memory"]["step"] > planned_run["memory"]["device"] == 2**20
    program.run([str(config), "--plan"])
    assert "DOES NOT FIT" in capsys.readouterr().out
    usage = type("U", (), {"free": 2**16})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    status, planned_run = plan(capsys, str(config), "--gpu", "T4")
    assert (
        status == 2 and "too little disk space for the checkpoints" in planned_run["does_not_fit"]
    )


def test_network_on_meta_device_has_same_parameter_shapes(tiny: dict[str, Any]) -> None:
    config = resolve(tiny)
    planned = create_meta_network(**asdict(config.model))
    assert all(p.is_meta for p in planned.parameters())
    built = build_composer_deeplabv3(12, "resnet50").module
    shapes = {name: value.shape for name, value in built.state_dict().items()}
    assert {name: value.shape for name, value in planned.state_dict().items()} == shapes


def test_run_plan_counts_batches_with_rare_class_sampling(
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
        status, planned_run = plan(capsys, str(file), "--gpu", "H100")
        assert status == 0
        epochs.append(planned_run["length"]["epoch"])
        # The planned length equals the length of the run's own loader.
        assert epochs[-1] == len(build_data(resolve(tiny), "train").dataloader)
    assert epochs[0] == 4 < epochs[1]
