"""Tests of extras/prediction_pipeline.py."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from errors import OutputError
from extras import prediction_pipeline
from extras.prediction_pipeline import segment_images


class Brightness:
    """A model that predicts a pixel's red value divided by 64, and records its batch sizes."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = SimpleNamespace(type=device)
        self.classes = [f"class {i}" for i in range(4)]
        self.batches: list[int] = []

    def network_sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        return ((height, width),)

    def predict(self, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
        assert len({image.shape for image in images}) == 1
        self.batches.append(len(images))
        return [torch.from_numpy(image[..., 0] // 64).long() for image in images]

    def overlay(self, image: np.ndarray, prediction: np.ndarray) -> Image.Image:
        return Image.fromarray(image)


def write(folder: Path, shapes: Sequence[tuple[int, int]]) -> list[tuple[Path, Path]]:
    """Write images of the given sizes, and return pairs of an input and an output path."""
    rng = np.random.default_rng(0)
    files = []
    for number, shape in enumerate(shapes):
        path = folder / f"{number:03}.png"
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(path)
        files.append((path, folder / "out" / f"{number:03}"))
    return files


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_image_gets_its_own_prediction(tmp_path: Path, device: str) -> None:
    files = write(tmp_path, [(8, 12), (6, 6)] * 20)
    model = Brightness(device)
    assert list(segment_images(model, files, ["index", "overlay"])) == [""] * 40
    for path, target in files:
        expected = np.array(Image.open(path))[..., 0] // 64
        assert np.array_equal(np.array(Image.open(f"{target}.png")), expected)
        assert Image.open(f"{target}.jpg").size == Image.open(path).size
    assert sum(model.batches) == 40
    assert (max(model.batches) == 1) is (device == "cpu")


def test_output_files_are_written_in_the_order_of_the_images(
    tmp_path: Path, monkeypatch: Any
) -> None:
    written = []

    def record(path: str, content: bytes) -> None:
        written.append(Path(path).name)

    monkeypatch.setattr(prediction_pipeline, "write_file", record)
    files = write(tmp_path, [(300, 400) if i % 3 == 0 else (4, 4) for i in range(30)])
    list(segment_images(Brightness("cuda"), files, ["index"]))
    assert written == [f"{number:03}.png" for number in range(30)]


def test_invalid_image_is_skipped_without_changing_the_order(tmp_path: Path, capsys: Any) -> None:
    files = write(tmp_path, [(8, 8)] * 3)
    files[1][0].write_bytes(b"no image")
    files.append((tmp_path / "missing.png", tmp_path / "out" / "missing"))
    assert list(segment_images(Brightness(), files, ["index"])) == ["", "skipped", "", "skipped"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        f"skipped {tmp_path}/001.png",
        f"skipped {tmp_path}/missing.png",
    ]


def test_first_write_error_stops_the_prediction_pipeline(tmp_path: Path, monkeypatch: Any) -> None:
    written = []

    def fail_at_third(path: str, content: bytes) -> None:
        if len(written) == 2:
            raise OutputError(f"{path}: No space left on device")
        written.append(Path(path).name)

    monkeypatch.setattr(prediction_pipeline, "write_file", fail_at_third)
    files = write(tmp_path, [(8, 8)] * 10)
    before = threading.enumerate()  # Other tests in this process may have left threads.
    with pytest.raises(OutputError, match=r"002\.png"):
        list(segment_images(Brightness(), files, ["index"]))
    assert written == ["000.png", "001.png"]
    assert not set(threading.enumerate()) - set(before)


@pytest.mark.parametrize(("limit", "most"), [(1, 2), (2**28, 100)])
def test_pipeline_limits_the_number_of_images_in_memory(
    tmp_path: Path, monkeypatch: Any, limit: int, most: int
) -> None:
    monkeypatch.setattr(prediction_pipeline, "MAX_BYTES", limit)
    in_memory, largest, lock = 0, 0, threading.Lock()

    def read(path: Path) -> np.ndarray:
        nonlocal in_memory, largest
        with lock:
            in_memory += 1
            largest = max(largest, in_memory)
        return np.array(Image.open(path))

    monkeypatch.setattr(prediction_pipeline, "read_image", read)
    files = write(tmp_path, [(8, 8)] * 60)
    for _ in segment_images(Brightness(), files, ["index"]):
        with lock:
            in_memory -= 1
    # The pipeline does not know the image size before it has read the first image.
    assert largest <= max(most, 2 + prediction_pipeline.BATCH + 16)
    assert largest < 60
