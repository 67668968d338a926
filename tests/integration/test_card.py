"""The model card, and the files that `export.py --to hub` uploads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import yaml
from PIL import Image

import export
from checkpointing.weights import load_weights, save_weights
from extras.sharing.card import CARD, MARK
from model import deeplabv3
from predict import Segmenter
from segmentation.classes import load_classes
from tests.support.artifacts import CLASSES, random_network
from tests.support.card import exported, front_matter, image_path, set_constants, the_hub, weights  # noqa: F401
from tests.support.hub_server import REPO, TOKEN, Hub
from training.config import load, resolve


def test_model_card_describes_the_export(exported: Path, weights: Path, image_path: Path) -> None:
    card = (exported / CARD).read_text()
    assert card.startswith("---\n") and MARK in card
    parameters = sum(p.numel() for p in random_network().parameters()) / 1e6
    assert f"12 classes: DeepLabV3+ on resnet50, {parameters:.1f} million parameters" in card
    assert "; licence: CC BY 4.0" in card and "- recipe: mild" in card
    assert "- learning rate: 0.02" in card and "- crop size, pixels: 32" in card
    assert Image.open(exported / "overlay.jpg").width > 320
    for name in ("model.safetensors", "model.onnx"):
        (row,) = [line for line in card.splitlines() if line.startswith(f"| `{name}`")]
        _, _, size, seconds, _ = row.split("|")
        assert float(size) == pytest.approx((exported / name).stat().st_size / 1e6, abs=0.06)
        assert float(seconds) > 0
    assert "60 x 45 pixels, with a shorter side of 32 at the network's input, on " in card
    assert "/" not in front_matter(card)["model-index"][0]["results"][0]["dataset"]["name"]


def test_model_card_scores_equal_those_of_evaluate_py(
    exported: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import evaluate

    scores = tmp_path / "scores.json"
    assert evaluate.main([str(weights), "--json", str(scores)]) == 0
    expected = json.loads(scores.read_text())
    card = (exported / CARD).read_text()
    (result,) = front_matter(card)["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(expected["mIoU"], 2)
    assert f"mIoU **{expected['mIoU']:.2f}**" in card and "on 6 images" in card
    assert "Protocol `paper`: images keep their aspect ratio (shorter side 32)" in card
    for row in expected["classes"]:
        iou = "-" if row["IoU"] is None else f"{row['IoU']:.2f}"
        assert f"| {row['class']} | {iou} |" in card


def test_code_examples_in_model_card_run_on_uploaded_files(
    the_hub: Hub, exported: Path, weights: Path, image_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--to", "hub", "--out", str(exported), "--photo", str(image_path), "--size", "48"]
    assert export.main([str(weights), *options, "--repo", REPO]) == 0
    names = {"README.md", "model.safetensors", "model.onnx", "config.yaml", "overlay.jpg"}
    assert set(the_hub.files) == names and len(the_hub.commits) == 1
    for name, content in the_hub.files.items():
        assert content == (exported / name).read_bytes()
    card = the_hub.files["README.md"].decode()
    assert card.split("\n# ")[1].startswith("name\n")
    monkeypatch.chdir(image_path.parent)
    first, second = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(first.splitlines()) == len(second.splitlines()) == 3
    image = np.array(Image.open(image_path))
    values = {"onnxruntime": onnxruntime, "image": image.transpose(2, 0, 1)[None]}
    exec(first + second, values)
    assert (values["prediction"] == Segmenter(weights)(str(image_path))).all()
    assert values["logits"].shape == (1, 12, 45, 60)
    config = exported / "config.yaml"
    assert resolve(load(str(config), [])).recipe_name == "mild"
    assert load_weights(exported / "model.safetensors").config == yaml.safe_load(config.read_text())


def test_export_to_hub_without_repo_uploads_nothing(
    the_hub: Hub,
    weights: Path,
    image_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--to", "hub", "--out", str(tmp_path), "--photo", str(image_path), "--size", "48"]
    assert export.main([str(weights), *options]) == 0
    assert "not pushed; use --repo user/name to push" in capsys.readouterr().out
    assert not the_hub.requests


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run export.py, which must fail with a one-line error; return the error."""
    assert export.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def to_hub(weights: Path, folder: Path, repo: str = REPO) -> list[str]:
    return [str(weights), "--to", "hub", "--out", str(folder / "out"), "--repo", repo]


@pytest.mark.parametrize(
    ("token", "repo", "reason"),
    [
        ("", REPO, "no token found; run hf auth login, or set HF_TOKEN"),
        ("hf_wrong", REPO, "the hub answered with status 401; check the token"),
        (TOKEN, "user/other", "the repository does not exist at"),
        (TOKEN, "a/b/c", "expected user/name"),
    ],
)
def test_hub_rejection_is_reported_before_writing_files(
    token: str,
    repo: str,
    reason: str,
    the_hub: Hub,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert reason in run(to_hub(weights, tmp_path, repo), capsys)
    assert not (tmp_path / "out").exists()


def test_error_names_unreachable_hub(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_constants(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "cannot reach http://127.0.0.1:9 (" in run(to_hub(weights, tmp_path), capsys)


def test_card_option_writes_model_card_next_to_weights(
    weights: Path, image_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    place.mkdir()
    copy = place / weights.name
    copy.write_bytes(weights.read_bytes())
    options = [str(copy), "--card", "--photo", str(image_path)]
    for _ in range(2):  # The second call overwrites the model card of the first.
        assert export.main(options) == 0
    assert {path.name for path in place.iterdir()} == {"README.md", "overlay.jpg", copy.name}
    card = (place / CARD).read_text()
    assert f'Segmenter("{copy.name}")' in card and "; licence: not stated" in card
    (place / CARD).write_text("mine")
    capsys.readouterr()
    assert "would be overwritten, but was not written by export.py" in run(options, capsys)
    assert (place / CARD).read_text() == "mine"


def test_model_card_rejects_scores_of_other_weights(
    weights: Path, image_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"class": name, "IoU": 50.0, "accuracy": None, "pixels": 9} for name in CLASSES]
    scores = {"mIoU": 50.0, "mean_accuracy": 60.0, "pixel_accuracy": 70.0, "photos": 3}
    scores |= {"checkpoint": str(weights), "weights": "ema", "protocol": "square", "size": 32}
    scores |= {"classes": rows}
    file, options = tmp_path / "scores.json", ["--card", "--out", str(tmp_path / "card")]
    options = [str(weights), *options, "--photo", str(image_path), "--scores", str(file)]
    file.write_text(json.dumps(scores))
    assert export.main(options) == 0
    card = (tmp_path / "card" / CARD).read_text()
    assert (
        "mIoU **50.00**" in card
        and "Protocol `square`: image and mask are resized to squares" in card
    )
    capsys.readouterr()
    for change, reason in (
        (
            {"weights": "training"},
            "contains scores of the training weights; evaluate the ema weights",
        ),
        (
            {"checkpoint": str(image_path)},
            f"contains the scores of {image_path}; use those of {weights}",
        ),
        ({"classes": rows[1:]}, "contains scores for different classes"),
        ({"classes": 3}, "was not written by evaluate.py --json"),
    ):
        file.write_text(json.dumps(scores | change))
        assert reason in run(options, capsys)


def test_model_card_without_validation_set_says_not_measured(
    weights: Path, image_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = load_weights(weights)
    copy = tmp_path / "alone.safetensors"
    save_weights(
        copy, original.state, {"eval_dataset": {"final_size": 32}}, original.classes, "ema"
    )
    assert export.main([str(copy), "--card", "--photo", str(image_path)]) == 0
    assert "give --scores FILE from evaluate.py --json FILE" in capsys.readouterr().err
    card = (tmp_path / CARD).read_text()
    assert "## Accuracy\n\nNot measured." in card and "model-index" not in card


@pytest.mark.parametrize("use_plus", [True, False])
def test_model_card_names_the_network(
    image_path: Path, tmp_path: Path, small_network: None, use_plus: bool
) -> None:
    network = deeplabv3(12, "resnet50", sync_bn=False, use_plus=use_plus)
    path = tmp_path / "a.safetensors"
    config = {"eval_dataset": {"final_size": 32}}
    save_weights(path, network.state_dict(), config, load_classes(CLASSES, 12))
    assert export.main([str(path), "--card", "--photo", str(image_path)]) == 0
    names = re.findall(r"DeepLabV3\+? on resnet50", (tmp_path / CARD).read_text())
    assert set(names) == {f"DeepLabV3{'+' if use_plus else ''} on resnet50"}
