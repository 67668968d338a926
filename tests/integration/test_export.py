"""Exported files compute PyTorch's logits for any batch and image size, without this project."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import export
from checkpointing.weights import load_weights
from command_lines import EXPORT_SUFFIXES
from export import Deployed, compare, main
from networks.base import IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD
from predict import Segmenter
from tests.support.artifacts import CLASSES, random_network, random_weights
from tests.support.run_helpers import file_limit

pytestmark = pytest.mark.usefixtures("small_network", "no_curves")


@pytest.fixture(scope="module")
def image_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("image") / "image.png"
    small = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(cv2.resize(small, (60, 45), interpolation=cv2.INTER_CUBIC)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, image_path: str) -> dict[str, Path]:
    """Export random weights to each format; export.py compares each file with PyTorch."""
    folder = tmp_path_factory.mktemp("exported")
    files = {}
    for kind in ("onnx", "torchscript", "pt2"):
        files[kind] = folder / f"model{EXPORT_SUFFIXES[kind]}"
        options = ["--to", kind, "--out", str(files[kind]), "--photo", image_path, "--size", "48"]
        assert main([random_weights(), *options]) == 0
    return files


@functools.cache
def loaded(path: Path) -> tuple[Any, dict[str, str]]:
    """Load an exported file; return a callable or ONNX session, and the metadata."""
    extra = dict.fromkeys(("classes", "config", "which", "size", "mean", "std"), "")
    if path.suffix == ".onnx":
        run = onnxruntime.InferenceSession(path)
        extra = run.get_modelmeta().custom_metadata_map
    elif path.suffix == ".ts":
        run = torch.jit.load(str(path), _extra_files=extra)
    else:
        run = torch.export.load(str(path), extra_files=extra).module()
    text = {key: v.decode() if isinstance(v, bytes) else v for key, v in extra.items()}
    return run, text


def expected(image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return Deployed(random_network().eval())(torch.from_numpy(image)).numpy()


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 3, 41, 77), (1, 3, 200, 33)])
@pytest.mark.parametrize("kind", ["onnx", "torchscript", "pt2"])
def test_exported_file_equals_pytorch_for_any_batch_and_size(
    files: dict[str, Path], kind: str, shape: tuple[int, ...]
):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    run, _ = loaded(files[kind])
    if kind == "onnx":
        (logits,) = run.run(None, {"image": image})
    else:
        logits = run(torch.from_numpy(image)).detach().numpy()
    reference = expected(image)
    assert logits.shape == reference.shape
    assert np.abs(logits - reference).max() < 1e-3 * max(1, np.abs(reference).max())
    assert (logits.argmax(1) == reference.argmax(1)).mean() >= 0.999


def test_exported_convolutions_are_standard_operators(files: dict[str, Path]):
    """Even convolutions that networks/depthwise.py computes with its own operator are standard."""
    count = sum(isinstance(module, torch.nn.Conv2d) for module in random_network().modules())
    graph = onnx.load(files["onnx"], load_external_data=False).graph
    assert [node.op_type for node in graph.node].count("Conv") == count
    assert all(node.domain == "" for node in graph.node)
    script = str(loaded(files["torchscript"])[0].inlined_graph)
    assert script.count("aten::_convolution(") == count and "deeplab::" not in script
    targets = [str(node.target) for node in loaded(files["pt2"])[0].graph.nodes]
    assert targets.count("aten.conv2d.default") == count
    assert not any("deeplab" in target for target in targets)


def test_exported_file_contains_classes_config_and_image_size(files: dict[str, Path]):
    for path in files.values():
        _, metadata = loaded(path)
        classes = json.loads(metadata["classes"])
        assert [c["name"] for c in classes] == CLASSES
        assert all(len(c["color"]) == 3 for c in classes)
        assert json.loads(metadata["config"])["eval_dataset"] == {"final_size": 32}
        assert metadata["size"] == "32"
        assert json.loads(metadata["mean"]) == list(IMAGENET_CHANNEL_MEAN)
        assert json.loads(metadata["std"]) == list(IMAGENET_CHANNEL_STD)


def test_onnx_file_runs_without_this_project(files: dict[str, Path], tmp_path: Path):
    program = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
image = numpy.full((1, 3, 40, 30), 128, numpy.uint8)
print(session.run(["logits"], {"image": image})[0].shape)
print(*{"torch", "mmseg", "mmcv", "composer", "predict"} & set(sys.modules))
"""
    run = subprocess.run(
        [sys.executable, "-c", program, files["onnx"]],
        cwd=tmp_path,
        env={},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "(1, 12, 40, 30)\n\n"


def test_onnx_file_predicts_like_pytorch(files: dict[str, Path], image_path: str):
    torch_one, onnx_one = Segmenter(random_weights(), size=48), Segmenter(files["onnx"], size=48)
    assert onnx_one.classes == torch_one.classes
    assert len(np.unique(torch_one(image_path))) > 2
    assert (onnx_one(image_path) == torch_one(image_path)).mean() >= 0.999


def test_exported_formats_keep_image_size_classes_and_config(
    files: dict[str, Path], image_path: str, tmp_path: Path
):
    """Compare the validation size, class names, colours and configuration."""
    safetensors = tmp_path / "weights.safetensors"
    assert main([random_weights(), "--weights-only", "--out", str(safetensors)]) == 0
    one, *others = (Segmenter(path) for path in (random_weights(), safetensors, files["onnx"]))
    for other in others:
        assert (other.size, other.which, other.config) == (32, one.which, one.config)
        assert other.classes == one.classes
        assert (other(image_path) == one(image_path)).mean() >= 0.999
    # Without a stored size, every format defaults to 512 pixels.
    plain = tmp_path / "plain.pt"
    torch.save(random_network().state_dict(), plain)
    assert (
        main([str(plain), "--to", "onnx", "--out", str(tmp_path / "p.onnx"), "--size", "48"]) == 0
    )
    assert Segmenter(plain).size == Segmenter(tmp_path / "p.onnx").size == 512


def test_export_that_differs_from_pytorch_is_rejected(
    image_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    model, image = Deployed(random_network()), np.array(Image.open(image_path))
    assert compare(model, lambda batch: model(batch), image, 48) == (1.0, 0.0)
    for wrong in (
        lambda batch: model(batch) * 1.01,
        lambda batch: model(batch).roll(1, 1),
        lambda batch: model(batch)[..., :-1],
    ):
        agreement, difference = compare(model, wrong, image, 48)
        assert agreement < 0.999 or difference > 1e-3
    monkeypatch.setattr(export, "export", lambda m, kind, path, *_: path.touch() or wrong)
    options = ["--out", str(tmp_path / "m.onnx"), "--photo", image_path, "--size", "48"]
    assert main([random_weights(), "--to", "onnx", *options]) == 1
    assert "does NOT match PyTorch" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [["--to", "safetensors"], ["--weights-only"]])
def test_safetensors_file_equals_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: list[str]
):
    path = tmp_path / "weights.safetensors"
    assert main([random_weights(), *kind, "--out", str(path)]) == 0
    assert f"{path}: 12 classes" in capsys.readouterr().out
    written, original = load_weights(path), load_weights(random_weights())
    assert written.config == original.config and written.classes == original.classes
    assert all(torch.equal(written.state[key], value) for key, value in original.state.items())


def test_bug_in_exporter_is_not_reported_as_user_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def fail(*arguments: Any) -> None:
        raise ValueError("inside the exporter")

    monkeypatch.setattr(export, "export", fail)
    with pytest.raises(ValueError, match="inside the exporter"):
        export.main([random_weights(), "--to", "onnx", "--out", str(tmp_path / "a.onnx")])


def test_export_with_unreadable_image_gives_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.jpg").write_text("text")
    assert export.main([random_weights(), "--card", "--photo", str(tmp_path / "a.jpg")]) == 2
    assert capsys.readouterr().err == f"error: --photo {tmp_path}/a.jpg: unknown image format\n"


@pytest.mark.parametrize("kind", ["onnx", "torchscript", "pt2", "safetensors", "web", "hub"])
def test_export_to_full_disk_leaves_no_file(
    kind: str,
    image_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """torch's own file writers would end the process on a full disk."""
    monkeypatch.setattr(export, "fetch_runtime", lambda: tmp_path)
    monkeypatch.setattr(export, "_scores", lambda *_: None)
    out = tmp_path / "out"
    with file_limit(100_000):
        options = ["--to", kind, "--out", f"{out}/m", "--photo", image_path, "--size", "48"]
        assert main([random_weights(), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out}/m") and "File too large" in error
    assert error.count("\n") == 1 and ".unfinished" not in error
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("kind", "existing", "named"),
    [
        pytest.param(
            "safetensors", "in/w.safetensors", "in/w.safetensors", id="input weights file"
        ),
        pytest.param("onnx", "in/classes.txt", "in/classes.txt", id="input class names file"),
        pytest.param("web", "in/index.html", "in", id="web page of another project"),
        pytest.param("hub", "in/config.yaml", "in", id="config file not from export.py"),
        pytest.param("card", "in/overlay.jpg", "in", id="image not from export.py"),
    ],
)
def test_export_refuses_to_overwrite_inputs_and_foreign_files(
    kind: str, existing: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "in").mkdir()
    weights = tmp_path / "in/w.safetensors"
    shutil.copy(random_weights(), weights)
    (tmp_path / "in/classes.txt").write_text("\n".join(CLASSES))
    if not (tmp_path / existing).exists():
        (tmp_path / existing).write_text("mine")
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    options = ["--classes", f"{tmp_path}/in/classes.txt", "--out", f"{tmp_path}/{named}"]
    how = ["--card"] if kind == "card" else ["--to", kind]
    assert main([str(weights), *how, *options]) == 2
    assert f"{tmp_path / existing} would be overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> dict[str, float | None]:
    """Fake evaluate.py: return the mIoUs that it reports; it fails where the value is None."""
    miou_by_kind: dict[str, float | None] = {"weights": 50.0, "onnx": 50.0}

    def evaluate(arguments: list[str]) -> int:
        miou = miou_by_kind["onnx" if arguments[0].endswith(".onnx") else "weights"]
        if miou is None:
            return 2
        result = {"mIoU": miou, "photos": 3, "data": "camvid"}
        Path(arguments[2]).write_text(json.dumps(result))
        return 0

    monkeypatch.setattr("evaluate.main", evaluate)
    return miou_by_kind


@pytest.mark.parametrize(
    ("model", "half", "status", "stream", "line"),
    [
        pytest.param(
            50.0,
            49.95,
            0,
            "out",
            "mIoU 49.95 with float16 weights, 50.00 without, on 3 images of camvid",
            id="almost equal mIoU",
        ),
        pytest.param(
            50.0,
            49.5,
            1,
            "err",
            "error: --half lowers the mIoU too much (mIoU 49.50 with float16 weights, 50.00 "
            "without); export without it",
            id="lower mIoU",
        ),
        pytest.param(
            None,
            None,
            0,
            "err",
            "the file is kept without scores; to score it, run evaluate.py on it with --path",
            id="no validation set",
        ),
    ],
)
def test_export_compares_miou_of_half_and_full_weights(
    scores: dict[str, float | None],
    model: float | None,
    half: float | None,
    status: int,
    stream: str,
    line: str,
    image_path: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    scores.update(weights=model, onnx=half)
    path = tmp_path / "m.onnx"
    options = ["--to", "onnx", "--half", "--out", str(path), "--photo", image_path, "--size", "48"]
    assert main([random_weights(), *options]) == status
    assert line in getattr(capsys.readouterr(), stream).splitlines()
    assert [file.name for file in tmp_path.iterdir()] == (["m.onnx"] if status == 0 else [])


def test_half_weights_halve_the_file_size(
    files: dict[str, Path], scores: dict[str, float | None], image_path: str, tmp_path: Path
):
    path = tmp_path / "m.onnx"
    options = ["--to", "onnx", "--half", "--out", str(path), "--photo", image_path, "--size", "48"]
    assert main([random_weights(), *options]) == 0
    saved = files["onnx"].stat().st_size - path.stat().st_size
    sizes = [weight.numel() for weight in random_network().parameters()]
    # Each weight takes two bytes less, except in small tensors, which stay in float32.
    assert saved == pytest.approx(2 * sum(size for size in sizes if size >= 1024), rel=0.05)
    half, full = Segmenter(path, size=48), Segmenter(files["onnx"], size=48)
    assert (half(image_path) == full(image_path)).mean() >= 0.99


def test_export_of_half_weights_that_differs_is_rejected(
    image_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(export, "compare", lambda *_: (0.98, 1e-3))
    options = ["--to", "onnx", "--half", "--out", str(tmp_path / "m.onnx"), "--photo", image_path]
    assert main([random_weights(), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith("; export without --half\n")
    assert list(tmp_path.iterdir()) == []
