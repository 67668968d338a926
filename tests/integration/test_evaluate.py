"""evaluate.py computes the scores of mmsegmentation for any batch size and number of ranks."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from composer.utils import dist
from mmseg.core.evaluation import eval_metrics
from PIL import Image

import evaluate
import export
from dataset.labels import Labels
from evaluate import evaluate_paper, main
from extras import evaluation_data
from predict import Segmenter
from segmentation.classes import load_classes
from tests.support.artifacts import CLASSES, finished_run, random_weights
from tests.support.paths import ROOT
from tests.support.run_helpers import file_limit

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write seven images of five sizes with the labels 0 (background) to 11 and 255, but not 12."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for kind in ("images", "annotations"):
        (root / kind / "validation").mkdir(parents=True)
    for number, size in enumerate(
        [(40, 60), (60, 40), (80, 120), (33, 50), (40, 60), (64, 64), (40, 60)]
    ):
        image = cv2.resize(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), size[::-1])
        mask = cv2.resize(rng.integers(0, 12, (5, 6), dtype=np.uint8), size[::-1], interpolation=0)
        mask[0, :5] = 255
        Image.fromarray(image).save(root / f"images/validation/ADE_val_{number:08}.png")
        Image.fromarray(mask).save(root / f"annotations/validation/ADE_val_{number:08}.png")
    return str(root)


def test_scores_of_paper_protocol_equal_those_of_mmsegmentation(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    files = ["--json", str(tmp_path / "s.json"), "--csv", str(tmp_path / "s.csv")]
    # Use batches of one image, because logits may be rounded differently in larger batches.
    assert main([random_weights(), "--path", data, "--batch-size", "1", *files]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())

    segmenter = Segmenter(random_weights())
    images = sorted(Path(data, "images", "validation").iterdir())
    masks = [str(p).replace("images", "annotations") for p in images]
    predictions = [segmenter(image) for image in images]
    expected = eval_metrics(
        predictions,
        [np.array(Image.open(mask)) for mask in masks],
        num_classes=12,
        ignore_index=255,
        metrics=["mIoU"],
        reduce_zero_label=True,  # mmsegmentation's name for ignore_background
    )
    assert len(np.unique(np.concatenate([p.ravel() for p in predictions]))) > 2
    assert scores["pixel_accuracy"] == pytest.approx(100 * expected["aAcc"], abs=1e-9)
    assert scores["mIoU"] == pytest.approx(100 * np.nanmean(expected["IoU"]), abs=1e-9)
    assert scores["mean_accuracy"] == pytest.approx(100 * np.nanmean(expected["Acc"]), abs=1e-9)
    for row, iou, accuracy in zip(scores["classes"], expected["IoU"], expected["Acc"]):
        for actual, value in ((row["IoU"], iou), (row["accuracy"], accuracy)):
            assert (
                actual is None
                if np.isnan(value)
                else actual == pytest.approx(100 * value, abs=1e-9)
            )

    assert scores["photos"] == 7 and scores["protocol"] == "paper"
    table = (tmp_path / "s.csv").read_text().splitlines()
    assert table[0] == "class,IoU,accuracy,pixels" and len(table) == 13
    printed = capsys.readouterr().out
    assert all(name in printed for name in CLASSES)
    assert "protocol paper, training weights, shorter side 32" in printed
    assert f"mIoU {scores['mIoU']:.2f}   mean accuracy {scores['mean_accuracy']:.2f}" in printed


def test_error_analysis_files_agree_with_predictions(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"--per-image": "images.csv", "--confusion": "pairs.png", "--json": "s.json"}
    options = [word for name, file in files.items() for word in (name, str(tmp_path / file))]
    options += ["--worst", "2", "--out", str(tmp_path / "worst"), "--batch-size", "1"]
    assert main([random_weights(), "--path", data, *options]) == 0

    # Compute the mIoU and the confusion matrix of each image separately.
    segmenter = Segmenter(random_weights())
    names, expected, total = [], [], np.zeros((12, 12), int)
    for path in sorted(Path(data, "images", "validation").iterdir()):
        mask = np.array(Image.open(str(path).replace("images", "annotations")), int) - 1
        is_labelled = (mask >= 0) & (mask < 12)
        counts = np.zeros((12, 12), int)
        np.add.at(counts, (mask[is_labelled], segmenter(path)[is_labelled]), 1)
        union = counts.sum(0) + counts.sum(1) - counts.diagonal()
        expected.append(100 * (counts.diagonal()[union > 0] / union[union > 0]).mean())
        names.append(path.name)
        total += counts

    rows = list(csv.DictReader((tmp_path / "images.csv").open()))
    assert [Path(row["image"]).name for row in rows] == names
    assert [float(row["mIoU"]) for row in rows] == pytest.approx(expected, abs=1e-4)
    assert sum(int(row["pixels"]) for row in rows) == total.sum()
    worst = [Path(names[index]).stem for index in np.argsort(expected, kind="stable")[:2]]
    pictures = sorted(path.name for path in (tmp_path / "worst").iterdir())
    assert pictures == [f"01_{worst[0]}.jpg", f"02_{worst[1]}.jpg"]
    np.fill_diagonal(total, 0)
    true, predicted = np.unravel_index(total.argmax(), total.shape)
    first = json.loads((tmp_path / "s.json").read_text())["confused"][0]
    pair = first["class"], first["predicted"], first["pixels"]
    assert pair == (CLASSES[true], CLASSES[predicted], total.max())
    assert "confused most, by pixels:\n" in capsys.readouterr().out
    assert Image.open(tmp_path / "pairs.png").width > 12 * 16


class Stripes:
    """A fake Segmenter whose prediction for an image depends only on the pixels of that image."""

    device = torch.device("cpu")

    def __init__(self, num_classes: int):
        self.classes = load_classes([str(i) for i in range(num_classes)], num_classes)
        self.batches: list[int] = []

    def network_sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        return ((height, width),)

    def predict(self, images: list[np.ndarray]) -> list[torch.Tensor]:
        self.batches.append(len(images))
        assert len({image.shape for image in images}) == 1
        return [torch.from_numpy(p.sum(2, dtype=np.int64) % len(self.classes)) for p in images]


def pairs(data: str, count: int | None = None) -> list[tuple[Image.Image, Image.Image]]:
    images = sorted(Path(data, "images", "validation").iterdir())
    return [
        (Image.open(image), Image.open(str(image).replace("images", "annotations")))
        for image in images[:count]
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_counts_every_image_once_on_any_number_of_ranks(
    data: str, world: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
):
    index = torch.from_numpy(Labels(12).index())
    single = evaluate_paper(Stripes(12), pairs(data), index, 3)
    total = torch.zeros_like(single)
    for rank in range(world):
        monkeypatch.setattr(dist, "get_world_size", lambda: world)
        monkeypatch.setattr(dist, "get_global_rank", lambda rank=rank: rank)
        total += evaluate_paper(Stripes(12), pairs(data), index, batch_size)
    assert torch.equal(total, single)
    masks = [np.array(mask) for _, mask in pairs(data)]
    assert single.sum() == sum(((mask > 0) & (mask < 13)).sum() for mask in masks)


def test_background_is_class_0_without_ignore_background(data: str):
    """Without ignore_background, label k becomes class k."""
    stripes = Stripes(13)
    index = torch.from_numpy(Labels(13, False).index())
    matrix = evaluate_paper(stripes, pairs(data), index, 2)
    expected = np.zeros((13, 13), int)
    for image, mask in pairs(data):
        labels = np.array(mask).astype(int)
        prediction = stripes.predict([np.array(image)])[0].numpy()
        np.add.at(expected, (labels[labels < 13], prediction[labels < 13]), 1)
    assert expected[0].sum() > 0 and matrix.tolist() == expected.tolist()


def test_miou_of_square_protocol_equals_evaluation_in_training(tmp_path: Path):
    trainer, folder = finished_run()
    path = str(tmp_path / "s.json")
    checkpoint = f"{folder}/latest-rank0.pt"
    # The checkpoint stores the path of its validation set and the size of 32 x 32 pixels.
    assert main([checkpoint, "--protocol", "square", "--batch-size", "3", "--json", path]) == 0
    scores = json.loads(Path(path).read_text())
    assert scores["mIoU"] == pytest.approx(
        float(trainer.state.eval_metric_values["MIoU"]), abs=1e-4
    )
    assert (scores["weights"], scores["photos"]) == ("ema", 5)
    matrix = trainer.state.eval_metrics["eval"]["MIoU"].total_matrix
    assert [row["pixels"] for row in scores["classes"]] == matrix.sum(1).tolist()


@pytest.mark.parametrize("protocol", ["paper", "square"])
def test_onnx_file_gets_the_scores_of_its_checkpoint(tmp_path: Path, protocol: str):
    """Like the checkpoint, the ONNX file stores the validation set path and the image size."""
    _, folder = finished_run()
    checkpoint, exported = f"{folder}/latest-rank0.pt", str(tmp_path / "model.onnx")
    assert export.main([checkpoint, "--to", "onnx", "--out", exported, "--size", "48"]) == 0
    scores = []
    for path in (checkpoint, exported):
        result = tmp_path / "scores.json"
        assert main([path, "--protocol", protocol, "--json", str(result)]) == 0
        scores.append(json.loads(result.read_text()))
    ours, theirs = scores
    for name in ("photos", "size", "weights", "data", "protocol"):
        assert ours[name] == theirs[name]
    assert theirs["pixel_accuracy"] == pytest.approx(ours["pixel_accuracy"], abs=0.1)
    assert [c["pixels"] for c in theirs["classes"]] == [c["pixels"] for c in ours["classes"]]


def test_square_protocol_skips_images_added_by_distributed_sampler(monkeypatch: pytest.MonkeyPatch):
    """For three ranks, the sampler pads five images to six by repeating one."""
    trainer, _ = finished_run()
    spec = trainer.state.evaluators[0].dataloader
    segmenter = SimpleNamespace(
        classes=range(12),
        device=torch.device("cpu"),
        network=lambda image: (
            torch.nn.functional.one_hot(image[:, 0].long() % 12, 12).permute(0, 3, 1, 2).float()
        ),
    )
    single = evaluate.evaluate_square(segmenter, spec)
    total = torch.zeros_like(single)
    for rank in range(3):
        order = [(rank + 3 * i) % 5 for i in range(2)]
        loader = [spec.dataloader.collate_fn([spec.dataloader.dataset[i] for i in order])]
        share = SimpleNamespace(microbatch_transforms=spec.microbatch_transforms)
        share.dataloader = type("Loader", (list,), {"dataset": spec.dataloader.dataset})(loader)
        monkeypatch.setattr(dist, "get_world_size", lambda: 3)
        monkeypatch.setattr(dist, "get_global_rank", lambda rank=rank: rank)
        total += evaluate.evaluate_square(segmenter, share)
    assert torch.equal(total, single)


@pytest.mark.parametrize(
    "options, message",
    [
        (["gone.pt"], "gone.pt: no such file"),
        (["RANDOM"], "give one with --path or --config"),
        (["RANDOM", "--path", "nowhere"], "nowhere"),
        (["RANDOM", "--path", "s3://bucket/x"], "set a cache folder with --local"),
        (["RANDOM", "--config", "gone.yaml"], "gone.yaml"),
        (["RANDOM", "--classes", "gone.txt"], "gone.txt"),
    ],
)
def test_invalid_options_of_evaluate_give_one_line_errors(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main([random_weights() if word == "RANDOM" else word for word in options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        pytest.param({"csv": "x.csv", "json": "x.json"}, "gone", id="missing validation set"),
        pytest.param(
            {"json": "no/x.json"}, "cannot write no/x.json: No such", id="output in missing folder"
        ),
        pytest.param(
            {"csv": "x", "json": "./x"}, "./x: two outputs have", id="same file for CSV and JSON"
        ),
        pytest.param(
            {"csv": "classes.txt"}, "classes.txt would be over", id="class names file as output"
        ),
        pytest.param({"json": "."}, "cannot write .: it is a folder", id="folder as output"),
    ],
)
def test_failed_evaluation_writes_no_file(
    outputs: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    Path("classes.txt").write_text("\n".join(CLASSES))
    options = [option for kind, path in outputs.items() for option in (f"--{kind}", path)]
    assert main([random_weights(), "--path", "gone", "--classes", "classes.txt", *options]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["classes.txt"]
    assert Path("classes.txt").read_text() == "\n".join(CLASSES)


def test_evaluate_prints_scores_even_if_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    table, scores = tmp_path / "classes.csv", tmp_path / "scores.json"
    rows = [{"class": name, "IoU": 1.0, "accuracy": 1.0, "pixels": 9} for name in CLASSES]
    result = dict.fromkeys(("mIoU", "mean_accuracy", "pixel_accuracy"), 1.0)
    result |= dict.fromkeys(("photos", "data", "protocol", "weights", "size", "tta", "slide"), 1)
    monkeypatch.setattr(evaluate, "evaluate", lambda _: result | {"classes": rows})
    with file_limit(1000):
        assert main(["w.pt", "--csv", str(table), "--json", str(scores)]) == 1
    output = capsys.readouterr()
    assert "mIoU" in output.out and f"error: {scores}: File too large" in output.err
    assert [path.name for path in tmp_path.iterdir()] == ["classes.csv"]


def test_evaluation_with_config_needs_only_validation_set(data: str, tmp_path: Path) -> None:
    """The evaluation does not open the training data, loggers or load_path of the config."""
    config = {
        "model": {"num_classes": 12},
        "class_names": str(ROOT / "yamls" / "demo_classes.txt"),
        "train_dataset": {"path": "/nowhere", "batch_size": 7},
        "eval_dataset": {"path": "/nowhere", "batch_size": 5},
        "loggers": {"comet_ml": {}},
        "load_path": "/nowhere.pt",
    }
    path, scores = tmp_path / "run.yaml", tmp_path / "scores.json"
    path.write_text(json.dumps(config))
    command = [random_weights(), "--config", str(path), "--path", data, "--json", str(scores)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        evaluation_data.resolve_file(str(path))
    assert main(command) == 0
    assert json.loads(scores.read_text())["photos"] == 7


def test_full_shared_memory_gives_one_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: Any) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(evaluate, "evaluate", fail)
    assert main([random_weights()]) == 1
    assert re.fullmatch(
        r"error: /dev/shm is full \(\d+ [KM]B\); use docker run --shm-size 16g\n",
        capsys.readouterr().err,
    )
