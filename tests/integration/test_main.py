"""Runs of main.py: recipes, checkpoints, evaluation, loggers and the command line."""

from __future__ import annotations

import copy
import json
import math
import re
import time
from pathlib import Path
from typing import Any, cast

import cv2
import pytest
import torch
from composer.loggers import InMemoryLogger
from omegaconf import OmegaConf
from PIL import Image

import main as main_module
from checkpointing.weights import load_weights, save_weights
from data import build_data
from errors import ConfigError, DataError, WeightsError
from main import main, run
from segmentation.metrics import mean_iou
from tests.support.forked import shrink
from training.callbacks import summary
from training.config import resolve
from training.pictures import Curves
from transforms import resize_mask

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture
def history() -> InMemoryLogger:
    """A logger that keeps all logged values in memory."""
    return InMemoryLogger()


def values(history: InMemoryLogger, name: str) -> list[float]:
    return [float(value) for _, value in history.data[name]]


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize("recipe", [None, "mild", "medium", "hot"])
def test_every_recipe_trains_with_correct_losses_and_metrics(
    tiny: dict[str, Any],
    history: InMemoryLogger,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str | None,
    precision: str,
) -> None:
    if precision == "amp_bf16":  # On a CPU without native bf16, ResNet-50 takes three minutes.
        shrink(monkeypatch.setattr, monkeypatch.setitem)
    tiny |= {"recipe_name": recipe, "precision": precision, "train_metrics_interval": 2}
    if recipe:
        ema = {"half_life": "2ba", "update_interval": "1ba"}
        tiny[recipe] = {"max_duration": "4ba", "ema": ema}
    trainer = main(OmegaConf.create(tiny), loggers=[history])
    assert trainer.state.timestamp.batch == 4
    losses = values(history, "loss/train/total")
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
    parts = values(history, "loss/train/cross_entropy"), values(history, "loss/train/dice")
    for total, cross_entropy, dice in zip(losses, *parts):
        assert total == pytest.approx(0.375 * cross_entropy + 1.125 * dice, rel=1e-4)
    rates = values(history, "lr-DecoupledSGDW/group0")
    constant = recipe in ("mild", "medium")
    assert rates[0] == 0.01
    assert all(rate == 0.01 for rate in rates) if constant else rates == sorted(rates)[::-1]
    assert rates[-1] == 0.01 if constant else rates[-1] < 0.003
    matrix = trainer.state.eval_metrics["eval"]["MIoU"].total_matrix
    miou = 100 * float(mean_iou(matrix))
    assert values(history, "metrics/eval/MIoU")[-1] == pytest.approx(miou, rel=1e-6)
    masks = Path(tiny["eval_dataset"]["path"]).rglob("annotations/validation/*.png")
    labels = [resize_mask(cv2.imread(str(m), 0), (32, 32)) for m in masks]
    assert matrix.sum() == sum((label > 0).sum() for label in labels)
    assert len(values(history, "metrics/train/MIoU")) == 2
    assert {"time/train", "time/val", "time/total"} <= history.data.keys()
    weights = trainer.state.model.module.backbone.conv1.weight
    assert torch.isfinite(weights).all()
    assert weights.is_contiguous(memory_format=torch.channels_last)


def test_auto_microbatch_is_the_full_batch_on_cpu(tiny: dict[str, Any]) -> None:
    if torch.cuda.is_available():
        pytest.skip("asks what happens on a CPU")
    trainer = main({**tiny, "max_duration": "1ba", "eval_interval": "1ep"})
    assert trainer.state.device_train_microbatch_size == 4


@pytest.fixture(scope="module")
def trained(synthetic: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Return the save folder and final mIoU of a short run with the recipe `mild`."""
    folder = tmp_path_factory.mktemp("trained")
    dataset = {
        "path": synthetic,
        "base_size": 32,
        "final_size": 32,
        "batch_size": 4,
        "num_workers": 0,
    }
    config = {
        "run_name": "trained",
        "model": {"num_classes": 12, "backbone_arch": "resnet50", "backbone_weights": None},
        "train_dataset": dataset,
        "eval_dataset": dataset,
        "recipe_name": "mild",
        "mild": {"max_duration": "2ep", "ema": {"half_life": "2ba", "update_interval": "1ba"}},
        "optimizer": {"lr": 0.01},
        "precision": "fp32",
        "pictures": 1,
        "save_folder": f"{folder}/{{run_name}}",
    }
    trainer = main(config)
    trainer.close()
    return folder / "trained", float(trainer.state.eval_metric_values["MIoU"])


def test_run_saves_checkpoint_curves_and_pictures(trained: tuple[Path, float]) -> None:
    folder, _ = trained
    assert sorted(file.name for file in folder.glob("*.pt")) == [
        "ep2-ba8-rank0.pt",
        "latest-rank0.pt",
    ]
    assert Image.open(folder / "curves.png").size == (900, 800)
    assert len(list((folder / "pictures").glob("*.png"))) == 2


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_evaluation_miou_is_equal_for_any_batch_size(
    tiny: dict[str, Any], trained: tuple[Path, float], batch_size: int
) -> None:
    folder, miou = trained
    tiny |= {"is_train": False, "load_path": str(folder / "ep2-ba8-rank0.pt")}
    tiny |= {"max_duration": "2ep"}  # without a training set, the length of an epoch is unknown
    tiny["eval_dataset"]["batch_size"] = batch_size
    del tiny["train_dataset"]
    trainer = main(tiny)
    assert trainer.state.eval_timestamp.sample == 6
    assert float(trainer.state.eval_metric_values["MIoU"]) == pytest.approx(miou, abs=0.5)
    matrix = trainer.state.eval_metrics["eval"]["MIoU"].total_matrix
    assert matrix.sum() <= 6 * 32 * 32


def test_evaluation_names_the_checkpoint_that_it_found(
    tiny: dict[str, Any], trained: tuple[Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained
    tiny |= {"is_train": False, "autoresume": True, "run_name": "trained"}
    main(tiny | {"save_folder": str(folder)})
    path = folder / "ep2-ba8-rank0.pt"
    assert f"start:    batch 0, with weights: {path}\n" in capsys.readouterr().out


def test_run_resumes_from_load_path(
    tiny: dict[str, Any],
    trained: tuple[Path, float],
    history: InMemoryLogger,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = trained
    ema = {"half_life": "2ba", "update_interval": "1ba"}
    tiny |= {"recipe_name": "mild", "mild": {"max_duration": "10ba", "ema": ema}}
    tiny["load_path"] = str(folder / "ep2-ba8-rank0.pt")
    trainer = main(tiny, loggers=[history])
    assert f"start:    batch 8, resumed from {tiny['load_path']}\n" in capsys.readouterr().out
    assert trainer.state.timestamp.batch == 10
    assert len(values(history, "loss/train/total")) == 2


def test_load_weights_only_starts_a_new_run(
    tiny: dict[str, Any], trained: tuple[Path, float]
) -> None:
    folder, _ = trained
    tiny |= {"load_path": str(folder / "ep2-ba8-rank0.pt"), "load_weights_only": True}
    tiny |= {"max_duration": "1ba", "optimizer": {"lr": 1e-30, "weight_decay": 0}}
    trainer = main(tiny)
    assert trainer.state.timestamp.batch == 1
    saved = torch.load(folder / "ep2-ba8-rank0.pt", weights_only=False)["state"]["model"]
    name = "backbone.layer1.0.conv1.weight"
    weight = trainer.state.model.module.state_dict()[name]
    assert torch.equal(weight, saved[f"module.{name}"])


def test_weights_file_is_rejected_as_checkpoint(
    tiny: dict[str, Any], trained: tuple[Path, float], tmp_path: Path
) -> None:
    weights = load_weights(trained[0]).state
    save_weights(tmp_path / "a.safetensors", weights)
    torch.save(weights, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        tiny["load_path"] = str(tmp_path / name)
        wanted = (
            rf"{tiny['load_path']}: the file is not a training checkpoint; .*load_weights_only=true"
        )
        with pytest.raises(WeightsError, match=wanted):
            main(tiny)
    tiny |= {"is_train": False, "load_path": str(trained[0] / "latest-rank0.pt")}
    tiny["model"]["num_classes"] = 13
    with pytest.raises(
        ConfigError,
        match=r"model.num_classes: the config sets 13, but .* was trained with 12; "
        r"restore the old value$",
    ):
        main(tiny)


def test_weights_of_other_classes_start_run_with_new_classifier(
    tiny: dict[str, Any], trained: tuple[Path, float], caplog: pytest.LogCaptureFixture
) -> None:
    path = str(trained[0] / "ep2-ba8-rank0.pt")
    tiny |= {"load_path": path, "load_weights_only": True, "max_duration": "1ba"}
    tiny["optimizer"] = {"lr": 1e-30, "weight_decay": 0}
    tiny["model"]["num_classes"] = 13
    trainer = main(tiny)
    line = f"load_path: {path}: classifier.conv_seg: 12 -> 13 classes, newly initialised"
    assert line in [record.getMessage() for record in caplog.records]
    saved = torch.load(path, weights_only=False)["state"]["model"]
    state = trainer.state.model.module.state_dict()
    for name in ("backbone.layer4.0.conv1.weight", "classifier.bottleneck.conv.weight"):
        assert torch.equal(state[name], saved[f"module.{name}"])
    # An evaluation rejects weights of other classes.
    with pytest.raises(
        ValueError, match=r"model.num_classes: the config sets 13, but .* was trained with 12"
    ):
        main({**tiny, "is_train": False})


def test_checkpoint_of_other_model_is_rejected(
    tiny: dict[str, Any], trained: tuple[Path, float]
) -> None:
    folder, _ = trained
    tiny["load_path"] = str(folder / "ep2-ba8-rank0.pt")
    tiny |= {"recipe_name": "mild"}
    for key, value in {"num_classes": 13, "backbone_arch": "resnet101"}.items():
        config = copy.deepcopy(tiny)
        config["model"][key] = value
        with pytest.raises(
            ConfigError, match=f"model.{key}: the config sets {value}, but .* was trained with "
        ):
            main(config)
    broken = folder.parent / "broken.pt"
    broken.write_bytes((folder / "ep2-ba8-rank0.pt").read_bytes()[:5000])
    with pytest.raises(WeightsError):
        main({**tiny, "load_path": str(broken)})


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        pytest.param(
            {"batch_size": 5, "drop_last": False},
            "train_dataset.drop_last: false leaves a process with one image .* use true",
            id="last batch of an epoch",
        ),
        pytest.param(
            {"batch_size": 6, "drop_last": False, "micro": 3},
            "device_train_microbatch_size: 3 leaves a process with one image .* use 2",
            id="last micro-batch of an epoch",
        ),
        pytest.param(
            {"batch_size": 7, "micro": 2},
            "device_train_microbatch_size: 2 leaves a process with one image .* use 4",
            id="last micro-batch of a batch",
        ),
        pytest.param(
            {"batch_size": 1},
            "train_dataset.batch_size: 1 leaves a process with one image .* use 2",
            id="batch of one image",
        ),
    ],
)
def test_batch_of_one_image_is_rejected_with_batch_norm(
    tiny: dict[str, Any], keys: dict[str, Any], line: str
) -> None:
    tiny["device_train_microbatch_size"] = keys.pop("micro", None)
    tiny["train_dataset"] |= keys
    with pytest.raises(ConfigError, match=line):
        main(tiny)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("torchvision:lraspp_mobilenet_v3_large", 33),
        ("torchvision:lraspp_mobilenet_v3_large", 50),
        ("tests.support.lone_network:build", 16),
        ("tests.support.lone_network:build", 51),
    ],
)
def test_networks_without_batch_norm_train_on_single_images(
    tiny: dict[str, Any], name: str, size: int
) -> None:
    tiny["model"] |= {"name": name}
    tiny["train_dataset"] |= {"batch_size": 1, "final_size": size, "base_size": size}
    tiny["eval_dataset"] |= {
        "batch_size": 5,
        "final_size": size,
    }  # the last batch has one of the 6 images
    trainer = main({**tiny, "max_duration": "2ba", "eval_interval": "2ba"})
    assert math.isfinite(trainer.state.total_loss_dict["loss/train/total"])
    assert trainer.state.eval_metrics["eval"]["MIoU"].total_matrix is not None


def test_loggers_write_loss_and_miou(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    tiny |= {"max_duration": "2ba", "eval_interval": "2ba"}
    tiny["loggers"] = {
        "tensorboard": {"log_dir": str(tmp_path / "tensorboard"), "flush_interval": 1},
        "mlflow": {"tracking_uri": str(tmp_path / "mlruns"), "experiment_name": "tiny"},
        "wandb": {"project": "tiny", "init_kwargs": {"dir": str(tmp_path)}},
        "file": {"filename": str(tmp_path / "log.txt")},
    }
    trainer = main(tiny)
    loss = trainer.state.total_loss_dict["loss/train/total"]
    miou = float(trainer.state.eval_metric_values["MIoU"])
    trainer.close()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "tensorboard").iterdir())))
    events.Reload()

    def last(name: str) -> float:
        # Use the highest step and not the last entry: Composer starts a new file at each flush, and
        # TensorBoard sorts their names, whose numbers are not zero-padded.
        return max(events.Scalars(name), key=lambda event: event.step).value

    assert last("loss/train/total") == pytest.approx(loss, rel=1e-5)
    assert last("metrics/eval/MIoU") == pytest.approx(miou, rel=1e-5)

    import mlflow

    client = mlflow.MlflowClient(str(tmp_path / "mlruns"))
    experiments = [e.experiment_id for e in client.search_experiments() if "tiny" in e.name]
    record = client.search_runs(experiments)[0]
    assert record.data.metrics["loss/train/total"] == pytest.approx(loss, rel=1e-5)
    assert record.data.params["seed"] == "17"  # the default value in the resolved config

    wandb_log = next(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    deadline = time.monotonic() + 30  # On a busy machine, the W&B process writes the file late.
    while b"metrics/eval/MIoU" not in wandb_log.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"loss/train/total" in wandb_log.read_bytes()
    assert b"metrics/eval/MIoU" in wandb_log.read_bytes()
    assert "loss/train/total" in (tmp_path / "log.txt").read_text()


def test_data_argument_of_main_replaces_data_sets_of_config(tiny: dict[str, Any]) -> None:
    typed = resolve(tiny)
    data = build_data(typed, "train"), build_data(typed, "val")
    for section in ("train_dataset", "eval_dataset"):
        tiny[section]["path"] = "/nowhere"
    trainer = main({**tiny, "max_duration": "1ba", "eval_interval": "1ba"}, data=data)
    assert trainer.state.timestamp.batch == 1
    with pytest.raises(ConfigError, match=r"eval_dataset\.path: cannot find the folder /nowhere"):
        main(tiny)


def test_callbacks_argument_of_main_accepts_curves_callback(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    trainer = main({**tiny, "max_duration": "1ba"}, callbacks=[Curves(str(tmp_path))])
    trainer.eval()
    assert summary(trainer).startswith("mIoU: ")


def test_error_that_all_ranks_raise_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    class First:
        def __init__(self, is_first: bool) -> None:
            self.is_first = is_first

        def is_first_to_say(self, text: str) -> bool:
            return self.is_first

    error = DataError("/data/a.jpg: unknown image format")
    for rank in range(8):
        watch = cast(Any, First(rank == 3))
        assert main_module._refuse(error, watch) == 2
    assert capsys.readouterr().err == "error: /data/a.jpg: unknown image format\n"


@pytest.mark.parametrize("overwrite", [False, True])
def test_resumed_run_appends_to_its_log_file(
    tiny: dict[str, Any], tmp_path: Path, overwrite: bool
) -> None:
    log = tmp_path / "logs/log.txt"
    tiny |= {"save_folder": str(tmp_path), "save_interval": "1ba", "autoresume": True}
    tiny["loggers"] = {"file": {"filename": str(log), "overwrite": overwrite}}
    for last in (1, 2):
        main({**tiny, "max_duration": f"{last}ba"}).close()
    batches = re.findall(r"batch=(\d+)\].*loss/train/total", log.read_text())
    assert batches == (["1"] if overwrite else ["0", "1"])


def test_console_logger_writes_to_configured_stream(
    tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny |= {"max_duration": "1ba", "loggers": {"console": {"stream": "stdout"}}}
    main(tiny).close()
    assert "loss/train/total" in capsys.readouterr().out


def test_command_line_run_trains_and_prints_summary(
    tiny: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "run.yaml"
    OmegaConf.save(tiny, path)
    overrides = [f"save_folder={tmp_path}/saved", "eval_first=true", "pictures=2"]
    overrides += ["max_duration=2ba", "eval_interval=2ba", "save_interval=2ba"]
    assert run([str(path), *overrides]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("batch:    4 images, 4 per process in micro-batches of 4") - 1
    assert lines[first].startswith("device:   ")
    assert re.fullmatch(r"network:  .*resnet50.*, \d+\.\d million parameters", lines[first + 2])
    assert lines[first + 3 : first + 6] == [
        "images:   16 for training, 6 for validation, 12 classes",
        "recipe:   baseline, 2ba, 4 batches per epoch",
        "start:    batch 0, with weights: random",
    ]
    miou, checkpoint, pictures, report = lines[-4:]
    assert miou.startswith("mIoU: ")
    assert " before, " in miou
    assert checkpoint == f"checkpoint: {tmp_path}/saved/ep0-ba2-rank0.pt"
    assert Path(checkpoint.removeprefix("checkpoint: ")).is_file()
    assert Path(pictures.removeprefix("pictures: ")).is_file()
    assert report == f"report: {tmp_path}/saved/report.html"

    assert run([str(path), *overrides]) == 2  # existing checkpoints are not overwritten
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "saved" in error


def test_checkpoint_contains_resolved_config(trained: tuple[Path, float]) -> None:
    state = torch.load(trained[0] / "ep2-ba8-rank0.pt", weights_only=False)["state"]
    record = json.loads(state["callbacks"]["RunRecord"]["config"])
    assert record["mild"]["ema"] == {"half_life": "2ba", "update_interval": "1ba"}
